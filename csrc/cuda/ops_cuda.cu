// The ops on a GPU: temporaries and launches, on the current stream, without waiting for it.
#include <ATen/Dispatch.h>
#include <ATen/core/Tensor.h>
#include <c10/cuda/CUDAException.h>
#include <c10/cuda/CUDAGuard.h>
#include <c10/cuda/CUDAStream.h>

#include <atomic>

#include "../arguments.h"
#include "../layers.h"
#include "adam.cuh"
#include "kernels.cuh"
#include "launches.h"

namespace torchlars::cuda {
namespace {

#define TORCHLARS_DISPATCH(TYPE, NAME, ...) \
  AT_DISPATCH_FLOATING_TYPES_AND2(c10::kBFloat16, c10::kHalf, TYPE, NAME, __VA_ARGS__)

// The bytes of tensors that are measured and scaled at once; 0 is all layers. See set_run_bytes.
std::atomic<int64_t> run_bytes = 0;

// With too old a driver a launch fails with an error that does not name the cause.
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

// Launches kernels on the current stream of a tensor's device. Makes that device the current one while it lives.
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
  bool waits = false;  // whether kernels wait for earlier ones by themselves, and so may overlap them
};

at::Tensor new_vector(const at::Tensor& like, int64_t size, c10::ScalarType dtype) {
  return like.new_empty({size}, like.options().dtype(dtype));
}

// The trust ratios of layers of T, from one layer on; null if there are none.
template <typename T>
compute_type<T>* data_of_ratios(const std::optional<at::Tensor>& ratios, int64_t first_layer) {
  return ratios.has_value() ? ratios->mutable_data_ptr<compute_type<T>>() + first_layer : nullptr;
}

template <typename T>
const T* data_of(const std::optional<at::Tensor>& scale) {
  return scale.has_value() ? scale->const_data_ptr<T>() : nullptr;
}

// Partial sums of squares of tensors, after addends were added.
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

// Layers that are measured and scaled at once, given the bytes of an element of all that is read for both.
template <typename AnyLayer>
std::vector<Range> runs_of(const std::vector<AnyLayer>& layers, size_t bytes) {
  if (run_bytes == 0) {
    return {{0, static_cast<int64_t>(layers.size())}};
  }
  std::vector<int64_t> sizes;
  sizes.reserve(layers.size());
  for (const AnyLayer& layer : layers) {
    sizes.push_back(layer.numel * static_cast<int64_t>(bytes));
  }
  return runs_within(sizes, run_bytes);
}

// Increments steps of Adam, unless the step is skipped.
void increment(const Launch& launch, at::TensorList steps, const float* inv_scale) {
  std::vector<MeasuredLayer> layers(steps.size());
  for (size_t i = 0; i < steps.size(); ++i) {
    layers[i].step = steps[i].mutable_data_ptr<float>();
  }
  launch_measure<float>(launch, layers, {}, inv_scale);
}

// Partial sums of squares of parameters and gradients, from which trust ratios are decided. scales[i] * params[i] is
// added to gradients unless scales is empty. steps, if given, are incremented beside.
class Norms {
 public:
  // measure_and() measures both in one launch if they are of one dtype and no parameter that is added was copied into
  // its gradient's memory order. Else that would sum in another order than squared_norms, and give other bits: two
  // launches measure them here instead.
  Norms(const Launch& launch, at::TensorList grads, at::TensorList params, const float* inv_scale,
        at::ArrayRef<double> scales, at::TensorList steps)
      : launch_(launch), inv_scale_(inv_scale), num_layers_(static_cast<int64_t>(grads.size())) {
    if (!add_layers(grads, params, scales)) {
      layers_.clear();
      if (!steps.empty()) {
        increment(launch, steps, inv_scale);
      }
      params_ = measure_alone(launch, params);
      grads_ = measure_alone(launch, grads, inv_scale, {params, scales});
      return;
    }
    for (size_t i = 0; i < steps.size(); ++i) {
      layers_[i].step = steps[i].mutable_data_ptr<float>();
    }
    params_ = new_vector(grads[0], count_chunks<MeasuredLayer>(layers_), c10::kDouble);
    grads_ = new_vector(grads[0], count_chunks<MeasuredLayer>(layers_), c10::kDouble);
  }

