// The ops on a CPU: all tensors in one call, cut into chunks, shared among all cores.
#include <ATen/Dispatch.h>
#include <ATen/OpMathType.h>
#include <ATen/Parallel.h>
#include <ATen/core/LegacyTypeDispatch.h>
#include <ATen/ops/empty.h>
#include <torch/library.h>

#include <algorithm>
#include <array>
#include <numeric>
#include <utility>
#include <vector>

#include "../checks.h"
#include "../layers.h"
#include "../plan.h"
#include "../sgd.h"
#include "../trust_ratio.h"
#include "kernels.h"

namespace torchlars::cpu {
namespace {

// Layers are measured and then swept in runs of this size, so that the second pass finds them in cache.
constexpr int64_t kRunBytes = 4 << 20;
constexpr int64_t kTurnBytes = 1 << 10;     // of one tensor, then of the other: memory delivers more from two places
constexpr int64_t kGrainBytes = 512 << 10;  // less than this is not worth another thread

#define TORCHLARS_DISPATCH(TYPE, NAME, ...) \
  AT_DISPATCH_FLOATING_TYPES_AND2(c10::kBFloat16, c10::kHalf, TYPE, NAME, __VA_ARGS__)

// Calls visit(tensor, chunk, range) for every chunk, on all cores. A thread takes the same chunks in both directions.
template <typename Visit>
void for_chunks(const Plan& plan, int64_t bytes_per_element, Order order, const Visit& visit) {
  at::parallel_for(0, plan.work, kGrainBytes / bytes_per_element,
                   [&](int64_t begin, int64_t end) { plan.for_chunks_starting_in(begin, end, order, visit); });
}

Plan plan_of(at::TensorList tensors) {
  std::vector<int64_t> numels;
  numels.reserve(tensors.size());
  for (const at::Tensor& tensor : tensors) {
    numels.push_back(real_numel(tensor));
  }
  return Plan(std::move(numels));
}

int64_t real_size(const at::Tensor& tensor) { return static_cast<int64_t>(c10::elementSize(real_dtype(tensor))); }

// Asks for a part of a tensor's memory ahead of time.
void prefetch(const void* data, Range range, int64_t bytes_per_element) {
  const char* const begin = static_cast<const char*>(data);
  cpu::prefetch(begin + range.begin * bytes_per_element, begin + range.end * bytes_per_element);
}

using AddSquares = void (*)(Lanes& lanes, const void* x, Range range);

AddSquares add_squares_of(c10::ScalarType dtype) {
  AddSquares function = nullptr;
  TORCHLARS_DISPATCH(dtype, "squared_norms", [&] {
    function = [](Lanes& lanes, const void* x, Range range) {
      cpu::add_squares(lanes, static_cast<const scalar_t*>(x) + range.begin, range.end - range.begin);
    };
  });
  return function;
}

using AddSquaresOfSums = void (*)(Lanes& lanes, const void* x, const void* y, Range range, double scale);

AddSquaresOfSums add_squares_of_sums_of(c10::ScalarType dtype) {
  AddSquaresOfSums function = nullptr;
  TORCHLARS_DISPATCH(dtype, "squared_norms_of_sums", [&] {
    function = [](Lanes& lanes, const void* x, const void* y, Range range, double scale) {
      cpu::add_squares_of_sums(lanes, static_cast<const scalar_t*>(x) + range.begin,
                               static_cast<const scalar_t*>(y) + range.begin, range.end - range.begin, scale);
    };
  });
  return function;
}

// Squared norms of several lists of tensors of the same sizes, one vector a list; of the last one times inv_scale, and
// then with its addends. A thread takes a chunk of all lists, so that what it measures side by side it can later sweep
// side by side.
template <size_t kLists>
std::array<std::vector<double>, kLists> measure(const Plan& plan, const std::array<at::TensorList, kLists>& lists,
                                                double inv_scale, const Addends& addends = {}) {
  constexpr size_t kLast = kLists - 1;
  const bool has_addends = !addends.scales.empty();
  std::array<std::vector<Swept>, kLists> swept;
  std::array<AddSquares, kLists> add_squares;
  std::array<std::vector<double>, kLists> partials;
  std::vector<Swept> added;
  for (size_t list = 0; list < kLists; ++list) {
    swept[list].reserve(plan.numel.size());
    if (list == kLast && has_addends) {
      for (size_t i = 0; i < plan.numel.size(); ++i) {
        Pair pair(lists[list][i], addends.others[i], addends.scales[i]);
        swept[list].push_back(std::move(pair.grad));
        added.push_back(std::move(pair.param));
      }
    } else {
      for (const at::Tensor& tensor : lists[list]) {
        swept[list].push_back(dense(tensor));
      }
    }
    add_squares[list] = add_squares_of(real_dtype(*swept[list][0]));
    partials[list].resize(plan.chunks);
  }
  const AddSquaresOfSums add_squares_of_sums = add_squares_of_sums_of(real_dtype(*swept[kLast][0]));
  std::array<int64_t, kLists> bytes_per_element;
  for (size_t list = 0; list < kLists; ++list) {
    bytes_per_element[list] = real_size(*swept[list][0]);
  }
  const int64_t turn = kTurnBytes / bytes_per_element[0];
  for_chunks(plan, real_size(lists[0][0]), Order::kForwards, [&](int64_t tensor, int64_t chunk, Range range) {
    std::array<const void*, kLists> data;
    for (size_t list = 0; list < kLists; ++list) {
      data[list] = swept[list][tensor]->const_data_ptr();
    }
    const void* const addend = has_addends && added[tensor]->defined() ? added[tensor]->const_data_ptr() : nullptr;
    std::array<Lanes, kLists> lanes;
    for (int64_t begin = range.begin; begin < range.end; begin += turn) {
      const Range part{begin, std::min(begin + turn, range.end)};
      const Range next{part.end, std::min(part.end + turn, range.end)};
      for (size_t list = 0; list < kLists; ++list) {
        prefetch(data[list], next, bytes_per_element[list]);
        if (list == kLast && addend != nullptr) {
          add_squares_of_sums(lanes[list], data[list], addend, part, addends.scales[tensor] / inv_scale);
        } else {
          add_squares[list](lanes[list], data[list], part);
        }
      }
    }
    for (size_t list = 0; list < kLists; ++list) {
      partials[list][chunk] = join(lanes[list]);
    }
  });
  std::array<std::vector<double>, kLists> squared_norms;
  for (size_t list = 0; list < kLists; ++list) {
    squared_norms[list].reserve(plan.numel.size());
    for (size_t tensor = 0; tensor < plan.numel.size(); ++tensor) {
      const auto first = partials[list].begin() + plan.first_chunk[tensor];
      const double sum = std::accumulate(first, first + num_chunks(plan.numel[tensor]), 0.0);
      squared_norms[list].push_back(list == kLast ? unscaled_squared_norm(sum, inv_scale) : sum);
    }
  }
  return squared_norms;
}

// The learning rate of each layer; none where none was given.
std::vector<double> values_of(const Lrs& given) {
  const double lr_scale = given.lr_scale.has_value() ? *given.lr_scale->const_data_ptr<double>() : 1;
  std::vector<double> lrs;
  lrs.reserve(given.lrs.size());
  for (const double lr : given.lrs) {
    lrs.push_back(lr * lr_scale);
  }
  return lrs;
}

double value_of(const std::optional<at::Tensor>& inv_scale) {
  return inv_scale.has_value() ? *inv_scale->const_data_ptr<float>() : 1;
}

using Adapt = void (*)(void* grad, const void* param, Range range, double weight_decay, double ratio, double inv_scale);

Adapt adapt_of(c10::ScalarType dtype) {
  Adapt function = nullptr;
  TORCHLARS_DISPATCH(dtype, "apply_trust_ratios_", [&] {
    function = [](void* grad, const void* param, Range range, double weight_decay, double ratio, double inv_scale) {
      using compute_t = at::opmath_type<scalar_t>;
      cpu::adapt(static_cast<scalar_t*>(grad) + range.begin,
                 param ? static_cast<const scalar_t*>(param) + range.begin : nullptr, range.end - range.begin,
                 static_cast<compute_t>(weight_decay), static_cast<compute_t>(ratio),
                 static_cast<compute_t>(inv_scale));
    };
  });
  return function;
}

// Where threads write. Asked for before they begin: memory that is shared until it is written is copied then.
void* writable(const Swept& swept) { return swept->mutable_data_ptr(); }

// Adapts gradients in place, given their trust ratios; times their lrs, if there are any.
void adapt(const Plan& plan, at::TensorList grads, at::TensorList params, at::ArrayRef<double> weight_decays,
           at::ArrayRef<double> ratios, at::ArrayRef<double> lrs, bool maximize, double inv_scale) {
  if (inv_scale == 0) {
    return;
  }
  std::vector<Pair> layers;
  std::vector<void*> written;
  layers.reserve(grads.size());
  written.reserve(grads.size());
  for (size_t i = 0; i < grads.size(); ++i) {
    layers.emplace_back(grads[i], params[i], weight_decays[i]);
    written.push_back(writable(layers[i].grad));
  }
  const Adapt adapt_range = adapt_of(real_dtype(*layers[0].grad));
  const double sign = maximize ? -1 : 1;
  for_chunks(plan, real_size(*layers[0].grad), Order::kBackwards, [&](int64_t i, int64_t, Range range) {
    const void* param = layers[i].param->defined() ? layers[i].param->const_data_ptr() : nullptr;
    const double factor = lrs.empty() ? ratios[i] : ratios[i] * lrs[i];
    adapt_range(written[i], param, range, sign * weight_decays[i], factor, inv_scale);
  });
  for (size_t i = 0; i < grads.size(); ++i) {
    write_back(layers[i].grad, grads[i]);
  }
}

using ScaleUpdate = void (*)(void* param, const void* old_param, Range range, double ratio);

ScaleUpdate scale_update_of(c10::ScalarType dtype) {
  ScaleUpdate function = nullptr;
  TORCHLARS_DISPATCH(dtype, "apply_trust_ratios_to_updates_", [&] {
    function = [](void* param, const void* old_param, Range range, double ratio) {
      cpu::scale_update(static_cast<scalar_t*>(param) + range.begin,
                        static_cast<const scalar_t*>(old_param) + range.begin, range.end - range.begin,
                        static_cast<at::opmath_type<scalar_t>>(ratio));
    };
  });
  return function;
}

// Scales updates in place, given their trust ratios. What has the ratio 1 is not touched.
void scale_updates(const Plan& plan, at::TensorList params, at::TensorList old_params, at::ArrayRef<double> ratios) {
  std::vector<Pair> layers;
  std::vector<void*> written;
  layers.reserve(params.size());
  written.reserve(params.size());
  for (size_t i = 0; i < params.size(); ++i) {
    layers.emplace_back(params[i], old_params[i], 1);
    written.push_back(writable(layers[i].grad));
  }
  const ScaleUpdate scale_range = scale_update_of(real_dtype(params[0]));
  for_chunks(plan, real_size(params[0]), Order::kBackwards, [&](int64_t i, int64_t, Range range) {
    if (ratios[i] != 1) {
      scale_range(written[i], layers[i].param->const_data_ptr(), range, ratios[i]);
    }
  });
  for (size_t i = 0; i < params.size(); ++i) {
    write_back(layers[i].grad, params[i]);
  }
}

using Sgd = void (*)(void* param, const void* grad, void* momentum, Range range, bool nesterov,
                     const SgdNumbers<double>& numbers);

template <typename T, typename M>
void sgd_range(void* param, const void* grad, void* momentum, Range range, bool nesterov,
               const SgdNumbers<double>& numbers) {
  cpu::sgd(static_cast<T*>(param) + range.begin, static_cast<const T*>(grad) + range.begin,
           momentum ? static_cast<M*>(momentum) + range.begin : nullptr, range.end - range.begin, nesterov,
           SgdNumbers<at::opmath_type<T>>(numbers));
}

Sgd sgd_of(c10::ScalarType dtype, c10::ScalarType momentum_dtype) {
  Sgd function = nullptr;
  TORCHLARS_DISPATCH(dtype, "sgd_", [&] {
    using compute_t = at::opmath_type<scalar_t>;
    function = momentum_dtype == dtype ? sgd_range<scalar_t, scalar_t> : sgd_range<scalar_t, compute_t>;
  });
  return function;
}

// Steps of SGD for layers [begin, end), with their trust ratios or, where that is empty, without.
void update(const Plan& plan, const SgdArguments& sgd, Range run, at::ArrayRef<double> ratios, bool lr_in_momentum,
            Order order) {
  const double inv_scale = value_of(sgd.inv_scale);
  if (inv_scale == 0) {
    return;
  }
  std::vector<Triple> layers;
  std::vector<std::pair<void*, void*>> written;
  std::vector<SgdNumbers<double>> numbers;
  layers.reserve(run.end - run.begin);
  written.reserve(run.end - run.begin);
  numbers.reserve(run.end - run.begin);
  const double lr_scale = sgd.lr_scale.has_value() ? *sgd.lr_scale->const_data_ptr<double>() : 1;
  for (int64_t i = run.begin; i < run.end; ++i) {
    layers.emplace_back(sgd.params[i], sgd.grads[i], sgd.momentum_buffers.empty() ? nullptr : &sgd.momentum_buffers[i]);
    const Triple& layer = layers.back();
    written.emplace_back(writable(layer.param), layer.momentum->defined() ? writable(layer.momentum) : nullptr);
    numbers.emplace_back(ratios.empty() ? 1 : ratios[i], sgd.weight_decays[i], sgd.lrs[i] * lr_scale, sgd.momentums[i],
                         sgd.dampenings[i], sgd.maximize, lr_in_momentum, inv_scale);
  }
  const Triple& first = layers[0];
  const auto dtype = real_dtype(*first.param);
  const Sgd sgd_chunk = sgd_of(dtype, first.momentum->defined() ? real_dtype(*first.momentum) : dtype);
  for_chunks(plan, real_size(*first.param), order, [&](int64_t i, int64_t, Range range) {
    const auto [param, momentum] = written[i];
    sgd_chunk(param, layers[i].grad->const_data_ptr(), momentum, range, sgd.nesterov, numbers[i]);
  });
  for (size_t i = 0; i < layers.size(); ++i) {
    write_back(layers[i].param, sgd.params[run.begin + i]);
    if (layers[i].momentum->defined()) {
      write_back(layers[i].momentum, sgd.momentum_buffers[run.begin + i]);
    }
  }
}

at::Tensor vector_of(const std::vector<double>& values) {
  at::Tensor vector = at::empty({static_cast<int64_t>(values.size())}, at::TensorOptions(c10::kDouble));
  std::copy(values.begin(), values.end(), vector.mutable_data_ptr<double>());
  return vector;
}

// The numbers by which the trust ratios of all layers are decided.
struct RatioNumbers {
  double of(size_t layer, double param_squared_norm, double grad_squared_norm) const {
    return trust_ratio(param_squared_norm, grad_squared_norm, weight_decays.empty() ? 0 : weight_decays[layer],
                       trust_coefs[layer], eps[layer], lrs.empty() ? 1 : lrs[layer], options);
  }

