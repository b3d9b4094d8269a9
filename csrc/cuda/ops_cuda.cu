// The ops on a GPU: checks, temporaries, launches. On the current stream, without waiting for it.
#include <ATen/Dispatch.h>
#include <ATen/core/LegacyTypeDispatch.h>
#include <ATen/core/Tensor.h>
#include <c10/cuda/CUDAException.h>
#include <c10/cuda/CUDAGuard.h>
#include <c10/cuda/CUDAStream.h>
#include <torch/library.h>

#include <atomic>

#include "../checks.h"
#include "../layers.h"
#include "kernels.cuh"
#include "launches.h"

namespace torchlars::cuda {
namespace {

#define TORCHLARS_DISPATCH(TYPE, NAME, ...) \
  AT_DISPATCH_FLOATING_TYPES_AND2(c10::kBFloat16, c10::kHalf, TYPE, NAME, __VA_ARGS__)

// The bytes of parameters and gradients that are measured and adapted at once, or 0 for all layers. See set_run_bytes.
std::atomic<int64_t> run_bytes = 0;

// A driver that is too old fails the launch with an error that does not say why.
void check_driver() {
  static const int version = [] {
    int found = 0;
    C10_CUDA_CHECK(cudaDriverGetVersion(&found));
    return found;
  }();
  TORCH_CHECK(version >= 12010, "torchlars needs an NVIDIA driver 530 or newer: its kernels take more than 4 KB of ",
              "arguments (got: a driver for CUDA ", version / 1000, ".", version % 1000 / 10,
              "); update the driver, or build torchlars with TORCHLARS_CUDA=0 to use the reference in plain torch");
}

// Launches on the current stream of the tensors' device, which it makes the current one.
struct Launch {
  explicit Launch(const at::Tensor& tensor)
      : guard(tensor.device()), stream(c10::cuda::getCurrentCUDAStream(tensor.get_device())) {
    check_driver();
    if (run_bytes > 0) {
      cudaFuncAttributes compiled;
      C10_CUDA_CHECK(cudaFuncGetAttributes(&compiled, measure<float, Layers<MeasuredLayer, kArgumentBytes[0]>>));
      waits = compiled.binaryVersion >= 90 && compiled.ptxVersion >= 90;
    }
  }

  template <typename... Params, typename... Arguments>
  void operator()(void (*kernel)(Params...), int blocks, const Arguments&... arguments) const {
    cudaLaunchAttribute may_overlap{};
    may_overlap.id = cudaLaunchAttributeProgrammaticStreamSerialization;
    may_overlap.val.programmaticStreamSerializationAllowed = 1;
    cudaLaunchConfig_t config{};
    config.gridDim = dim3(blocks);
    config.blockDim = dim3(kThreads);
    config.stream = stream;
    config.attrs = &may_overlap;
    config.numAttrs = waits ? 1 : 0;
    C10_CUDA_CHECK(cudaLaunchKernelEx(&config, kernel, arguments...));
  }