  // Calls apply(range of layers, their partial sums) after these were measured, until all layers are done.
  template <typename Apply>
  void measure_and(const Apply& apply) const {
    const Partials partials{params_.mutable_data_ptr<double>(), grads_.mutable_data_ptr<double>()};
    if (layers_.empty()) {
      return apply(Range{0, num_layers_}, partials);
    }
    TORCHLARS_DISPATCH(real_dtype(*swept_[0].grad), "squared_norms", [&] {
      for (const Range run : runs_of(layers_, 2 * sizeof(scalar_t))) {
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
        pair.param = dense(params[i]);  // in any memory order, as the two are not added
      } else if (!pair.param->is_same(params[i])) {
        return false;
      }
      layers_.push_back({real_numel(grads[i]), pair.param->const_data_ptr(), pair.grad->const_data_ptr(), scale});
    }
    return true;
  }

  const Launch& launch_;
  const float* inv_scale_;
  int64_t num_layers_;
  std::vector<Pair> swept_;
  std::vector<MeasuredLayer> layers_;  // empty: measured by the constructor
  at::Tensor params_, grads_;
};

// Sets the numbers by which kernels decide the trust ratio of each layer.
template <typename AnyLayer, typename Arguments>
void set_numbers(std::vector<AnyLayer>& layers, const Arguments& arguments) {
  for (size_t i = 0; i < layers.size(); ++i) {
    if (!arguments.trust_coefs.empty()) {
      layers[i].trust_coef = arguments.trust_coefs[i];
      layers[i].eps = arguments.eps[i];
    }
    if (!arguments.lrs.empty()) {
      layers[i].lr = arguments.lrs[i];
    }
  }
}

// What all layers of scale_gradients_, sgd_ or adam_ have in common, as far as these take the same.
template <typename Options, typename Arguments>
Options options_of(const Arguments& arguments) {
  Options options;
  options.ratio = ratio_options(arguments);
  options.maximize = arguments.maximize;
  options.lr_tensor = data_of<double>(arguments.lr_tensor);
  options.inv_scale = data_of<float>(arguments.inv_scale);
  return options;
}

// Gradients and parameters that are scaled together, and the kernels' layers that point to them.
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

// The same of a step of SGD.
struct SgdSweep {
  explicit SgdSweep(const SgdArguments& arguments) : arguments(arguments), options(options_of<SgdOptions>(arguments)) {
    options.lr_in_momentum = arguments.lr_in_momentum;
    options.nesterov = arguments.nesterov;
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
      layer.momentum = arguments.momentums[i];
      layer.dampening = arguments.dampenings[i];
    }
    set_numbers(layers, arguments);
    for (size_t i = 0; is_coded() && i < layers.size(); ++i) {
      coded_layers.push_back(
          {layers[i], (*arguments.momentum_scales)[i].mutable_data_ptr<float>(), rows_of(arguments, i)});
    }
  }

  bool is_coded() const { return arguments.momentum_scales.has_value(); }

