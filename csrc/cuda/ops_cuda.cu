// The ops on a GPU: checks, temporaries, launches. On the current stream, without waiting for it.
#include <ATen/Dispatch.h>
#include <ATen/core/LegacyTypeDispatch.h>
#include <ATen/core/Tensor.h>
#include <c10/cuda/CUDAException.h>
#include <c10/cuda/CUDAGuard.h>
#include <c10/cuda/CUDAStream.h>
#include <torch/library.h>

#include "../checks.h"
#include "../layers.h"
#include "kernels.cuh"
#include "launches.h"

namespace torchlars::cuda {
namespace {

#define TORCHLARS_DISPATCH(TYPE, NAME, ...) \
  AT_DISPATCH_FLOATING_TYPES_AND2(c10::kBFloat16, c10::kHalf, TYPE, NAME, __VA_ARGS__)

// Launches on the current stream of the tensors' device, which it makes the current one.
struct Launch {
  explicit Launch(const at::Tensor& tensor)
      : guard(tensor.device()), stream(c10::cuda::getCurrentCUDAStream(tensor.get_device())) {}

  template <typename... Params, typename... Arguments>
  void operator()(void (*kernel)(Params...), int blocks, Arguments... arguments) const {
    kernel<<<blocks, kThreads, 0, stream>>>(arguments...);
    C10_CUDA_KERNEL_LAUNCH_CHECK();
  }