  c10::cuda::CUDAGuard guard;
  c10::cuda::CUDAStream stream;
  bool waits = false;  // whether kernels wait by themselves for those launched before, and so may begin early
};

at::Tensor new_vector(const at::Tensor& like, int64_t size, c10::ScalarType dtype) {
  return like.new_empty({size}, like.options().dtype(dtype));
}

// Those of layers of T.
template <typename T>
compute_type<T>* data_of_ratios(const at::Tensor& ratios) {
  return ratios.mutable_data_ptr<compute_type<T>>();
}

template <typename T>
const T* data_of(const std::optional<at::Tensor>& scale) {
  return scale.has_value() ? scale->const_data_ptr<T>() : nullptr;
}

// Partial sums of squares of tensors, with what is added to them.
at::Tensor measure_alone(const Launch& launch, at::TensorList tensors, const float* inv_scale = nullptr,
                         const Addends& addends = {}) {
  std::vector<Pair> swept;
  std::vector<MeasuredLayer> layers;
  swept.reserve(tensors.size());
  layers.reserve(tensors.size());
  for (size_t i = 0; i < tensors.size(); ++i) {
    const bool has_addends = !addends.scales.empty();
    const double scale = has_addends ? addends.scales[i] : 0;
    const Pair& pair = swept.emplace_back(tensors[i], has_addends ? addends.others[i] : tensors[i], scale);
    layers.push_back({real_numel(tensors[i]), pair.param->defined() ? pair.param->const_data_ptr() : nullptr,
                      pair.grad->const_data_ptr(), scale});
  }
  const at::Tensor partials = new_vector(tensors[0], count_chunks<MeasuredLayer>(layers), c10::kDouble);
  TORCHLARS_DISPATCH(real_dtype(*swept[0].grad), "squared_norms", [&] {
    launch_measure<scalar_t>(launch, layers, {nullptr, partials.mutable_data_ptr<double>()}, inv_scale);
  });
  return partials;
}

// Parameters and gradients, with scales[i] * params[i] added to these unless scales is empty, and the partial sums of
// their squares that trust ratios are decided from.
class Norms {
 public:
  // measure_and() measures both in one launch, if they are of one dtype and no parameter that is added was copied into
  // its gradient's memory order. Else the sums would be in another order than those of squared_norms, and so would the
  // bits: then two launches measure them here.
  Norms(const Launch& launch, at::TensorList grads, at::TensorList params, const float* inv_scale,
        at::ArrayRef<double> scales)
      : launch_(launch), inv_scale_(inv_scale), num_layers_(static_cast<int64_t>(grads.size())) {
    if (!add_layers(grads, params, scales)) {
      layers_.clear();
      params_ = measure_alone(launch, params);
      grads_ = measure_alone(launch, grads, inv_scale, {params, scales});
      return;
    }
    params_ = new_vector(grads[0], count_chunks<MeasuredLayer>(layers_), c10::kDouble);
    grads_ = new_vector(grads[0], count_chunks<MeasuredLayer>(layers_), c10::kDouble);
  }

  // Measures, and calls apply(range of layers, their partial sums) until all layers were served.
  template <typename Apply>
  void measure_and(const Apply& apply) const {
    const Partials partials{params_.mutable_data_ptr<double>(), grads_.mutable_data_ptr<double>()};
    if (layers_.empty()) {
      return apply(Range{0, num_layers_}, partials);
    }
    TORCHLARS_DISPATCH(real_dtype(*swept_[0].grad), "squared_norms", [&] {
      for (const Range run : runs(sizeof(scalar_t))) {
        launch_measure<scalar_t>(launch_, {layers_, run}, partials, inv_scale_);
        apply(run, partials);  // before the next run overwrites them
      }
    });
  }

 private:
  bool add_layers(at::TensorList grads, at::TensorList params, at::ArrayRef<double> scales) {
    if (grads[0].scalar_type() != params[0].scalar_type()) {
      return false;
    }
    swept_.reserve(grads.size());
    layers_.reserve(grads.size());
    for (size_t i = 0; i < grads.size(); ++i) {
      const double scale = scales.empty() ? 0 : scales[i];
      Pair& pair = swept_.emplace_back(grads[i], params[i], scale);
      if (scale == 0) {
        pair.param = dense(params[i]);  // in whatever order: the two are not added
      } else if (!pair.param->is_same(params[i])) {
        return false;
      }
      layers_.push_back({real_numel(grads[i]), pair.param->const_data_ptr(), pair.grad->const_data_ptr(), scale});
    }
    return true;
  }

  std::vector<Range> runs(size_t itemsize) const {
    if (run_bytes == 0) {
      return {{0, num_layers_}};
    }
    std::vector<int64_t> sizes;
    for (const MeasuredLayer& layer : layers_) {
      sizes.push_back(2 * layer.numel * static_cast<int64_t>(itemsize));
    }
    return runs_within(sizes, run_bytes);
  }