  // Calls run(a number of the parameters' type, one of the momentum's type).
  template <typename Run>
  void dispatch(const Run& run) const {
    const Triple& first = triples[0];
    const auto dtype = real_dtype(*first.param);
    const bool one_dtype = !first.momentum->defined() || real_dtype(*first.momentum) == dtype;
    TORCHLARS_DISPATCH(dtype, "sgd_", [&] {
      if (is_coded()) {
        using T = std::conditional_t<std::is_same_v<scalar_t, double>, float, scalar_t>;  // double is never coded
        run(T(), int8_t());
      } else if (one_dtype) {
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
      if (is_coded()) {
        note_write((*arguments.momentum_scales)[i]);
      }
    }
  }

  const SgdArguments& arguments;
  SgdOptions options;
  std::vector<Triple> triples;
  std::vector<SgdLayer> layers;
  std::vector<CodedSgdLayer> coded_layers;  // the same, where momentum is in 8 bits
};

// The same of a step of Adam.
struct AdamSweep {
  explicit AdamSweep(const AdamArguments& arguments)
      : arguments(arguments), options(options_of<AdamOptions>(arguments)) {
    options.ratio.of_updates = arguments.of_updates;
    options.decoupled_weight_decay = arguments.decoupled_weight_decay;
    options.beta1 = arguments.beta1;
    options.beta2 = arguments.beta2;
    options.adam_eps = arguments.adam_eps;
    tensors.reserve(arguments.params.size());
    layers.reserve(arguments.params.size());
    for (size_t i = 0; i < arguments.params.size(); ++i) {
      const AdamTensors& swept = tensors.emplace_back(arguments, i);
      AdamLayer& layer = layers.emplace_back();
      layer.numel = real_numel(*swept.param);
      layer.param = swept.param->mutable_data_ptr();
      layer.grad = has_grads() ? swept.grad->const_data_ptr() : nullptr;
      layer.exp_avg = swept.exp_avg->mutable_data_ptr();
      layer.exp_avg_sq = swept.exp_avg_sq->mutable_data_ptr();
      layer.step = arguments.steps[i].mutable_data_ptr<float>();
      layer.weight_decay = arguments.weight_decays[i];
    }
    set_numbers(layers, arguments);
  }

  bool has_grads() const { return !arguments.grads.empty(); }

  // Calls run(a number of the parameters' type, one of the moments' type).
  template <typename Run>
  void dispatch(const Run& run) const {
    const auto dtype = real_dtype(*tensors[0].param);
    TORCHLARS_DISPATCH(dtype, "adam_", [&] {
      real_dtype(*tensors[0].exp_avg) == dtype ? run(scalar_t(), scalar_t())
                                               : run(scalar_t(), compute_type<scalar_t>());
    });
  }

  // Updates the moments of layers, and fills their partial sums.
  void measure(const Launch& launch, Range run, Partials partials) const {
    dispatch([&](auto param, auto moment) {
      launch_measure_adam<decltype(param), decltype(moment)>(launch, {layers, run}, partials, options);
    });
  }

  void write_back() const {
    for (size_t i = 0; i < tensors.size(); ++i) {
      if (!arguments.squared_norms.has_value()) {
        torchlars::write_back(tensors[i].param, arguments.params[i]);
      }
      if (has_grads()) {
        torchlars::write_back(tensors[i].exp_avg, arguments.exp_avgs[i]);
        torchlars::write_back(tensors[i].exp_avg_sq, arguments.exp_avg_sqs[i]);
        note_write(arguments.steps[i]);
      }
    }
  }

  const AdamArguments& arguments;
  AdamOptions options;
  std::vector<AdamTensors> tensors;
  std::vector<AdamLayer> layers;
};

// The first part of a step of Adam, whose trust ratios are decided elsewhere.
void measure_updates(const AdamSweep& sweep, const Launch& launch, const at::Tensor& squared_norms) {
  const at::TensorList params = sweep.arguments.params;
  increment(launch, sweep.arguments.steps, sweep.options.inv_scale);
  const int64_t chunks = count_chunks<AdamLayer>(sweep.layers);
  const at::Tensor partials = new_vector(params[0], 2 * chunks, c10::kDouble);
  auto* const of_params = partials.mutable_data_ptr<double>();
  sweep.measure(launch, {0, static_cast<int64_t>(params.size())}, {of_params, of_params + chunks});
  std::vector<MeasuredLayer> layers;
  for (int list = 0; list < 2; ++list) {
    for (const AdamLayer& layer : sweep.layers) {
      layers.push_back({layer.numel});
    }
  }
  launch_add_partials(launch, layers, of_params, squared_norms.mutable_data_ptr<double>(), /*inv_scale=*/nullptr);
  note_write(squared_norms);
}

// Calls apply(range of layers, their partial sums) after the updates of these were measured, until all are done.
template <typename Apply>
void measure_updates_and(const AdamSweep& sweep, const Launch& launch, const Apply& apply) {
  const at::Tensor& like = sweep.arguments.params[0];
  const int64_t chunks = count_chunks<AdamLayer>(sweep.layers);
  const at::Tensor of_params = new_vector(like, chunks, c10::kDouble), of_updates = of_params.new_empty({chunks});
  const at::Tensor steps = new_vector(like, chunks, c10::kFloat);
  const Partials partials{of_params.mutable_data_ptr<double>(), of_updates.mutable_data_ptr<double>(),
                          steps.mutable_data_ptr<float>()};
  const AdamTensors& first = sweep.tensors[0];
  const size_t bytes = 2 * (c10::elementSize(real_dtype(*first.param)) + c10::elementSize(real_dtype(*first.exp_avg)));
  for (const Range run : runs_of(sweep.layers, bytes)) {
    sweep.measure(launch, run, partials);
    apply(run, partials);  // before the next run overwrites them
  }
  note_write(*sweep.arguments.ratios);
}

// Calls apply(range of layers, their partial sums), after the layers were measured; or, where ratios are given or all
// 1, once for all layers and without partial sums. steps: of Adam, which are incremented before.
template <typename Arguments, typename Apply>
void measure_and_apply(const Arguments& arguments, const Launch& launch, at::TensorList grads, at::TensorList params,
                       const float* inv_scale, at::ArrayRef<double> scales, const Apply& apply,
                       at::TensorList steps = {}) {
  if (measures(arguments)) {
    Norms(launch, grads, params, inv_scale, scales, steps).measure_and(apply);
    note_write(*std::optional<at::Tensor>(arguments.ratios));
  } else {
    if (!steps.empty()) {
      increment(launch, steps, inv_scale);
    }
    apply(Range{0, static_cast<int64_t>(params.size())}, Partials{});
  }
}

}  // namespace

at::Tensor squared_norms(const SquaredNormsArguments& arguments) {
  const at::TensorList tensors = arguments.tensors;
  const float* const inv_scale = data_of<float>(arguments.inv_scale);
  const Launch launch(tensors[0]);
  const at::Tensor partials =
      measure_alone(launch, tensors, inv_scale, {arguments.others.value_or(tensors), arguments.scales});
  std::vector<MeasuredLayer> layers;
  for (const at::Tensor& tensor : tensors) {
    layers.push_back({real_numel(tensor)});
  }
  const at::Tensor result = new_vector(tensors[0], static_cast<int64_t>(tensors.size()), c10::kDouble);
  launch_add_partials(launch, layers, partials.const_data_ptr<double>(), result.mutable_data_ptr<double>(), inv_scale);
  return result;
}

at::Tensor trust_ratios(const TrustRatiosArguments& arguments) {
  const at::Tensor& param_squared_norms = arguments.param_squared_norms;
  const Launch launch(param_squared_norms);
  std::vector<Layer> layers(arguments.weight_decays.size());
  for (size_t i = 0; i < layers.size(); ++i) {
    layers[i].weight_decay = arguments.weight_decays[i];
  }
  set_numbers(layers, arguments);
  LarsOptions options;
  options.ratio.clip = arguments.clip;
  options.ratio.of_updates = arguments.of_updates;
  options.lr_tensor = data_of<double>(arguments.lr_tensor);
  const at::Tensor ratios = new_vector(param_squared_norms, static_cast<int64_t>(layers.size()), arguments.dtype);
  AT_DISPATCH_FLOATING_TYPES(arguments.dtype, "trust_ratios", [&] {
    launch_decide<scalar_t>(launch, layers, param_squared_norms.const_data_ptr<double>(),
                            arguments.grad_squared_norms.const_data_ptr<double>(), ratios.mutable_data_ptr<scalar_t>(),
                            options);
  });
  return ratios;
}

void scale_gradients_(const ScaleGradientsArguments& arguments) {
  const Launch launch(arguments.grads[0]);
  Sweep sweep(arguments.grads, arguments.params, arguments.weight_decays);
  set_numbers(sweep.layers, arguments);
  auto options = options_of<LarsOptions>(arguments);
  options.lr_in_momentum = arguments.lr_in_momentum;
  const auto apply = [&](Range run, Partials partials) {
    TORCHLARS_DISPATCH(sweep.dtype(), "scale_gradients_", [&] {
      launch_apply<scalar_t>(launch, {sweep.layers, run}, partials,
                             data_of_ratios<scalar_t>(arguments.ratios, run.begin), options);
    });
  };
  measure_and_apply(arguments, launch, arguments.grads, arguments.params, options.inv_scale, decays_in_norm(arguments),
                    apply);
  sweep.write_back_to(arguments.grads);
}

void scale_updates_(const ScaleUpdatesArguments& arguments) {
  const at::TensorList params = arguments.params;
  const Launch launch(params[0]);
  Sweep sweep(params, arguments.old_params, std::vector<double>(params.size(), 1));
  for (Layer& layer : sweep.layers) {
    layer.weight_decay = 0;
  }
  set_numbers(sweep.layers, arguments);
  LarsOptions options;
  options.ratio.clip = arguments.clip;
  options.ratio.of_updates = true;
  options.lr_tensor = data_of<double>(arguments.lr_tensor);
  const auto apply = [&](Range run, Partials partials) {
    TORCHLARS_DISPATCH(sweep.dtype(), "scale_updates_", [&] {
      launch_apply_to_updates<scalar_t>(launch, {sweep.layers, run}, partials,
                                        data_of_ratios<scalar_t>(arguments.ratios, run.begin), options);
    });
  };
  measure_and_apply(arguments, launch, params, arguments.old_params, /*inv_scale=*/nullptr,
                    std::vector<double>(params.size(), -1), apply);
  sweep.write_back_to(params);
}

void sgd_(const SgdArguments& arguments) {
  const Launch launch(arguments.params[0]);
  const SgdSweep sweep(arguments);
  const auto apply = [&](Range run, Partials partials) {
    sweep.dispatch([&](auto param, auto momentum) {
      using T = decltype(param);
      using M = decltype(momentum);
      compute_type<T>* const ratios = data_of_ratios<T>(arguments.ratios, run.begin);
      if constexpr (std::is_same_v<M, int8_t>) {
        launch_update<T, M>(launch, Slice<CodedSgdLayer>(sweep.coded_layers, run), partials, ratios, sweep.options);
      } else {
        launch_update<T, M>(launch, Slice<SgdLayer>(sweep.layers, run), partials, ratios, sweep.options);
      }
    });
  };
  measure_and_apply(arguments, launch, arguments.grads, arguments.params, sweep.options.inv_scale,
                    decays_in_norm(arguments), apply);
  sweep.write_back();
}

void adam_(const AdamArguments& arguments) {
  const Launch launch(arguments.params[0]);
  const AdamSweep sweep(arguments);
  const auto apply = [&](Range run, Partials partials) {
    sweep.dispatch([&](auto param, auto moment) {
      using T = decltype(param);
      launch_update_adam<T, decltype(moment)>(launch, {sweep.layers, run}, partials,
                                              data_of_ratios<T>(arguments.ratios, run.begin), sweep.options);
    });
  };
  if (arguments.squared_norms.has_value()) {
    measure_updates(sweep, launch, *arguments.squared_norms);
  } else if (arguments.of_updates && measures(arguments)) {
    measure_updates_and(sweep, launch, apply);
  } else {
    const std::vector<double> scales =
        arguments.decoupled_weight_decay ? std::vector<double>() : decays_in_norm(arguments);
    measure_and_apply(arguments, launch, arguments.grads, arguments.params, sweep.options.inv_scale, scales, apply,
                      sweep.has_grads() ? arguments.steps : at::TensorList());
  }
  sweep.write_back();
}

void set_run_bytes(int64_t bytes) { run_bytes = bytes; }

}  // namespace torchlars::cuda
