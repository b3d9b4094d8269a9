// The ops on a CPU: all tensors in one call, cut into chunks, shared among all cores.
#include <ATen/Dispatch.h>
#include <ATen/OpMathType.h>
#include <ATen/Parallel.h>
#include <ATen/core/LegacyTypeDispatch.h>
#include <ATen/ops/empty.h>
#include <torch/library.h>

#include <numeric>

#include "../checks.h"
#include "../layers.h"
#include "../plan.h"
#include "../trust_ratio.h"
#include "kernels.h"

namespace torchlars::cpu {
namespace {

// Layers are measured and then adapted in runs of this size, so that the second pass finds them in cache.
constexpr int64_t kRunBytes = 4 << 20;
constexpr int64_t kGrainBytes = 512 << 10;  // less than this is not worth another thread

#define TORCHLARS_DISPATCH(TYPE, NAME, ...) \
  AT_DISPATCH_FLOATING_TYPES_AND2(c10::kBFloat16, c10::kHalf, TYPE, NAME, __VA_ARGS__)

int64_t grain(const at::Tensor& tensor) {
  return kGrainBytes / static_cast<int64_t>(c10::elementSize(real_dtype(tensor)));
}

Plan plan_of(const std::vector<at::Tensor>& tensors) {
  std::vector<int64_t> numels;
  for (const at::Tensor& tensor : tensors) {
    numels.push_back(real_numel(tensor));
  }
  return Plan(std::move(numels));
}

double sum_of_squares(const at::Tensor& tensor, Range range) {
  double sum = 0;
  TORCHLARS_DISPATCH(real_dtype(tensor), "squared_norms", [&] {
    const auto* data = static_cast<const scalar_t*>(tensor.const_data_ptr());
    sum = cpu::sum_of_squares(data + range.begin, range.end - range.begin);
  });
  return sum;
}

void adapt(const Pair& layer, Range range, double weight_decay, double ratio) {
  TORCHLARS_DISPATCH(real_dtype(layer.grad), "apply_trust_ratios_", [&] {
    using compute_t = at::opmath_type<scalar_t>;
    auto* grad = static_cast<scalar_t*>(layer.grad.mutable_data_ptr());
    const auto* param = layer.param.defined() ? static_cast<const scalar_t*>(layer.param.const_data_ptr()) : nullptr;
    cpu::adapt(grad + range.begin, param ? param + range.begin : nullptr, range.end - range.begin,
               static_cast<compute_t>(weight_decay), static_cast<compute_t>(ratio));
  });
}

using Tensors = std::vector<at::Tensor>;

Tensors all_dense(at::TensorList tensors) {
  Tensors result;
  for (const at::Tensor& tensor : tensors) {
    result.push_back(dense(tensor));
  }
  return result;
}

// Squared norms of several lists of tensors of the same sizes, one vector a list. A thread takes a chunk of all lists,
// so that what it measures side by side it can later adapt side by side.
std::vector<std::vector<double>> measure(const std::vector<Tensors>& lists) {
  const Plan plan = plan_of(lists[0]);
  std::vector<std::vector<double>> partial(lists.size(), std::vector<double>(plan.chunks));
  at::parallel_for(0, plan.elements, grain(lists[0][0]), [&](int64_t begin, int64_t end) {
    plan.for_chunks_starting_in(begin, end, [&](int64_t tensor, int64_t chunk, Range range) {
      for (size_t i = 0; i < lists.size(); ++i) {
        partial[i][chunk] = sum_of_squares(lists[i][tensor], range);
      }
    });
  });
  std::vector<std::vector<double>> squared_norms(lists.size());
  for (size_t i = 0; i < lists.size(); ++i) {
    for (size_t tensor = 0; tensor < plan.numel.size(); ++tensor) {
      const auto first = partial[i].begin() + plan.first_chunk[tensor];
      squared_norms[i].push_back(std::accumulate(first, first + num_chunks(plan.numel[tensor]), 0.0));
    }
  }
  return squared_norms;
}

// Adapts gradients in place, given their trust ratios.
void adapt(at::TensorList grads, at::TensorList params, at::ArrayRef<double> weight_decays, at::ArrayRef<double> ratios,
           bool maximize) {
  std::vector<Pair> pairs;
  Tensors swept;
  for (size_t i = 0; i < grads.size(); ++i) {
    pairs.push_back(side_by_side(grads[i], params[i], weight_decays[i]));
    swept.push_back(pairs[i].grad);
  }
  const Plan plan = plan_of(swept);
  at::parallel_for(0, plan.elements, grain(swept[0]), [&](int64_t begin, int64_t end) {
    plan.for_chunks_starting_in(begin, end, [&](int64_t i, int64_t, Range range) {
      adapt(pairs[i], range, maximize ? -weight_decays[i] : weight_decays[i], ratios[i]);
    });
  });
  for (size_t i = 0; i < grads.size(); ++i) {
    write_back(pairs[i].grad, grads[i]);
  }
}

at::Tensor vector_of(const std::vector<double>& values) {
  at::Tensor vector = at::empty({static_cast<int64_t>(values.size())}, at::TensorOptions(c10::kDouble));
  std::copy(values.begin(), values.end(), vector.mutable_data_ptr<double>());
  return vector;
}

at::Tensor squared_norms(at::TensorList tensors) {
  at::AutoDispatchBelowADInplaceOrView no_autograd;
  check_tensors("squared_norms", "tensors", tensors);
  return vector_of(measure({all_dense(tensors)})[0]);
}

at::Tensor trust_ratios(const at::Tensor& param_squared_norms, const at::Tensor& grad_squared_norms,
                        at::ArrayRef<double> weight_decays, at::ArrayRef<double> trust_coefs, at::ArrayRef<double> eps,
                        at::ScalarType dtype) {
  at::AutoDispatchBelowADInplaceOrView no_autograd;
  check_trust_ratios(param_squared_norms, grad_squared_norms, weight_decays, trust_coefs, eps, dtype);
  const auto* param_squared_norm = param_squared_norms.const_data_ptr<double>();
  const auto* grad_squared_norm = grad_squared_norms.const_data_ptr<double>();
  std::vector<double> ratios;
  for (size_t i = 0; i < weight_decays.size(); ++i) {
    ratios.push_back(
        trust_ratio(param_squared_norm[i], grad_squared_norm[i], weight_decays[i], trust_coefs[i], eps[i]));
  }
  return vector_of(ratios).to(dtype);
}

void apply_trust_ratios_(at::TensorList grads, at::TensorList params, const at::Tensor& ratios,
                         at::ArrayRef<double> weight_decays, bool maximize) {
  at::AutoDispatchBelowADInplaceOrView no_autograd;
  check_layers("apply_trust_ratios_", grads, params, weight_decays, /*equal_shapes=*/false);
  check_ratios("apply_trust_ratios_", ratios, grads, params);
  const at::Tensor values = ratios.to(c10::kDouble);
  adapt(grads, params, weight_decays, {values.const_data_ptr<double>(), grads.size()}, maximize);
}

at::Tensor scale_by_trust_ratios_(at::TensorList grads, at::TensorList params, at::ArrayRef<double> weight_decays,
                                  at::ArrayRef<double> trust_coefs, at::ArrayRef<double> eps, bool maximize) {
  at::AutoDispatchBelowADInplaceOrView no_autograd;
  check_layers("scale_by_trust_ratios_", grads, params, weight_decays, /*equal_shapes=*/true);
  check_hyper_parameters("scale_by_trust_ratios_", grads.size(), "grads", weight_decays, trust_coefs, eps);
  std::vector<int64_t> bytes;
  for (size_t i = 0; i < grads.size(); ++i) {
    bytes.push_back(static_cast<int64_t>(grads[i].nbytes() + params[i].nbytes()));
  }
  std::vector<double> ratios(grads.size());
  for (const Range& run : runs_within(bytes, kRunBytes)) {
    const auto count = static_cast<size_t>(run.end - run.begin);
    const auto run_grads = grads.slice(run.begin, count);
    const auto run_params = params.slice(run.begin, count);
    const auto norms = measure({all_dense(run_params), all_dense(run_grads)});
    for (size_t i = 0; i < count; ++i) {
      const size_t layer = run.begin + i;
      ratios[layer] = trust_ratio(norms[0][i], norms[1][i], weight_decays[layer], trust_coefs[layer], eps[layer]);
    }
    adapt(run_grads, run_params, weight_decays.slice(run.begin, count),
          at::ArrayRef<double>(ratios).slice(run.begin, count), maximize);
  }
  return vector_of(ratios).to(compute_dtype(grads[0].scalar_type(), params[0].scalar_type()));
}

}  // namespace

TORCH_LIBRARY_IMPL(torchlars, CPU, m) {
  m.impl("squared_norms", squared_norms);
  m.impl("trust_ratios", trust_ratios);
  m.impl("apply_trust_ratios_", apply_trust_ratios_);
  m.impl("scale_by_trust_ratios_", scale_by_trust_ratios_);
}

}  // namespace torchlars::cpu