  c10::cuda::CUDAGuard guard;
  c10::cuda::CUDAStream stream;
};

at::Tensor new_vector(const at::Tensor& like, int64_t size, c10::ScalarType dtype) {
  return like.new_empty({size}, like.options().dtype(dtype));
}

// Partial sums of squares of tensors that are given as both tensors and layers.
at::Tensor measure_alone(const Launch& launch, at::TensorList tensors) {
  std::vector<Swept> swept;
  std::vector<MeasuredLayer> layers;
  swept.reserve(tensors.size());
  layers.reserve(tensors.size());
  for (const at::Tensor& tensor : tensors) {
    swept.push_back(dense(tensor));
    layers.push_back({real_numel(tensor), swept.back()->const_data_ptr()});
  }
  const at::Tensor partials = new_vector(tensors[0], count_chunks(layers), c10::kDouble);
  TORCHLARS_DISPATCH(real_dtype(tensors[0]), "squared_norms",
                     [&] { launch_measure<scalar_t>(launch, layers, partials.mutable_data_ptr<double>(), nullptr); });
  return partials;
}

// Partial sums of squares of parameters and gradients, side by side if they are of one dtype.
std::pair<at::Tensor, at::Tensor> measure_both(const Launch& launch, at::TensorList grads, at::TensorList params) {
  if (grads[0].scalar_type() != params[0].scalar_type()) {
    return {measure_alone(launch, params), measure_alone(launch, grads)};
  }
  std::vector<Swept> swept;
  std::vector<MeasuredLayer> layers;
  swept.reserve(2 * grads.size());
  layers.reserve(grads.size());
  for (size_t i = 0; i < grads.size(); ++i) {
    swept.push_back(dense(params[i]));
    swept.push_back(dense(grads[i]));
    layers.push_back({real_numel(grads[i]), swept[2 * i]->const_data_ptr(), swept[2 * i + 1]->const_data_ptr()});
  }
  const at::Tensor param_partials = new_vector(grads[0], count_chunks(layers), c10::kDouble);
  const at::Tensor grad_partials = new_vector(grads[0], count_chunks(layers), c10::kDouble);
  TORCHLARS_DISPATCH(real_dtype(grads[0]), "squared_norms", [&] {
    launch_measure<scalar_t>(launch, layers, param_partials.mutable_data_ptr<double>(),
                             grad_partials.mutable_data_ptr<double>());
  });
  return {param_partials, grad_partials};
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
      : arguments(arguments),
        options{arguments.nesterov, arguments.maximize,
                arguments.lr_scale.has_value() ? arguments.lr_scale->const_data_ptr<double>() : nullptr} {
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

at::Tensor squared_norms(at::TensorList tensors) {
  at::AutoDispatchBelowADInplaceOrView no_autograd;
  check_tensors("squared_norms", "tensors", tensors);
  const Launch launch(tensors[0]);
  const at::Tensor partials = measure_alone(launch, tensors);
  std::vector<MeasuredLayer> layers;
  for (const at::Tensor& tensor : tensors) {
    layers.push_back({real_numel(tensor)});
  }
  const at::Tensor result = new_vector(tensors[0], static_cast<int64_t>(tensors.size()), c10::kDouble);
  launch_add_partials(launch, layers, partials.const_data_ptr<double>(), result.mutable_data_ptr<double>());
  return result;
}

at::Tensor trust_ratios(const at::Tensor& param_squared_norms, const at::Tensor& grad_squared_norms,
                        at::ArrayRef<double> weight_decays, at::ArrayRef<double> trust_coefs, at::ArrayRef<double> eps,
                        at::ScalarType dtype) {
  at::AutoDispatchBelowADInplaceOrView no_autograd;
  check_trust_ratios(param_squared_norms, grad_squared_norms, weight_decays, trust_coefs, eps, dtype);
  const Launch launch(param_squared_norms);
  std::vector<Layer> layers;
  for (size_t i = 0; i < weight_decays.size(); ++i) {
    layers.push_back({0, nullptr, nullptr, weight_decays[i], trust_coefs[i], eps[i]});
  }
  const at::Tensor ratios = new_vector(param_squared_norms, static_cast<int64_t>(layers.size()), dtype);
  AT_DISPATCH_FLOATING_TYPES(dtype, "trust_ratios", [&] {
    launch_decide<scalar_t>(launch, layers, param_squared_norms.const_data_ptr<double>(),
                            grad_squared_norms.const_data_ptr<double>(), ratios.mutable_data_ptr<scalar_t>());
  });
  return ratios;
}

void apply_trust_ratios_(at::TensorList grads, at::TensorList params, const at::Tensor& ratios,
                         at::ArrayRef<double> weight_decays, bool maximize) {
  at::AutoDispatchBelowADInplaceOrView no_autograd;
  check_layers("apply_trust_ratios_", grads, params, weight_decays, /*equal_shapes=*/false);
  check_writable("apply_trust_ratios_", "grads", grads);
  check_ratios("apply_trust_ratios_", ratios, grads, params);
  const Launch launch(grads[0]);
  const Sweep sweep(grads, params, weight_decays);
  TORCHLARS_DISPATCH(sweep.dtype(), "apply_trust_ratios_", [&] {
    launch_apply<scalar_t>(launch, sweep.layers, ratios.const_data_ptr<compute_type<scalar_t>>(), maximize);
  });
  sweep.write_back_to(grads);
}

at::Tensor scale_by_trust_ratios_(at::TensorList grads, at::TensorList params, at::ArrayRef<double> weight_decays,
                                  at::ArrayRef<double> trust_coefs, at::ArrayRef<double> eps, bool maximize) {
  at::AutoDispatchBelowADInplaceOrView no_autograd;
  check_layers("scale_by_trust_ratios_", grads, params, weight_decays, /*equal_shapes=*/true);
  check_writable("scale_by_trust_ratios_", "grads", grads);
  check_hyper_parameters("scale_by_trust_ratios_", grads.size(), "grads", weight_decays, trust_coefs, eps);
  const Launch launch(grads[0]);
  const auto [param_partials, grad_partials] = measure_both(launch, grads, params);
  Sweep sweep(grads, params, weight_decays);
  for (size_t i = 0; i < grads.size(); ++i) {
    sweep.layers[i].trust_coef = trust_coefs[i];
    sweep.layers[i].eps = eps[i];
  }
  const at::Tensor ratios = new_vector(grads[0], static_cast<int64_t>(grads.size()),
                                       compute_dtype(grads[0].scalar_type(), params[0].scalar_type()));
  const auto* param_sums = param_partials.const_data_ptr<double>();
  const auto* grad_sums = grad_partials.const_data_ptr<double>();
  TORCHLARS_DISPATCH(sweep.dtype(), "scale_by_trust_ratios_", [&] {
    launch_decide_and_apply<scalar_t>(launch, sweep.layers, param_sums, grad_sums,
                                      ratios.mutable_data_ptr<compute_type<scalar_t>>(), maximize);
  });
  sweep.write_back_to(grads);
  return ratios;
}

void sgd_(at::TensorList params, at::TensorList grads, at::TensorList momentum_buffers,
          const std::optional<at::Tensor>& ratios, at::ArrayRef<double> weight_decays, at::ArrayRef<double> lrs,
          at::ArrayRef<double> momentums, at::ArrayRef<double> dampenings, bool nesterov, bool maximize,
          const std::optional<at::Tensor>& lr_scale) {
  at::AutoDispatchBelowADInplaceOrView no_autograd;
  const SgdArguments sgd{params,    grads,      momentum_buffers, weight_decays, lrs,
                         momentums, dampenings, nesterov,         maximize,      lr_scale};
  check_sgd("sgd_", sgd);
  if (ratios.has_value()) {
    check_ratios("sgd_", *ratios, grads, params);
  }
  const Launch launch(params[0]);
  const SgdSweep sweep(sgd);
  sweep.dispatch([&](auto param, auto momentum) {
    using T = decltype(param);
    using M = decltype(momentum);
    const auto* given = ratios.has_value() ? ratios->const_data_ptr<compute_type<T>>() : nullptr;
    launch_update<T, M>(launch, sweep.layers, given, sweep.options);
  });
  sweep.write_back();
}

at::Tensor lars_sgd_(at::TensorList params, at::TensorList grads, at::TensorList momentum_buffers,
                     at::ArrayRef<double> weight_decays, at::ArrayRef<double> trust_coefs, at::ArrayRef<double> eps,
                     at::ArrayRef<double> lrs, at::ArrayRef<double> momentums, at::ArrayRef<double> dampenings,
                     bool nesterov, bool maximize, const std::optional<at::Tensor>& lr_scale) {
  at::AutoDispatchBelowADInplaceOrView no_autograd;
  const SgdArguments sgd{params,    grads,      momentum_buffers, weight_decays, lrs,
                         momentums, dampenings, nesterov,         maximize,      lr_scale};
  check_sgd("lars_sgd_", sgd);
  check_hyper_parameters("lars_sgd_", grads.size(), "grads", weight_decays, trust_coefs, eps);
  const Launch launch(params[0]);
  const auto [param_partials, grad_partials] = measure_both(launch, grads, params);
  SgdSweep sweep(sgd);
  for (size_t i = 0; i < grads.size(); ++i) {
    sweep.layers[i].trust_coef = trust_coefs[i];
    sweep.layers[i].eps = eps[i];
  }
  const at::Tensor ratios = new_vector(grads[0], static_cast<int64_t>(grads.size()),
                                       compute_dtype(grads[0].scalar_type(), params[0].scalar_type()));
  const auto* param_sums = param_partials.const_data_ptr<double>();
  const auto* grad_sums = grad_partials.const_data_ptr<double>();
  sweep.dispatch([&](auto param, auto momentum) {
    using T = decltype(param);
    using M = decltype(momentum);
    launch_decide_and_update<T, M>(launch, sweep.layers, param_sums, grad_sums,
                                   ratios.mutable_data_ptr<compute_type<T>>(), sweep.options);
  });
  sweep.write_back();
  return ratios;
}

}  // namespace

TORCH_LIBRARY_IMPL(torchlars, CUDA, m) {
  m.impl("squared_norms", squared_norms);
  m.impl("trust_ratios", trust_ratios);
  m.impl("apply_trust_ratios_", apply_trust_ratios_);
  m.impl("scale_by_trust_ratios_", scale_by_trust_ratios_);
  m.impl("sgd_", sgd_);
  m.impl("lars_sgd_", lars_sgd_);
}

}  // namespace torchlars::cuda
