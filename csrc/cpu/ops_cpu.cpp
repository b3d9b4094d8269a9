// The ops on a CPU. All tensors of a call are cut into chunks, which are shared among the threads.
#include <ATen/Dispatch.h>
#include <ATen/OpMathType.h>
#include <ATen/Parallel.h>
#include <ATen/ops/empty.h>

#include <algorithm>
#include <array>
#include <numeric>
#include <utility>
#include <vector>

#include "../adam.h"
#include "../arguments.h"
#include "../layers.h"
#include "../plan.h"
#include "../sgd.h"
#include "../trust_ratio.h"
#include "kernels.h"

namespace torchlars::cpu {
namespace {

// Layers are measured and scaled in runs of this size, so that the second pass reads them from cache.
constexpr int64_t kRunBytes = 4 << 20;
constexpr int64_t kTileBytes = 1 << 10;     // read of one tensor, then of the other: two streams raise the bandwidth
constexpr int64_t kGrainBytes = 512 << 10;  // the least work of a thread

#define TORCHLARS_DISPATCH(TYPE, NAME, ...) \
  AT_DISPATCH_FLOATING_TYPES_AND2(c10::kBFloat16, c10::kHalf, TYPE, NAME, __VA_ARGS__)

// Calls visit(tensor, chunk, range) for every chunk, on all threads. The order does not change which chunks a thread
// takes.
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

// Prefetches a part of a tensor.
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
  TORCHLARS_DISPATCH(dtype, "squared_norms", [&] {
    function = [](Lanes& lanes, const void* x, const void* y, Range range, double scale) {
      cpu::add_squares_of_sums(lanes, static_cast<const scalar_t*>(x) + range.begin,
                               static_cast<const scalar_t*>(y) + range.begin, range.end - range.begin, scale);
    };
  });
  return function;
}

// The sum of each tensor's partial sums, in the order of its chunks.
std::vector<double> sums_of(const Plan& plan, const std::vector<double>& partials) {
  std::vector<double> sums;
  sums.reserve(plan.numel.size());
  for (size_t tensor = 0; tensor < plan.numel.size(); ++tensor) {
    const auto first = partials.begin() + plan.first_chunk[tensor];
    sums.push_back(std::accumulate(first, first + num_chunks(plan.numel[tensor]), 0.0));
  }
  return sums;
}

// Squared norms of several lists of tensors of the same sizes, one vector for each list. The tensors of the last list
// are multiplied by inv_scale, and then their addends are added. A thread measures the same chunk of all lists, as it
// scales them together later.
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
  const int64_t tile = kTileBytes / bytes_per_element[0];
  for_chunks(plan, real_size(lists[0][0]), Order::kForwards, [&](int64_t tensor, int64_t chunk, Range range) {
    std::array<const void*, kLists> data;
    for (size_t list = 0; list < kLists; ++list) {
      data[list] = swept[list][tensor]->const_data_ptr();
    }
    const void* const addend = has_addends && added[tensor]->defined() ? added[tensor]->const_data_ptr() : nullptr;
    std::array<Lanes, kLists> lanes;
    for (int64_t begin = range.begin; begin < range.end; begin += tile) {
      const Range part{begin, std::min(begin + tile, range.end)};
      const Range next{part.end, std::min(part.end + tile, range.end)};
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
    squared_norms[list] = sums_of(plan, partials[list]);
  }
  for (double& squared_norm : squared_norms[kLast]) {
    squared_norm = unscaled_squared_norm(squared_norm, inv_scale);
  }
  return squared_norms;
}

// The learning rate of each layer; empty if none was given.
std::vector<double> values_of(at::ArrayRef<double> lrs, const std::optional<at::Tensor>& lr_tensor) {
  const double scale = lr_tensor.has_value() ? *lr_tensor->const_data_ptr<double>() : 1;
  std::vector<double> values;
  values.reserve(lrs.size());
  for (const double lr : lrs) {
    values.push_back(lr * scale);
  }
  return values;
}

double value_of(const std::optional<at::Tensor>& inv_scale) {
  return inv_scale.has_value() ? *inv_scale->const_data_ptr<float>() : 1;
}

// The trust ratios that were given, or 1 for each layer.
std::vector<double> values_of_ratios(const std::optional<at::Tensor>& ratios, size_t layers) {
  if (!ratios.has_value()) {
    return std::vector<double>(layers, 1);
  }
  const at::Tensor values = ratios->to(c10::kDouble);
  const auto* const first = values.const_data_ptr<double>();
  return {first, first + layers};
}

using Adapt = void (*)(void* grad, const void* param, Range range, double weight_decay, double ratio, double inv_scale);

Adapt adapt_of(c10::ScalarType dtype) {
  Adapt function = nullptr;
  TORCHLARS_DISPATCH(dtype, "scale_gradients_", [&] {
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

// Where threads write. To be called before they start: it copies memory that is copy-on-write.
void* writable(const Swept& swept) { return swept->mutable_data_ptr(); }

// Scales the gradients of layers [run.begin, run.end), given the trust ratios of all layers and, with lr_in_momentum,
// their lrs.
void scale_gradients(const ScaleGradientsArguments& arguments, const Plan& plan, Range run, at::ArrayRef<double> ratios,
                     at::ArrayRef<double> lrs) {
  const double inv_scale = value_of(arguments.inv_scale);
  if (inv_scale == 0) {
    return;
  }
  std::vector<Pair> layers;
  std::vector<void*> written;
  layers.reserve(run.end - run.begin);
  written.reserve(run.end - run.begin);
  for (int64_t i = run.begin; i < run.end; ++i) {
    layers.emplace_back(arguments.grads[i], arguments.params[i], arguments.weight_decays[i]);
    written.push_back(writable(layers.back().grad));
  }
  const Adapt adapt_range = adapt_of(real_dtype(*layers[0].grad));
  const double sign = arguments.maximize ? -1 : 1;
  for_chunks(plan, real_size(*layers[0].grad), Order::kBackwards, [&](int64_t i, int64_t, Range range) {
    const void* param = layers[i].param->defined() ? layers[i].param->const_data_ptr() : nullptr;
    const int64_t layer = run.begin + i;
    const double factor = arguments.lr_in_momentum ? ratios[layer] * lrs[layer] : ratios[layer];
    adapt_range(written[i], param, range, sign * arguments.weight_decays[layer], factor, inv_scale);
  });
  for (size_t i = 0; i < layers.size(); ++i) {
    write_back(layers[i].grad, arguments.grads[run.begin + i]);
  }
}

using ScaleUpdate = void (*)(void* param, const void* old_param, Range range, double ratio);

ScaleUpdate scale_update_of(c10::ScalarType dtype) {
  ScaleUpdate function = nullptr;
  TORCHLARS_DISPATCH(dtype, "scale_updates_", [&] {
    function = [](void* param, const void* old_param, Range range, double ratio) {
      cpu::scale_update(static_cast<scalar_t*>(param) + range.begin,
                        static_cast<const scalar_t*>(old_param) + range.begin, range.end - range.begin,
                        static_cast<at::opmath_type<scalar_t>>(ratio));
    };
  });
  return function;
}

// Scales the updates of layers [run.begin, run.end), given the trust ratios of all layers. What has the ratio 1 is not
// written.
void scale_updates(const ScaleUpdatesArguments& arguments, const Plan& plan, Range run, at::ArrayRef<double> ratios) {
  std::vector<Pair> layers;
  std::vector<void*> written;
  layers.reserve(run.end - run.begin);
  written.reserve(run.end - run.begin);
  for (int64_t i = run.begin; i < run.end; ++i) {
    layers.emplace_back(arguments.params[i], arguments.old_params[i], 1);
    written.push_back(writable(layers.back().grad));
  }
  const auto dtype = real_dtype(*layers[0].grad);
  const ScaleUpdate scale_range = scale_update_of(dtype);
  for_chunks(plan, real_size(*layers[0].grad), Order::kBackwards, [&](int64_t i, int64_t, Range range) {
    if (const double ratio = ratios[run.begin + i]; ratio != 1) {
      scale_range(written[i], layers[i].param->const_data_ptr(), range, ratio);
    }
  });
  for (size_t i = 0; i < layers.size(); ++i) {
    write_back(layers[i].grad, arguments.params[run.begin + i]);
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

// The same of the blocks of a range, with momentum in 8 bits.
using SgdBlocks = void (*)(void* param, const void* grad, void* codes, float* scales, const Rows& rows, Range range,
                           bool nesterov, const SgdNumbers<double>& numbers);

template <typename T>
void sgd_blocks(void* param, const void* grad, void* codes, float* scales, const Rows& rows, Range range, bool nesterov,
                const SgdNumbers<double>& numbers) {
  const SgdNumbers<float> in_float(numbers);
  rows.for_blocks(range, 0, 1, [&](const Block& block) {
    cpu::sgd_block(static_cast<T*>(param) + block.begin, static_cast<const T*>(grad) + block.begin,
                   static_cast<int8_t*>(codes) + block.begin, scales[block.index], block, nesterov, in_float);
  });
}

SgdBlocks sgd_blocks_of(c10::ScalarType dtype) {
  return dtype == c10::kFloat      ? sgd_blocks<float>
         : dtype == c10::kBFloat16 ? sgd_blocks<c10::BFloat16>
                                   : sgd_blocks<c10::Half>;
}

// Takes the steps of layers [run.begin, run.end), given the trust ratios of all layers and their lrs.
void update(const SgdArguments& arguments, const Plan& plan, Range run, at::ArrayRef<double> ratios,
            at::ArrayRef<double> lrs, Order order) {
  const double inv_scale = value_of(arguments.inv_scale);
  if (inv_scale == 0) {
    return;
  }
  std::vector<Triple> layers;
  std::vector<std::pair<void*, void*>> written;
  std::vector<SgdNumbers<double>> numbers;
  layers.reserve(run.end - run.begin);
  written.reserve(run.end - run.begin);
  numbers.reserve(run.end - run.begin);
  const at::TensorList momentum_buffers = arguments.momentum_buffers;
  for (int64_t i = run.begin; i < run.end; ++i) {
    layers.emplace_back(arguments.params[i], arguments.grads[i],
                        momentum_buffers.empty() ? nullptr : &momentum_buffers[i]);
    const Triple& layer = layers.back();
    written.emplace_back(writable(layer.param), layer.momentum->defined() ? writable(layer.momentum) : nullptr);
    numbers.emplace_back(ratios[i], arguments.weight_decays[i], arguments.maximize, lrs[i], arguments.lr_in_momentum,
                         arguments.momentums[i], arguments.dampenings[i], inv_scale);
  }
  const Triple& first = layers[0];
  const auto dtype = real_dtype(*first.param);
  if (arguments.momentum_scales.has_value()) {
    std::vector<float*> scales;
    std::vector<Rows> rows;
    for (int64_t i = run.begin; i < run.end; ++i) {
      scales.push_back((*arguments.momentum_scales)[i].mutable_data_ptr<float>());
      rows.push_back(rows_of(arguments, i));
    }
    const SgdBlocks sgd_range_of_blocks = sgd_blocks_of(dtype);
    for_chunks(plan, real_size(*first.param), order, [&](int64_t i, int64_t, Range range) {
      const auto [param, codes] = written[i];
      sgd_range_of_blocks(param, layers[i].grad->const_data_ptr(), codes, scales[i], rows[i], range, arguments.nesterov,
                          numbers[i]);
    });
  } else {
    const Sgd sgd_chunk = sgd_of(dtype, first.momentum->defined() ? real_dtype(*first.momentum) : dtype);
    for_chunks(plan, real_size(*first.param), order, [&](int64_t i, int64_t, Range range) {
      const auto [param, momentum] = written[i];
      sgd_chunk(param, layers[i].grad->const_data_ptr(), momentum, range, arguments.nesterov, numbers[i]);
    });
  }
  for (size_t i = 0; i < layers.size(); ++i) {
    write_back(layers[i].param, arguments.params[run.begin + i]);
    if (layers[i].momentum->defined()) {
      write_back(layers[i].momentum, momentum_buffers[run.begin + i]);
    }
    if (arguments.momentum_scales.has_value()) {
      note_write((*arguments.momentum_scales)[run.begin + i]);
    }
  }
}

// A part of a layer's step of Adam. With a grad it updates the moments. Without lanes it updates the parameter by lr
// times the update; with lanes it adds the squares of the parameter and of the update to them.
using Adam = void (*)(void* param, const void* grad, void* exp_avg, void* exp_avg_sq, Range range,
                      const AdamNumbers<double>& numbers, double lr, std::array<Lanes, 2>* lanes);

template <typename T, typename M>
void adam_range(void* param, const void* grad, void* exp_avg, void* exp_avg_sq, Range range,
                const AdamNumbers<double>& numbers, double lr, std::array<Lanes, 2>* lanes) {
  using Compute = at::opmath_type<T>;
  constexpr int64_t kTile = 512;  // elements, whose updates stay in the L1 cache until they are squared
  Compute updates[kTile];
  const int64_t tile = lanes == nullptr ? range.end - range.begin : kTile;
  for (int64_t i = range.begin; i < range.end; i += tile) {
    const int64_t count = std::min(tile, range.end - i);
    T* const w = static_cast<T*>(param) + i;
    cpu::adam(w, grad == nullptr ? nullptr : static_cast<const T*>(grad) + i, static_cast<M*>(exp_avg) + i,
              static_cast<M*>(exp_avg_sq) + i, lanes == nullptr ? nullptr : updates, count, numbers,
              static_cast<Compute>(lr));
    if (lanes != nullptr) {
      cpu::add_squares((*lanes)[0], static_cast<const T*>(w), count);
      cpu::add_squares((*lanes)[1], static_cast<const Compute*>(updates), count);
    }
  }
}

Adam adam_of(c10::ScalarType dtype, c10::ScalarType moment_dtype) {
  Adam function = nullptr;
  TORCHLARS_DISPATCH(dtype, "adam_", [&] {
    using compute_t = at::opmath_type<scalar_t>;
    function = moment_dtype == dtype ? adam_range<scalar_t, scalar_t> : adam_range<scalar_t, compute_t>;
  });
  return function;
}

// The layers of a run in a step of Adam that is not skipped, given the trust ratios of all gradients and all lrs.
class AdamRun {
 public:
  AdamRun(const AdamArguments& arguments, const Plan& plan, Range run, at::ArrayRef<double> grad_ratios,
          at::ArrayRef<double> lrs)
      : arguments_(arguments), plan_(plan), run_(run), lrs_(lrs) {
    const auto count = static_cast<size_t>(run.end - run.begin);
    layers_.reserve(count);
    written_.reserve(count);
    numbers_.reserve(count);
    for (int64_t i = run.begin; i < run.end; ++i) {
      const AdamTensors& layer = layers_.emplace_back(arguments, i);
      written_.push_back({writable(layer.param), writable(layer.exp_avg), writable(layer.exp_avg_sq)});
      auto* const step = arguments.steps[i].mutable_data_ptr<float>();
      *step += arguments.grads.empty() ? 0 : 1;
      numbers_.emplace_back(grad_ratios[i], arguments.weight_decays[i], arguments.decoupled_weight_decay,
                            arguments.maximize, arguments.beta1, arguments.beta2, arguments.adam_eps,
                            bias_corrections(arguments.beta1, arguments.beta2, *step), value_of(arguments.inv_scale));
    }
    adam_ = adam_of(real_dtype(*layers_[0].param), real_dtype(*layers_[0].exp_avg));
  }

  // Updates the moments, and returns the squared norms of parameters and updates.
  std::array<std::vector<double>, 2> measure() {
    std::array<std::vector<double>, 2> partials{std::vector<double>(plan_.chunks), std::vector<double>(plan_.chunks)};
    sweep(Order::kForwards, [&](int64_t i, int64_t chunk, Range range, void* param, void* exp_avg, void* exp_avg_sq) {
      std::array<Lanes, 2> lanes;
      adam_(param, layers_[i].grad->const_data_ptr(), exp_avg, exp_avg_sq, range, numbers_[i], 0, &lanes);
      partials[0][chunk] = join(lanes[0]);
      partials[1][chunk] = join(lanes[1]);
    });
    write_back_moments();
    return {sums_of(plan_, partials[0]), sums_of(plan_, partials[1])};
  }

  // Updates the parameters, whose moments are those of this step already, by updates times the trust ratios of all
  // layers.
  void apply(at::ArrayRef<double> ratios, Order order) {
    sweep(order, [&](int64_t i, int64_t, Range range, void* param, void* exp_avg, void* exp_avg_sq) {
      adam_(param, nullptr, exp_avg, exp_avg_sq, range, numbers_[i], lr_of(i, ratios), nullptr);
    });
    write_back_params();
  }

  // The same, and updates the moments first.
  void update(at::ArrayRef<double> ratios, Order order) {
    sweep(order, [&](int64_t i, int64_t, Range range, void* param, void* exp_avg, void* exp_avg_sq) {
      adam_(param, layers_[i].grad->const_data_ptr(), exp_avg, exp_avg_sq, range, numbers_[i], lr_of(i, ratios),
            nullptr);
    });
    write_back_moments();
    write_back_params();
  }

 private:
  // Calls visit(layer, chunk of the plan, range of the layer, its parameter and moments) for every chunk.
  template <typename Visit>
  void sweep(Order order, const Visit& visit) const {
    for_chunks(plan_, real_size(*layers_[0].param), order, [&](int64_t i, int64_t chunk, Range range) {
      const auto [param, exp_avg, exp_avg_sq] = written_[i];
      visit(i, chunk, range, param, exp_avg, exp_avg_sq);
    });
  }

  double lr_of(int64_t i, at::ArrayRef<double> ratios) const { return lrs_[run_.begin + i] * ratios[run_.begin + i]; }

  void write_back_params() {
    for (size_t i = 0; i < layers_.size(); ++i) {
      write_back(layers_[i].param, arguments_.params[run_.begin + i]);
    }
  }

  void write_back_moments() {
    for (size_t i = 0; i < layers_.size(); ++i) {
      write_back(layers_[i].exp_avg, arguments_.exp_avgs[run_.begin + i]);
      write_back(layers_[i].exp_avg_sq, arguments_.exp_avg_sqs[run_.begin + i]);
      note_write(arguments_.steps[run_.begin + i]);
    }
  }

  const AdamArguments& arguments_;
  const Plan& plan_;
  Range run_;
  at::ArrayRef<double> lrs_;
  std::vector<AdamTensors> layers_;
  std::vector<std::array<void*, 3>> written_;
  std::vector<AdamNumbers<double>> numbers_;
  Adam adam_;
};

at::Tensor vector_of(const std::vector<double>& values) {
  at::Tensor vector = at::empty({static_cast<int64_t>(values.size())}, at::TensorOptions(c10::kDouble));
  std::copy(values.begin(), values.end(), vector.mutable_data_ptr<double>());
  return vector;
}

// What the trust ratios of all layers are decided from, besides norms.
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

// Consecutive layers of so many bytes that a second pass over them reads from cache.
std::vector<Range> runs_of(at::TensorList params, at::TensorList grads, Order order) {
  std::vector<int64_t> bytes;
  bytes.reserve(grads.size());
  for (size_t i = 0; i < grads.size(); ++i) {
    bytes.push_back(static_cast<int64_t>(grads[i].nbytes() + params[i].nbytes()));
  }
  std::vector<Range> runs = runs_within(bytes, kRunBytes);
  if (order == Order::kBackwards) {
    std::reverse(runs.begin(), runs.end());
  }
  return runs;
}

// Measures layers in runs, and writes their trust ratios. measure(run, its plan) returns the squared norms of
// parameters and of gradients or updates; after each run, sweep(run, its plan, all ratios so far) scales it while it is
// in cache.
template <typename Measure, typename Sweep>
void measure_and_sweep(const std::vector<Range>& runs, at::TensorList params, const RatioNumbers& numbers,
                       const at::Tensor& ratios, const Measure& measure, const Sweep& sweep) {
  std::vector<double> values(params.size());
  for (const Range& run : runs) {
    const auto count = static_cast<size_t>(run.end - run.begin);
    const Plan plan = plan_of(params.slice(run.begin, count));
    const auto [param_norms, other_norms] = measure(run, plan);
    for (size_t i = 0; i < count; ++i) {
      const double ratio = numbers.of(run.begin + i, param_norms[i], other_norms[i]);
      values[run.begin + i] = ratios.scalar_type() == c10::kDouble ? ratio : static_cast<float>(ratio);
    }
    sweep(run, plan, values);
  }
  ratios.copy_(vector_of(values));
  note_write(ratios);
}

// The same of gradients, multiplied by inv_scale, to which scales[i] * params[i] is added unless scales is empty.
template <typename Sweep>
void measure_gradients_and_sweep(at::TensorList params, at::TensorList grads, double inv_scale,
                                 const RatioNumbers& numbers, at::ArrayRef<double> scales, Order order,
                                 const at::Tensor& ratios, const Sweep& sweep) {
  const auto measure_run = [&](Range run, const Plan& plan) {
    const auto count = static_cast<size_t>(run.end - run.begin);
    const auto run_params = params.slice(run.begin, count);
    const Addends addends{run_params, scales.empty() ? scales : scales.slice(run.begin, count)};
    return measure<2>(plan, {run_params, grads.slice(run.begin, count)}, inv_scale, addends);
  };
  measure_and_sweep(runs_of(params, grads, order), params, numbers, ratios, measure_run, sweep);
}

Range all_of(at::TensorList tensors) { return {0, static_cast<int64_t>(tensors.size())}; }

}  // namespace

at::Tensor squared_norms(const SquaredNormsArguments& arguments) {
  const auto& [tensors, others, scales, inv_scale] = arguments;
  return vector_of(measure<1>(plan_of(tensors), {tensors}, value_of(inv_scale), {others.value_or(tensors), scales})[0]);
}

at::Tensor trust_ratios(const TrustRatiosArguments& arguments) {
  RatioOptions options;
  options.clip = arguments.clip;
  options.of_updates = arguments.of_updates;
  const RatioNumbers numbers{arguments.weight_decays, arguments.trust_coefs, arguments.eps,
                             values_of(arguments.lrs, arguments.lr_tensor), options};
  const auto* param_squared_norm = arguments.param_squared_norms.const_data_ptr<double>();
  const auto* grad_squared_norm = arguments.grad_squared_norms.const_data_ptr<double>();
  std::vector<double> ratios;
  for (size_t i = 0; i < arguments.weight_decays.size(); ++i) {
    ratios.push_back(numbers.of(i, param_squared_norm[i], grad_squared_norm[i]));
  }
  return vector_of(ratios).to(arguments.dtype);
}

void scale_gradients_(const ScaleGradientsArguments& arguments) {
  const auto& [grads, params] = std::tie(arguments.grads, arguments.params);
  const RatioNumbers numbers{arguments.weight_decays, arguments.trust_coefs, arguments.eps,
                             values_of(arguments.lrs, arguments.lr_tensor), ratio_options(arguments)};
  if (!measures(arguments)) {
    scale_gradients(arguments, plan_of(grads), all_of(grads), values_of_ratios(arguments.ratios, grads.size()),
                    numbers.lrs);
    return;
  }
  // From the last layer to the first: the base optimizer reads the first ones next, from cache.
  measure_gradients_and_sweep(params, grads, value_of(arguments.inv_scale), numbers, decays_in_norm(arguments),
                              Order::kBackwards, *arguments.ratios,
                              [&](Range run, const Plan& plan, at::ArrayRef<double> ratios) {
                                scale_gradients(arguments, plan, run, ratios, numbers.lrs);
                              });
}

void scale_updates_(const ScaleUpdatesArguments& arguments) {
  const auto& [params, old_params] = std::tie(arguments.params, arguments.old_params);
  if (!measures(arguments)) {
    scale_updates(arguments, plan_of(params), all_of(params), values_of_ratios(arguments.ratios, params.size()));
    return;
  }
  RatioOptions options;
  options.clip = arguments.clip;
  options.of_updates = true;
  const RatioNumbers numbers{
      {}, arguments.trust_coefs, arguments.eps, values_of(arguments.lrs, arguments.lr_tensor), options};
  const std::vector<double> scales(params.size(), -1);
  measure_gradients_and_sweep(
      old_params, params, /*inv_scale=*/1, numbers, scales, Order::kBackwards, arguments.ratios,
      [&](Range run, const Plan& plan, at::ArrayRef<double> ratios) { scale_updates(arguments, plan, run, ratios); });
}

void sgd_(const SgdArguments& arguments) {
  const auto& [params, grads] = std::tie(arguments.params, arguments.grads);
  const RatioNumbers numbers{arguments.weight_decays, arguments.trust_coefs, arguments.eps,
                             values_of(arguments.lrs, arguments.lr_tensor), ratio_options(arguments)};
  if (!measures(arguments)) {
    update(arguments, plan_of(params), all_of(params), values_of_ratios(arguments.ratios, params.size()), numbers.lrs,
           Order::kForwards);
    return;
  }
  measure_gradients_and_sweep(params, grads, value_of(arguments.inv_scale), numbers, decays_in_norm(arguments),
                              Order::kForwards, *arguments.ratios,
                              [&](Range run, const Plan& plan, at::ArrayRef<double> ratios) {
                                update(arguments, plan, run, ratios, numbers.lrs, Order::kBackwards);
                              });
}

void adam_(const AdamArguments& arguments) {
  const auto& [params, grads] = std::tie(arguments.params, arguments.grads);
  const double inv_scale = value_of(arguments.inv_scale);
  const bool is_skipped = inv_scale == 0;
  const std::vector<double> lrs = values_of(arguments.lrs, arguments.lr_tensor);
  const std::vector<double> ones(params.size(), 1);
  RatioOptions options = ratio_options(arguments);
  options.of_updates = arguments.of_updates;
  if (!measures(arguments)) {
    if (is_skipped) {
      if (arguments.squared_norms.has_value()) {
        arguments.squared_norms->zero_();
      }
      return;
    }
    const std::vector<double> ratios = values_of_ratios(arguments.ratios, params.size());
    const Plan plan = plan_of(params);
    AdamRun layers(arguments, plan, all_of(params), arguments.of_updates ? ones : ratios, lrs);
    if (arguments.squared_norms.has_value()) {
      auto [squared_norms, of_updates] = layers.measure();
      squared_norms.insert(squared_norms.end(), of_updates.begin(), of_updates.end());
      arguments.squared_norms->copy_(vector_of(squared_norms));
      note_write(*arguments.squared_norms);
    } else if (grads.empty()) {
      layers.apply(ratios, Order::kForwards);
    } else {
      layers.update(arguments.of_updates ? ratios : ones, Order::kForwards);
    }
  } else if (arguments.of_updates) {
    const RatioNumbers numbers{{}, arguments.trust_coefs, arguments.eps, {}, options};
    std::optional<AdamRun> layers;
    measure_and_sweep(
        runs_of(params, grads, Order::kForwards), params, numbers, *arguments.ratios,
        [&](Range run, const Plan& plan) {
          const std::vector<double> zeros(run.end - run.begin);
          return is_skipped ? std::array<std::vector<double>, 2>{zeros, zeros}
                            : layers.emplace(arguments, plan, run, ones, lrs).measure();
        },
        [&](Range, const Plan&, at::ArrayRef<double> ratios) {
          if (!is_skipped) {
            layers->apply(ratios, Order::kBackwards);
          }
        });
  } else {
    const at::ArrayRef<double> none, weight_decays = arguments.decoupled_weight_decay ? none : arguments.weight_decays;
    const RatioNumbers numbers{weight_decays, arguments.trust_coefs, arguments.eps, lrs, options};
    const std::vector<double> scales =
        arguments.decoupled_weight_decay ? std::vector<double>() : decays_in_norm(arguments);
    measure_gradients_and_sweep(params, grads, inv_scale, numbers, scales, Order::kForwards, *arguments.ratios,
                                [&](Range run, const Plan& plan, at::ArrayRef<double> ratios) {
                                  if (!is_skipped) {
                                    AdamRun(arguments, plan, run, ratios, lrs).update(ones, Order::kBackwards);
                                  }
                                });
  }
}

}  // namespace torchlars::cpu