  const Launch& launch_;
  const float* inv_scale_;
  int64_t num_layers_;
  std::vector<Pair> swept_;
  std::vector<MeasuredLayer> layers_;  // empty: all is measured already
  at::Tensor params_, grads_;
};

// Sets what a kernel that decides by itself takes of each layer. lrs: empty where none is needed.
template <typename AnyLayer>
void set_numbers(std::vector<AnyLayer>& layers, at::ArrayRef<double> trust_coefs, at::ArrayRef<double> eps,
                 at::ArrayRef<double> lrs) {
  for (size_t i = 0; i < layers.size(); ++i) {
    layers[i].trust_coef = trust_coefs[i];
    layers[i].eps = eps[i];
    if (!lrs.empty()) {
      layers[i].lr = lrs[i];
    }
  }
}

// Gradients and parameters as one sweep takes them, and the layers that point into them.
struct Sweep {
  Sweep(at::TensorList grads, at::TensorList params, at::ArrayRef<double> weight_decays) {
    pairs.reserve(grads.size());
    layers.reserve(grads.size());
    for (size_t i = 0; i < grads.size(); ++i) {
      const Pair& pair = pairs.emplace_back(grads[i], params[i], weight_decays[i]);
      layers.push_back({real_numel(*pair.grad), pair.param->defined() ? pair.param->const_data_ptr() : nullptr,
                        pair.grad->mutable_data_ptr(), weight_decays[i]});
    }
  }

  c10::ScalarType dtype() const { return real_dtype(*pairs[0].grad); }

  void write_back_to(at::TensorList grads) const {
    for (size_t i = 0; i < grads.size(); ++i) {
      write_back(pairs[i].grad, grads[i]);
    }
  }

  std::vector<Pair> pairs;
  std::vector<Layer> layers;
};

// The same for a step of SGD.
struct SgdSweep {
  explicit SgdSweep(const SgdArguments& arguments)
      : arguments(arguments), options{arguments.nesterov, arguments.maximize, data_of<double>(arguments.lr_scale)} {
    options.inv_scale = data_of<float>(arguments.inv_scale);
    triples.reserve(arguments.params.size());
    layers.reserve(arguments.params.size());
    const bool has_momentum = !arguments.momentum_buffers.empty();
    for (size_t i = 0; i < arguments.params.size(); ++i) {
      const Triple& triple = triples.emplace_back(arguments.params[i], arguments.grads[i],
                                                  has_momentum ? &arguments.momentum_buffers[i] : nullptr);
      SgdLayer& layer = layers.emplace_back();
      layer.numel = real_numel(*triple.param);
      layer.param = triple.param->mutable_data_ptr();
      layer.grad = triple.grad->const_data_ptr();
      layer.momentum_buffer = has_momentum ? triple.momentum->mutable_data_ptr() : nullptr;
      layer.weight_decay = arguments.weight_decays[i];
      layer.lr = arguments.lrs[i];
      layer.momentum = arguments.momentums[i];
      layer.dampening = arguments.dampenings[i];
    }
  }

  // Calls run(a number of the parameters' type, one of the momentum's type).
  template <typename Run>
  void dispatch(const Run& run) const {
    const Triple& first = triples[0];
    const auto dtype = real_dtype(*first.param);
    const bool one_dtype = !first.momentum->defined() || real_dtype(*first.momentum) == dtype;
    TORCHLARS_DISPATCH(dtype, "sgd_", [&] {
      if (one_dtype) {
        run(scalar_t(), scalar_t());
      } else {
        run(scalar_t(), compute_type<scalar_t>());
      }
    });
  }

  void write_back() const {
    for (size_t i = 0; i < triples.size(); ++i) {
      torchlars::write_back(triples[i].param, arguments.params[i]);
      if (triples[i].momentum->defined()) {
        torchlars::write_back(triples[i].momentum, arguments.momentum_buffers[i]);
      }
    }
  }