  at::ArrayRef<double> weight_decays;  // empty: nothing decays
  at::ArrayRef<double> trust_coefs;
  at::ArrayRef<double> eps;
  std::vector<double> lrs;  // empty: none is needed
  RatioOptions options;
};

// The trust ratios of all layers, measured in runs, gradients times inv_scale and with what is added to them; each run
// is handed to sweep(its plan, its layers, all ratios so far) while it is still in cache.
template <typename Sweep>
at::Tensor measure_and_sweep(at::TensorList params, at::TensorList grads, double inv_scale, const RatioNumbers& numbers,
                             at::ArrayRef<double> scales, Order order, const Sweep& sweep) {
  const auto dtype = compute_dtype(grads[0].scalar_type(), params[0].scalar_type());
  std::vector<int64_t> bytes;
  bytes.reserve(grads.size());
  for (size_t i = 0; i < grads.size(); ++i) {
    bytes.push_back(static_cast<int64_t>(grads[i].nbytes() + params[i].nbytes()));
  }
  std::vector<double> ratios(grads.size());
  std::vector<Range> runs = runs_within(bytes, kRunBytes);
  if (order == Order::kBackwards) {
    std::reverse(runs.begin(), runs.end());
  }
  for (const Range& run : runs) {
    const auto count = static_cast<size_t>(run.end - run.begin);
    const auto run_params = params.slice(run.begin, count);
    const Addends addends{run_params, scales.empty() ? scales : scales.slice(run.begin, count)};
    const Plan plan = plan_of(run_params);
    const auto [param_norms, grad_norms] =
        measure<2>(plan, {run_params, grads.slice(run.begin, count)}, inv_scale, addends);
    for (size_t i = 0; i < count; ++i) {
      const double ratio = numbers.of(run.begin + i, param_norms[i], grad_norms[i]);
      ratios[run.begin + i] = dtype == c10::kDouble ? ratio : static_cast<float>(ratio);
    }
    sweep(plan, run, ratios);
  }
  return vector_of(ratios).to(dtype);
}

at::Tensor squared_norms(at::TensorList tensors, const std::optional<at::Tensor>& inv_scale) {
  at::AutoDispatchBelowADInplaceOrView no_autograd;
  check_tensors("squared_norms", "tensors", tensors);
  check_inv_scale("squared_norms", inv_scale, tensors[0].device());
  return vector_of(measure<1>(plan_of(tensors), {tensors}, value_of(inv_scale))[0]);
}

at::Tensor squared_norms_of_sums(at::TensorList tensors, at::TensorList others, at::ArrayRef<double> scales,
                                 const std::optional<at::Tensor>& inv_scale) {
  at::AutoDispatchBelowADInplaceOrView no_autograd;
  check_sums("squared_norms_of_sums", tensors, others, scales);
  check_inv_scale("squared_norms_of_sums", inv_scale, tensors[0].device());
  return vector_of(measure<1>(plan_of(tensors), {tensors}, value_of(inv_scale), {others, scales})[0]);
}

at::Tensor trust_ratios(const at::Tensor& param_squared_norms, const at::Tensor& grad_squared_norms,
                        at::ArrayRef<double> weight_decays, at::ArrayRef<double> trust_coefs, at::ArrayRef<double> eps,
                        at::ScalarType dtype, at::ArrayRef<double> lrs, const std::optional<at::Tensor>& lr_scale,
                        bool clip, bool of_updates) {
  at::AutoDispatchBelowADInplaceOrView no_autograd;
  check_trust_ratios(param_squared_norms, grad_squared_norms, weight_decays, trust_coefs, eps, dtype, {lrs, lr_scale},
                     clip || of_updates);
  const RatioNumbers numbers{weight_decays, trust_coefs, eps, values_of({lrs, lr_scale}), {false, clip, of_updates}};
  const auto* param_squared_norm = param_squared_norms.const_data_ptr<double>();
  const auto* grad_squared_norm = grad_squared_norms.const_data_ptr<double>();
  std::vector<double> ratios;
  for (size_t i = 0; i < weight_decays.size(); ++i) {
    ratios.push_back(numbers.of(i, param_squared_norm[i], grad_squared_norm[i]));
  }
  return vector_of(ratios).to(dtype);
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
  const at::Tensor values = ratios.to(c10::kDouble);
  adapt(plan_of(grads), grads, params, weight_decays, {values.const_data_ptr<double>(), grads.size()},
        values_of({lrs, lr_scale}), maximize, value_of(inv_scale));
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
  const RatioOptions options{decayed_norm, clip};
  const RatioNumbers numbers{weight_decays, trust_coefs, eps, values_of({lrs, lr_scale}), options};
  const double scale = value_of(inv_scale);
  const at::ArrayRef<double> factors = lr_in_momentum ? numbers.lrs : at::ArrayRef<double>();
  // From the last layer to the first: that is where a base optimizer begins, which then finds it in cache.
  return measure_and_sweep(params, grads, scale, numbers, scales_of(weight_decays, maximize, options),
                           Order::kBackwards, [&](const Plan& plan, Range run, at::ArrayRef<double> ratios) {
                             const auto count = static_cast<size_t>(run.end - run.begin);
                             adapt(plan, grads.slice(run.begin, count), params.slice(run.begin, count),
                                   weight_decays.slice(run.begin, count), ratios.slice(run.begin, count),
                                   factors.empty() ? factors : factors.slice(run.begin, count), maximize, scale);
                           });
}

void apply_trust_ratios_to_updates_(at::TensorList params, at::TensorList old_params, const at::Tensor& ratios) {
  const char* op = "apply_trust_ratios_to_updates_";
  at::AutoDispatchBelowADInplaceOrView no_autograd;
  check_updates(op, params, old_params);
  check_ratios(op, ratios, params, old_params, "params");
  const at::Tensor values = ratios.to(c10::kDouble);
  scale_updates(plan_of(params), params, old_params, {values.const_data_ptr<double>(), params.size()});
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
  const RatioNumbers numbers{{}, trust_coefs, eps, values_of({lrs, lr_scale}), {false, clip, /*of_updates=*/true}};
  const std::vector<double> scales(params.size(), -1);
  return measure_and_sweep(old_params, params, /*inv_scale=*/1, numbers, scales, Order::kBackwards,
                           [&](const Plan& plan, Range run, at::ArrayRef<double> ratios) {
                             const auto count = static_cast<size_t>(run.end - run.begin);
                             scale_updates(plan, params.slice(run.begin, count), old_params.slice(run.begin, count),
                                           ratios.slice(run.begin, count));
                           });
}

void sgd_(at::TensorList params, at::TensorList grads, at::TensorList momentum_buffers,
          const std::optional<at::Tensor>& ratios, at::ArrayRef<double> weight_decays, at::ArrayRef<double> lrs,
          at::ArrayRef<double> momentums, at::ArrayRef<double> dampenings, bool nesterov, bool maximize,
          const std::optional<at::Tensor>& lr_scale, const std::optional<at::Tensor>& inv_scale) {
  at::AutoDispatchBelowADInplaceOrView no_autograd;
  const SgdArguments sgd{params,     grads,    momentum_buffers, weight_decays, lrs,      momentums,
                         dampenings, nesterov, maximize,         lr_scale,      inv_scale};
  check_sgd("sgd_", sgd);
  const Range all{0, static_cast<int64_t>(params.size())};
  if (ratios.has_value()) {
    check_ratios("sgd_", *ratios, grads, params);
    const at::Tensor values = ratios->to(c10::kDouble);
    update(plan_of(params), sgd, all, {values.const_data_ptr<double>(), params.size()}, false, Order::kForwards);
  } else {
    update(plan_of(params), sgd, all, {}, false, Order::kForwards);
  }
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
  const RatioOptions options{decayed_norm, clip};
  const RatioNumbers numbers{weight_decays, trust_coefs, eps, clip ? values_of({lrs, lr_scale}) : std::vector<double>(),
                             options};
  return measure_and_sweep(params, grads, value_of(inv_scale), numbers, scales_of(weight_decays, maximize, options),
                           Order::kForwards, [&](const Plan& plan, Range run, at::ArrayRef<double> ratios) {
                             update(plan, sgd, run, ratios, lr_in_momentum, Order::kBackwards);
                           });
}

}  // namespace

TORCH_LIBRARY_IMPL(torchlars, CPU, m) {
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

}  // namespace torchlars::cpu