  const SgdArguments& arguments;
  SgdOptions options;
  std::vector<Triple> triples;
  std::vector<SgdLayer> layers;
};

// Squared norms of tensors times inv_scale, with what is added to them.
at::Tensor squared_norms_with(at::TensorList tensors, const float* inv_scale, const Addends& addends) {
  const Launch launch(tensors[0]);
  const at::Tensor partials = measure_alone(launch, tensors, inv_scale, addends);
  std::vector<MeasuredLayer> layers;
  for (const at::Tensor& tensor : tensors) {
    layers.push_back({real_numel(tensor)});
  }
  const at::Tensor result = new_vector(tensors[0], static_cast<int64_t>(tensors.size()), c10::kDouble);
  launch_add_partials(launch, layers, partials.const_data_ptr<double>(), result.mutable_data_ptr<double>(), inv_scale);
  return result;
}

at::Tensor squared_norms(at::TensorList tensors, const std::optional<at::Tensor>& inv_scale) {
  at::AutoDispatchBelowADInplaceOrView no_autograd;
  check_tensors("squared_norms", "tensors", tensors);
  check_inv_scale("squared_norms", inv_scale, tensors[0].device());
  return squared_norms_with(tensors, data_of<float>(inv_scale), {});
}

at::Tensor squared_norms_of_sums(at::TensorList tensors, at::TensorList others, at::ArrayRef<double> scales,
                                 const std::optional<at::Tensor>& inv_scale) {
  at::AutoDispatchBelowADInplaceOrView no_autograd;
  check_sums("squared_norms_of_sums", tensors, others, scales);
  check_inv_scale("squared_norms_of_sums", inv_scale, tensors[0].device());
  return squared_norms_with(tensors, data_of<float>(inv_scale), {others, scales});
}

at::Tensor trust_ratios(const at::Tensor& param_squared_norms, const at::Tensor& grad_squared_norms,
                        at::ArrayRef<double> weight_decays, at::ArrayRef<double> trust_coefs, at::ArrayRef<double> eps,
                        at::ScalarType dtype, at::ArrayRef<double> lrs, const std::optional<at::Tensor>& lr_scale,
                        bool clip, bool of_updates) {
  at::AutoDispatchBelowADInplaceOrView no_autograd;
  check_trust_ratios(param_squared_norms, grad_squared_norms, weight_decays, trust_coefs, eps, dtype, {lrs, lr_scale},
                     clip || of_updates);
  const Launch launch(param_squared_norms);
  std::vector<Layer> layers(weight_decays.size());
  for (size_t i = 0; i < layers.size(); ++i) {
    layers[i].weight_decay = weight_decays[i];
  }
  set_numbers(layers, trust_coefs, eps, lrs);
  LarsOptions options{{/*decayed_norm=*/false, clip, of_updates}};
  options.lr_scale = data_of<double>(lr_scale);
  const at::Tensor ratios = new_vector(param_squared_norms, static_cast<int64_t>(layers.size()), dtype);
  AT_DISPATCH_FLOATING_TYPES(dtype, "trust_ratios", [&] {
    launch_decide<scalar_t>(launch, layers, param_squared_norms.const_data_ptr<double>(),
                            grad_squared_norms.const_data_ptr<double>(), ratios.mutable_data_ptr<scalar_t>(), options);
  });
  return ratios;
}

void apply_trust_ratios_(at::TensorList grads, at::TensorList params, const at::Tensor& ratios,
                         at::ArrayRef<double> weight_decays, bool maximize, at::ArrayRef<double> lrs,
                         const std::optional<at::Tensor>& lr_scale, const std::optional<at::Tensor>& inv_scale) {
  const char* op = "apply_trust_ratios_";
  at::AutoDispatchBelowADInplaceOrView no_autograd;
  check_layers(op, grads, params, weight_decays, /*equal_shapes=*/false);
  check_writable(op, "grads", grads);
  check_ratios(op, ratios, grads, params);
  check_lrs(op, grads.size(), "grads", {lrs, lr_scale}, grads[0].device(), /*are_needed=*/false);
  check_inv_scale(op, inv_scale, grads[0].device());
  const Launch launch(grads[0]);
  Sweep sweep(grads, params, weight_decays);
  for (size_t i = 0; i < lrs.size(); ++i) {
    sweep.layers[i].lr = lrs[i];
  }
  const LarsOptions options{
      {}, maximize, /*lr_in_momentum=*/!lrs.empty(), data_of<double>(lr_scale), data_of<float>(inv_scale)};
  TORCHLARS_DISPATCH(sweep.dtype(), "apply_trust_ratios_", [&] {
    launch_apply<scalar_t>(launch, sweep.layers, {}, data_of_ratios<scalar_t>(ratios), options);
  });
  sweep.write_back_to(grads);
}

at::Tensor scale_by_trust_ratios_(at::TensorList grads, at::TensorList params, at::ArrayRef<double> weight_decays,
                                  at::ArrayRef<double> trust_coefs, at::ArrayRef<double> eps, bool maximize,
                                  at::ArrayRef<double> lrs, const std::optional<at::Tensor>& lr_scale,
                                  bool decayed_norm, bool clip, bool lr_in_momentum,
                                  const std::optional<at::Tensor>& inv_scale) {
  const char* op = "scale_by_trust_ratios_";
  at::AutoDispatchBelowADInplaceOrView no_autograd;
  check_layers(op, grads, params, weight_decays, /*equal_shapes=*/true);
  check_writable(op, "grads", grads);
  check_hyper_parameters(op, grads.size(), "grads", weight_decays, trust_coefs, eps);
  check_lrs(op, grads.size(), "grads", {lrs, lr_scale}, grads[0].device(), clip || lr_in_momentum);
  check_inv_scale(op, inv_scale, grads[0].device());
  const Launch launch(grads[0]);
  const LarsOptions options{
      {decayed_norm, clip}, maximize, lr_in_momentum, data_of<double>(lr_scale), data_of<float>(inv_scale)};
  const Norms norms(launch, grads, params, options.inv_scale, scales_of(weight_decays, maximize, options.ratio));
  Sweep sweep(grads, params, weight_decays);
  set_numbers(sweep.layers, trust_coefs, eps, lrs);
  const at::Tensor ratios = new_vector(grads[0], static_cast<int64_t>(grads.size()),
                                       compute_dtype(grads[0].scalar_type(), params[0].scalar_type()));
  norms.measure_and([&](Range run, Partials partials) {
    TORCHLARS_DISPATCH(sweep.dtype(), "scale_by_trust_ratios_", [&] {
      launch_apply<scalar_t>(launch, {sweep.layers, run}, partials, data_of_ratios<scalar_t>(ratios) + run.begin,
                             options);
    });
  });
  sweep.write_back_to(grads);
  return ratios;
}

void apply_trust_ratios_to_updates_(at::TensorList params, at::TensorList old_params, const at::Tensor& ratios) {
  const char* op = "apply_trust_ratios_to_updates_";
  at::AutoDispatchBelowADInplaceOrView no_autograd;
  check_updates(op, params, old_params);
  check_ratios(op, ratios, params, old_params, "params");
  const Launch launch(params[0]);
  const Sweep sweep(params, old_params, std::vector<double>(params.size(), 1));
  TORCHLARS_DISPATCH(sweep.dtype(), "apply_trust_ratios_to_updates_", [&] {
    launch_apply_to_updates<scalar_t>(launch, sweep.layers, {}, data_of_ratios<scalar_t>(ratios), {});
  });
  sweep.write_back_to(params);
}

at::Tensor scale_updates_by_trust_ratios_(at::TensorList params, at::TensorList old_params,
                                          at::ArrayRef<double> trust_coefs, at::ArrayRef<double> eps,
                                          at::ArrayRef<double> lrs, bool clip,
                                          const std::optional<at::Tensor>& lr_scale) {
  const char* op = "scale_updates_by_trust_ratios_";
  at::AutoDispatchBelowADInplaceOrView no_autograd;
  check_updates(op, params, old_params);
  check_hyper_parameters(op, params.size(), "params", std::vector<double>(params.size()), trust_coefs, eps);
  check_lrs(op, params.size(), "params", {lrs, lr_scale}, params[0].device(), /*are_needed=*/true);
  const Launch launch(params[0]);
  const Norms norms(launch, params, old_params, /*inv_scale=*/nullptr, std::vector<double>(params.size(), -1));
  Sweep sweep(params, old_params, std::vector<double>(params.size(), 1));
  for (Layer& layer : sweep.layers) {
    layer.weight_decay = 0;
  }
  set_numbers(sweep.layers, trust_coefs, eps, lrs);
  LarsOptions options{{/*decayed_norm=*/false, clip, /*of_updates=*/true}};
  options.lr_scale = data_of<double>(lr_scale);
  const at::Tensor ratios = new_vector(params[0], static_cast<int64_t>(params.size()),
                                       compute_dtype(params[0].scalar_type(), old_params[0].scalar_type()));
  norms.measure_and([&](Range run, Partials partials) {
    TORCHLARS_DISPATCH(sweep.dtype(), "scale_updates_by_trust_ratios_", [&] {
      launch_apply_to_updates<scalar_t>(launch, {sweep.layers, run}, partials,
                                        data_of_ratios<scalar_t>(ratios) + run.begin, options);
    });
  });
  sweep.write_back_to(params);
  return ratios;
}

void sgd_(at::TensorList params, at::TensorList grads, at::TensorList momentum_buffers,
          const std::optional<at::Tensor>& ratios, at::ArrayRef<double> weight_decays, at::ArrayRef<double> lrs,
          at::ArrayRef<double> momentums, at::ArrayRef<double> dampenings, bool nesterov, bool maximize,
          const std::optional<at::Tensor>& lr_scale, const std::optional<at::Tensor>& inv_scale) {
  at::AutoDispatchBelowADInplaceOrView no_autograd;
  const SgdArguments sgd{params,     grads,    momentum_buffers, weight_decays, lrs,      momentums,
                         dampenings, nesterov, maximize,         lr_scale,      inv_scale};
  check_sgd("sgd_", sgd);
  if (ratios.has_value()) {
    check_ratios("sgd_", *ratios, grads, params);
  }
  const Launch launch(params[0]);
  const SgdSweep sweep(sgd);
  sweep.dispatch([&](auto param, auto momentum) {
    using T = decltype(param);
    using M = decltype(momentum);
    auto* given = ratios.has_value() ? data_of_ratios<T>(*ratios) : nullptr;
    launch_update<T, M>(launch, sweep.layers, {}, given, sweep.options);
  });
  sweep.write_back();
}

at::Tensor lars_sgd_(at::TensorList params, at::TensorList grads, at::TensorList momentum_buffers,
                     at::ArrayRef<double> weight_decays, at::ArrayRef<double> trust_coefs, at::ArrayRef<double> eps,
                     at::ArrayRef<double> lrs, at::ArrayRef<double> momentums, at::ArrayRef<double> dampenings,
                     bool nesterov, bool maximize, const std::optional<at::Tensor>& lr_scale, bool decayed_norm,
                     bool clip, bool lr_in_momentum, const std::optional<at::Tensor>& inv_scale) {
  at::AutoDispatchBelowADInplaceOrView no_autograd;
  const SgdArguments sgd{params,     grads,    momentum_buffers, weight_decays, lrs,      momentums,
                         dampenings, nesterov, maximize,         lr_scale,      inv_scale};
  check_sgd("lars_sgd_", sgd);
  check_hyper_parameters("lars_sgd_", grads.size(), "grads", weight_decays, trust_coefs, eps);
  const Launch launch(params[0]);
  SgdSweep sweep(sgd);
  sweep.options.ratio = {decayed_norm, clip};
  sweep.options.lr_in_momentum = lr_in_momentum;
  set_numbers(sweep.layers, trust_coefs, eps, {});
  const Norms norms(launch, grads, params, sweep.options.inv_scale,
                    scales_of(weight_decays, maximize, sweep.options.ratio));
  const at::Tensor ratios = new_vector(grads[0], static_cast<int64_t>(grads.size()),
                                       compute_dtype(grads[0].scalar_type(), params[0].scalar_type()));
  norms.measure_and([&](Range run, Partials partials) {
    sweep.dispatch([&](auto param, auto momentum) {
      using T = decltype(param);
      using M = decltype(momentum);
      launch_update<T, M>(launch, {sweep.layers, run}, partials, data_of_ratios<T>(ratios) + run.begin, sweep.options);
    });
  });
  sweep.write_back();
  return ratios;
}

}  // namespace

void set_run_bytes(int64_t bytes) { run_bytes = bytes; }

TORCH_LIBRARY_IMPL(torchlars, CUDA, m) {
  m.impl("squared_norms", squared_norms);
  m.impl("squared_norms_of_sums", squared_norms_of_sums);
  m.impl("trust_ratios", trust_ratios);
  m.impl("apply_trust_ratios_", apply_trust_ratios_);
  m.impl("scale_by_trust_ratios_", scale_by_trust_ratios_);
  m.impl("apply_trust_ratios_to_updates_", apply_trust_ratios_to_updates_);
  m.impl("scale_updates_by_trust_ratios_", scale_updates_by_trust_ratios_);
  m.impl("sgd_", sgd_);
  m.impl("lars_sgd_", lars_sgd_);
}

}  // namespace torchlars::cuda
