// The ops on a CPU. All tensors of a call are cut into chunks, which are shared among the threads.
#include <ATen/Parallel.h>
#include <ATen/ops/empty.h>

#include <algorithm>
#include <array>
#include <atomic>
#include <numeric>
#include <utility>
#include <vector>

#include "../arguments.h"
#include "../layers.h"
#include "../plan.h"
#include "../trust_ratio.h"
#include "untyped.h"

namespace torchlars::cpu {
namespace {

// One thread measures and steps a layer of at most this size, parameter and gradient together. Larger ones are shared
// by all threads.
constexpr int64_t kOwnBytes = 4 << 20;
// The same where a base optimizer reads next what was written: one chunk of float32. torch's optimizers give an even
// part of each tensor to each thread, and so do we for larger layers: a thread of the base then finds in the cache of
// its core what it has written. In processes where SGD fused takes 7.5 ms on ResNet-50 (AMD EPYC, two threads),
// LARS(SGD fused) takes 14.4 to 14.8 ms so, and 16.1 to 16.3 ms with 512 KB and all layers of a run cut as if they were
// one. Where SGD fused takes 10 ms, there is no difference.
constexpr int64_t kOwnBytesForBase = 128 << 10;
// Shared layers are measured in runs of at most this size for each thread, and stepped while caches hold them.
constexpr int64_t kSharedBytes = 2 << 20;
constexpr int64_t kGrainBytes = 512 << 10;  // the least work of a thread

// How two tensors are read side by side: so many bytes of one, then of the other, and whether these are prefetched.
struct Turns {
  int64_t bytes;
  bool are_prefetched;
};

// AMD EPYC (Zen 4), one thread, two tensors that no cache holds: 29.0 GB/s in turns of 4 KB, 24.1 in turns of 1 KB, and
// 25.8 at best with software prefetch. On Intel Xeons turns of 1 KB that are prefetched were faster.
const Turns& turns() {
#if defined(__x86_64__) && defined(__GNUC__)
  static const Turns value = __builtin_cpu_is("amd") ? Turns{4 << 10, false} : Turns{1 << 10, true};
#else
  static const Turns value{1 << 10, true};
#endif
  return value;
}

// What a thread takes: a part of all tensors laid end to end, or a part of each tensor.
enum class Share { kOfAll, kOfEach };

// Calls visit(tensor, chunk, range) for every chunk, on all threads. The order does not change which chunks a thread
// takes.
template <typename Visit>
void for_chunks(const Plan& plan, int64_t bytes_per_element, Share share, Order order, const Visit& visit) {
  const int64_t grain = kGrainBytes / bytes_per_element;
  if (share == Share::kOfAll) {
    at::parallel_for(0, plan.work, grain,
                     [&](int64_t begin, int64_t end) { plan.for_chunks_starting_in(begin, end, order, visit); });
    return;
  }
  const int64_t parts = std::min<int64_t>(at::get_num_threads(), divide_up(plan.work, grain));
  at::parallel_for(0, parts, 1, [&](int64_t begin, int64_t end) {
    for (int64_t part = begin; part < end; ++part) {
      plan.for_part(part, parts, order, visit);
    }
  });
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

// Measures the same chunk of kLists tensors of one layer.
template <size_t kLists>
class Squares {
 public:
  explicit Squares(const std::array<c10::ScalarType, kLists>& dtypes)
      : add_squares_of_sums_(add_squares_of_sums_of(dtypes.back())) {
    for (size_t list = 0; list < kLists; ++list) {
      add_squares_[list] = add_squares_of(dtypes[list]);
      sum_of_squares_[list] = sum_of_squares_of(dtypes[list]);
      bytes_per_element_[list] = static_cast<int64_t>(c10::elementSize(dtypes[list]));
    }
  }

  // The partial sum of each tensor; of the last one, that of x + scale * addend unless addend is null.
  std::array<double, kLists> operator()(const std::array<const void*, kLists>& data, const void* addend, double scale,
                                        Range range) const {
    const auto [turn_bytes, are_prefetched] = turns();
    const int64_t turn = turn_bytes / bytes_per_element_[0];
    std::array<double, kLists> sums;
    if (range.end - range.begin <= turn && addend == nullptr) {
      for (size_t list = 0; list < kLists; ++list) {
        sums[list] = sum_of_squares_[list](data[list], range);
      }
      return sums;
    }
    std::array<Lanes, kLists> lanes;
    for (int64_t begin = range.begin; begin < range.end; begin += turn) {
      const Range part{begin, std::min(begin + turn, range.end)};
      const Range next{part.end, std::min(part.end + turn, range.end)};
      for (size_t list = 0; list < kLists; ++list) {
        if (are_prefetched) {
          prefetch(data[list], next, bytes_per_element_[list]);
        }
        if (list == kLists - 1 && addend != nullptr) {
          add_squares_of_sums_(lanes[list], data[list], addend, part, scale);
        } else {
          add_squares_[list](lanes[list], data[list], part);
        }
      }
    }
    for (size_t list = 0; list < kLists; ++list) {
      sums[list] = join(lanes[list]);
    }
    return sums;
  }

 private:
  std::array<AddSquares, kLists> add_squares_;
  std::array<SumOfSquares, kLists> sum_of_squares_;
  AddSquaresOfSums add_squares_of_sums_;
  std::array<int64_t, kLists> bytes_per_element_;
};

// Squared norms of the tensors at some positions of several lists, one vector for each list. The plan is that of these
// tensors. Those of the last list are multiplied by inv_scale, and then their addends are added.
template <size_t kLists>
std::array<std::vector<double>, kLists> measure(const Plan& plan, const std::vector<size_t>& positions,
                                                const std::array<at::TensorList, kLists>& lists, double inv_scale,
                                                const Addends& addends, Share share) {
  constexpr size_t kLast = kLists - 1;
  const bool has_addends = !addends.scales.empty();
  std::array<std::vector<Swept>, kLists> swept;
  std::array<c10::ScalarType, kLists> dtypes;
  std::array<std::vector<double>, kLists> partials;
  std::vector<Swept> added;
  for (size_t list = 0; list < kLists; ++list) {
    swept[list].reserve(positions.size());
    for (const size_t i : positions) {
      if (list == kLast && has_addends) {
        Pair pair(lists[list][i], addends.others[i], addends.scales[i]);
        swept[list].push_back(std::move(pair.grad));
        added.push_back(std::move(pair.param));
      } else {
        swept[list].push_back(dense(lists[list][i]));
      }
    }
    dtypes[list] = real_dtype(*swept[list][0]);
    partials[list].resize(plan.chunks);
  }
  const Squares<kLists> squares(dtypes);
  for_chunks(plan, real_size(lists[0][0]), share, Order::kForwards, [&](int64_t i, int64_t chunk, Range range) {
    std::array<const void*, kLists> data;
    for (size_t list = 0; list < kLists; ++list) {
      data[list] = swept[list][i]->const_data_ptr();
    }
    const void* const addend = has_addends && added[i]->defined() ? added[i]->const_data_ptr() : nullptr;
    const double scale = has_addends ? addends.scales[positions[i]] / inv_scale : 0;
    const std::array<double, kLists> sums = squares(data, addend, scale, range);
    for (size_t list = 0; list < kLists; ++list) {
      partials[list][chunk] = sums[list];
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

// The learning rate of each layer, if any were given.
struct Lrs {
  Lrs(at::ArrayRef<double> lrs, const std::optional<at::Tensor>& lr_tensor)
      : values(lrs), factor(lr_tensor.has_value() ? *lr_tensor->const_data_ptr<double>() : 1) {}

  double of(size_t layer) const { return values[layer] * factor; }

  at::ArrayRef<double> values;
  double factor;
};

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

at::Tensor vector_of(const std::vector<double>& values) {
  at::Tensor vector = at::empty({static_cast<int64_t>(values.size())}, at::TensorOptions(c10::kDouble));
  std::copy(values.begin(), values.end(), vector.mutable_data_ptr<double>());
  return vector;
}

// What the trust ratios of all layers are decided from, besides norms.
struct RatioNumbers {
  double of(size_t layer, double param_squared_norm, double grad_squared_norm) const {
    return trust_ratio(param_squared_norm, grad_squared_norm, weight_decays.empty() ? 0 : weight_decays[layer],
                       trust_coefs[layer], eps[layer], lrs.values.empty() ? 1 : lrs.of(layer), options);
  }

  at::ArrayRef<double> weight_decays;  // empty: nothing decays
  at::ArrayRef<double> trust_coefs;
  at::ArrayRef<double> eps;
  Lrs lrs;
  RatioOptions options;
};

// Where threads write. To be called before they start: it copies memory that is copy-on-write.
void* writable(const Swept& swept) { return swept->mutable_data_ptr(); }

const void* readable(const Swept& swept) { return swept->defined() ? swept->const_data_ptr() : nullptr; }

// Whether all tensors of a layer are there, and the user's own: no copies.
bool are_borrowed(const Pair& layer) {
  return layer.grad.unsafeIsBorrowed() && layer.param.unsafeIsBorrowed() && layer.param->defined();
}

bool are_borrowed(const Triple& layer) {
  return layer.param.unsafeIsBorrowed() && layer.grad.unsafeIsBorrowed() && layer.momentum.unsafeIsBorrowed();
}

bool are_borrowed(const AdamTensors& layer) {
  return layer.param.unsafeIsBorrowed() && layer.grad.unsafeIsBorrowed() && layer.exp_avg.unsafeIsBorrowed() &&
         layer.exp_avg_sq.unsafeIsBorrowed();
}

// The memory of a layer.
struct Layer {
  size_t index = 0;   // in the lists of the op
  int64_t numel = 0;  // of real elements
  // The two whose squared norms are measured; of scale_updates_ the old parameter, and the new one.
  const void* param = nullptr;
  const void* grad = nullptr;
  void* written = nullptr;          // the one of these that the op writes
  std::array<void*, 2> state = {};  // momentum or codes, and scales; exp_avg and exp_avg_sq
};

Plan plan_of(const std::vector<Layer>& layers) {
  std::vector<int64_t> numels;
  numels.reserve(layers.size());
  for (const Layer& layer : layers) {
    numels.push_back(layer.numel);
  }
  return Plan(std::move(numels));
}

// What the classes of the ops have in common, each of which knows what an op does to one layer:
//
//   Tensors                 the tensors of a layer, some of which may be copies that kernels can take
//   tensors(), layer()      these, and their memory
//   apply()                 takes a chunk of the step, given the trust ratio
//   write_back()            writes what was computed in copies, and notes the writes
//   squared_norms_of_chunk  the partial sums of the parameter and of its gradient or update
//   completed()             the squared norms, given the sums of these
//   squared_norms()         the same of several layers, measured by all threads
template <typename Arguments>
class Op {
 public:
  size_t size() const { return params_.size(); }
  int64_t bytes_per_element() const { return static_cast<int64_t>(c10::elementSize(dtype_)); }
  int64_t numel(size_t i) const { return real_numel(grads_[i]); }
  bool is_skipped() const { return inv_scale_ == 0; }

  std::array<double, 2> squared_norms_of_chunk(const Layer& layer, Range range) const {
    const double scale = scales_.empty() ? 0 : scales_[layer.index];
    return squares_({layer.param, layer.grad}, scale == 0 ? nullptr : layer.param, scale / inv_scale_, range);
  }

  std::array<double, 2> completed(const std::array<double, 2>& sums) const {
    return {sums[0], unscaled_squared_norm(sums[1], inv_scale_)};
  }

  std::array<std::vector<double>, 2> squared_norms(const std::vector<Layer>& layers, const Plan& plan,
                                                   Share share) const {
    std::vector<size_t> positions;
    for (const Layer& layer : layers) {
      positions.push_back(layer.index);
    }
    return measure<2>(plan, positions, {params_, grads_}, inv_scale_, {params_, scales_}, share);
  }

 protected:
  // Ratios are decided from the norms of params and of inv_scale * grads + scales * params; without scales, nothing is
  // added.
  Op(const Arguments& arguments, at::TensorList params, at::TensorList grads, double inv_scale,
     std::vector<double> scales)
      : arguments_(arguments),
        dtype_(c10::toRealValueType(swept_dtype(grads[0], params[0]))),
        inv_scale_(inv_scale),
        lrs_(arguments.lrs, arguments.lr_tensor),
        params_(params),
        grads_(grads),
        scales_(std::move(scales)),
        squares_({real_dtype(params[0]), real_dtype(grads[0])}) {}

  // The dtype of state that kernels take beside parameters of dtype_.
  c10::ScalarType state_dtype(const at::Tensor& state) const {
    return state.scalar_type() == c10::kFloat && dtype_ != c10::kDouble ? c10::kFloat : dtype_;
  }

  const Arguments& arguments_;
  c10::ScalarType dtype_;
  double inv_scale_;
  Lrs lrs_;

 private:
  at::TensorList params_;
  at::TensorList grads_;
  std::vector<double> scales_;
  Squares<2> squares_;
};

class ScaleGradients : public Op<ScaleGradientsArguments> {
 public:
  static constexpr int64_t kOwnBytes = kOwnBytesForBase;
  using Tensors = Pair;

  explicit ScaleGradients(const ScaleGradientsArguments& arguments)
      : Op(arguments, arguments.params, arguments.grads, value_of(arguments.inv_scale), decays_in_norm(arguments)),
        adapt_(adapt_of(dtype_)) {}

  Tensors tensors(size_t i) const {
    const at::Tensor &grad = arguments_.grads[i], &param = arguments_.params[i];
    const bool is_measured_beside =
        measures(arguments_) && grad.scalar_type() == param.scalar_type() && same_strides(grad, param);
    return {grad, param, is_measured_beside ? 1 : arguments_.weight_decays[i]};
  }

  Layer layer(const Tensors& tensors, size_t i) const {
    void* const grad = writable(tensors.grad);
    return {i, numel(i), readable(tensors.param), grad, grad, {}};
  }

  void apply(const Layer& layer, Range range, double ratio) const {
    const double weight_decay = arguments_.weight_decays[layer.index];
    adapt_(layer.written, weight_decay == 0 ? nullptr : layer.param, range,
           arguments_.maximize ? -weight_decay : weight_decay,
           arguments_.lr_in_momentum ? ratio * lrs_.of(layer.index) : ratio, inv_scale_);
  }

  void write_back(const Tensors& tensors, size_t i) const { torchlars::write_back(tensors.grad, arguments_.grads[i]); }

 private:
  Adapt adapt_;
};

class ScaleUpdates : public Op<ScaleUpdatesArguments> {
 public:
  static constexpr int64_t kOwnBytes = kOwnBytesForBase;
  using Tensors = Pair;  // the parameter in the place of the gradient, and beside it the old one

  explicit ScaleUpdates(const ScaleUpdatesArguments& arguments)
      : Op(arguments, arguments.old_params, arguments.params, /*inv_scale=*/1,
           std::vector<double>(arguments.params.size(), -1)),
        scale_update_(scale_update_of(dtype_)) {}

  Tensors tensors(size_t i) const { return {arguments_.params[i], arguments_.old_params[i], 1.0}; }

  Layer layer(const Tensors& tensors, size_t i) const {
    void* const param = writable(tensors.grad);
    return {i, numel(i), readable(tensors.param), param, param, {}};
  }

  // What has the ratio 1 is not written.
  void apply(const Layer& layer, Range range, double ratio) const {
    if (ratio != 1) {
      scale_update_(layer.written, layer.param, range, ratio);
    }
  }

  void write_back(const Tensors& tensors, size_t i) const { torchlars::write_back(tensors.grad, arguments_.params[i]); }

 private:
  ScaleUpdate scale_update_;
};

class Sgd : public Op<SgdArguments> {
 public:
  static constexpr int64_t kOwnBytes = cpu::kOwnBytes;
  using Tensors = Triple;

  explicit Sgd(const SgdArguments& arguments)
      : Op(arguments, arguments.params, arguments.grads, value_of(arguments.inv_scale), decays_in_norm(arguments)) {
    const at::TensorList buffers = arguments.momentum_buffers;
    if (arguments.momentum_scales.has_value()) {
      sgd_blocks_ = sgd_blocks_of(dtype_);
    } else {
      sgd_ = sgd_of(dtype_, buffers.empty() ? dtype_ : state_dtype(buffers[0]));
    }
  }

  Tensors tensors(size_t i) const {
    const at::TensorList buffers = arguments_.momentum_buffers;
    return {arguments_.params[i], arguments_.grads[i], buffers.empty() ? nullptr : &buffers[i]};
  }

  Layer layer(const Tensors& tensors, size_t i) const {
    void* const param = writable(tensors.param);
    void* const momentum = tensors.momentum->defined() ? writable(tensors.momentum) : nullptr;
    void* const scales = sgd_blocks_ ? (*arguments_.momentum_scales)[i].mutable_data_ptr() : nullptr;
    return {i, numel(i), param, readable(tensors.grad), param, {momentum, scales}};
  }

  void apply(const Layer& layer, Range range, double ratio) const {
    const size_t i = layer.index;
    const auto [momentum, scales] = layer.state;
    const SgdNumbers<double> numbers(ratio, arguments_.weight_decays[i], arguments_.maximize, lrs_.of(i),
                                     arguments_.lr_in_momentum, arguments_.momentums[i], arguments_.dampenings[i],
                                     inv_scale_);
    if (sgd_blocks_) {
      sgd_blocks_(layer.written, layer.grad, momentum, static_cast<float*>(scales), rows_of(arguments_, i), range,
                  arguments_.nesterov, numbers);
    } else {
      sgd_(layer.written, layer.grad, momentum, range, arguments_.nesterov, numbers);
    }
  }

  void write_back(const Tensors& tensors, size_t i) const {
    torchlars::write_back(tensors.param, arguments_.params[i]);
    if (tensors.momentum->defined()) {
      torchlars::write_back(tensors.momentum, arguments_.momentum_buffers[i]);
    }
    if (sgd_blocks_) {
      note_write((*arguments_.momentum_scales)[i]);
    }
  }

 private:
  SgdRange sgd_ = nullptr;
  SgdBlocks sgd_blocks_ = nullptr;  // where momentum is in 8 bits
};

class Adam : public Op<AdamArguments> {
 public:
  static constexpr int64_t kOwnBytes = cpu::kOwnBytes;
  using Tensors = AdamTensors;

  explicit Adam(const AdamArguments& arguments)
      : Op(arguments, arguments.params, arguments.grads.empty() ? arguments.params : arguments.grads,
           value_of(arguments.inv_scale),
           arguments.decoupled_weight_decay ? std::vector<double>() : decays_in_norm(arguments)),
        adam_(adam_of(dtype_, state_dtype(arguments.exp_avgs[0]))),
        corrections_(size()) {}

  Tensors tensors(size_t i) const { return {arguments_, i}; }

  // Counts the layer's step, if its moments are to be updated.
  Layer layer(const Tensors& tensors, size_t i) {
    auto* const step = arguments_.steps[i].mutable_data_ptr<float>();
    if (!arguments_.grads.empty()) {
      *step += 1;
    }
    if (i == 0 || *step != last_step_) {  // of most layers it is the same, and powers take long
      last_step_ = *step;
      last_corrections_ = bias_corrections(arguments_.beta1, arguments_.beta2, *step);
    }
    corrections_[i] = last_corrections_;
    void* const param = writable(tensors.param);
    const std::array<void*, 2> moments{writable(tensors.exp_avg), writable(tensors.exp_avg_sq)};
    return {i, numel(i), param, readable(tensors.grad), param, moments};
  }

  // Updates the moments if the ratio is that of the update.
  std::array<double, 2> squared_norms_of_chunk(const Layer& layer, Range range) const {
    if (!arguments_.of_updates) {
      return Op::squared_norms_of_chunk(layer, range);
    }
    if (is_skipped()) {
      return {0, 0};
    }
    std::array<Lanes, 2> lanes;
    adam_(layer.written, layer.grad, layer.state[0], layer.state[1], range, numbers(layer, 1), 0, &lanes);
    return {join(lanes[0]), join(lanes[1])};
  }

  std::array<double, 2> completed(const std::array<double, 2>& sums) const {
    return arguments_.of_updates ? sums : Op::completed(sums);
  }

  std::array<std::vector<double>, 2> squared_norms(const std::vector<Layer>& layers, const Plan& plan,
                                                   Share share) const {
    if (!arguments_.of_updates) {
      return Op::squared_norms(layers, plan, share);
    }
    std::array<std::vector<double>, 2> partials{std::vector<double>(plan.chunks), std::vector<double>(plan.chunks)};
    for_chunks(plan, bytes_per_element(), share, Order::kForwards, [&](int64_t i, int64_t chunk, Range range) {
      const auto [param_sum, update_sum] = squared_norms_of_chunk(layers[i], range);
      partials[0][chunk] = param_sum;
      partials[1][chunk] = update_sum;
    });
    return {sums_of(plan, partials[0]), sums_of(plan, partials[1])};
  }

  // Updates the moments, too, unless they are those of this step already.
  void apply(const Layer& layer, Range range, double ratio) const {
    const bool are_updated = arguments_.of_updates && measures(arguments_);
    adam_(layer.written, are_updated ? nullptr : layer.grad, layer.state[0], layer.state[1], range,
          numbers(layer, arguments_.of_updates ? 1 : ratio), lrs_.of(layer.index) * (arguments_.of_updates ? ratio : 1),
          nullptr);
  }

  void write_back(const Tensors& tensors, size_t i) const {
    if (!arguments_.grads.empty()) {
      write_back_state(tensors, i);
    }
    torchlars::write_back(tensors.param, arguments_.params[i]);
  }

  void write_back_state(const Tensors& tensors, size_t i) const {
    torchlars::write_back(tensors.exp_avg, arguments_.exp_avgs[i]);
    torchlars::write_back(tensors.exp_avg_sq, arguments_.exp_avg_sqs[i]);
    note_write(arguments_.steps[i]);
  }

 private:
  AdamNumbers<double> numbers(const Layer& layer, double grad_ratio) const {
    return {grad_ratio,
            arguments_.weight_decays[layer.index],
            arguments_.decoupled_weight_decay,
            arguments_.maximize,
            arguments_.beta1,
            arguments_.beta2,
            arguments_.adam_eps,
            corrections_[layer.index],
            inv_scale_};
  }

  AdamRange adam_;
  std::vector<BiasCorrections> corrections_;
  float last_step_ = 0;
  BiasCorrections last_corrections_{};
};

// Calls visit(range) for every chunk of a tensor.
template <typename Visit>
void for_chunks_of(int64_t numel, Order order, const Visit& visit) {
  for_blocks(0, num_chunks(numel), order, [&](int64_t chunk, int64_t end) {
    for (; chunk < end; ++chunk) {
      visit(chunk_range(numel, chunk));
    }
  });
}

// Prefetches the begin of a layer's memory, which hardware cannot foresee, if there is such a layer. It must be
// inlined, as the functions that it calls: else GCC takes a function that only prefetches to be without effect, and
// omits calls.
C10_ALWAYS_INLINE void prefetch_begin(const std::vector<Layer>& layers, size_t i) {
  if (i >= layers.size()) {
    return;
  }
  constexpr int64_t kBytes = 256;
  const Layer& layer = layers[i];
  for (const void* const data : {layer.param, layer.grad, static_cast<const void*>(layer.state[0])}) {
    if (data != nullptr) {
      cpu::prefetch(data, static_cast<const char*>(data) + kBytes);
    }
  }
}

// Calls visit(layer) for every layer, on all threads. Each takes a share of the layers, then the next one.
template <typename Visit>
void for_layers(const std::vector<Layer>& layers, int64_t bytes_per_element, const Visit& visit) {
  std::vector<int64_t> bytes;
  bytes.reserve(layers.size());
  for (const Layer& layer : layers) {
    bytes.push_back((layer.numel + num_chunks(layer.numel) * kChunkWork) * bytes_per_element);
  }
  const std::vector<Range> shares = runs_within(bytes, kGrainBytes);
  std::atomic<size_t> next{0};
  at::parallel_for(0, std::min<int64_t>(shares.size(), at::get_num_threads()), 1, [&](int64_t, int64_t) {
    for (size_t share = next++; share < shares.size(); share = next++) {
      for (int64_t i = shares[share].begin; i < shares[share].end; ++i) {
        prefetch_begin(layers, i + 2);
        visit(layers[i]);
      }
    }
  });
}

// All layers of an op, for one pass over them.
template <typename AnyOp>
struct AllLayers {
  explicit AllLayers(AnyOp& op) {
    tensors.reserve(op.size());
    layers.reserve(op.size());
    for (size_t i = 0; i < op.size(); ++i) {
      layers.push_back(op.layer(tensors.emplace_back(op.tensors(i)), i));
    }
  }

  std::vector<typename AnyOp::Tensors> tensors;
  std::vector<Layer> layers;
};

// Takes the step of all layers, given their trust ratios.
template <typename AnyOp>
void step(AnyOp op, const std::vector<double>& ratios) {
  if (op.is_skipped()) {
    return;
  }
  const AllLayers<AnyOp> all(op);
  for_chunks(plan_of(all.layers), op.bytes_per_element(), Share::kOfAll, Order::kForwards,
             [&](int64_t i, int64_t, Range range) {
               if (range.begin == 0) {
                 prefetch_begin(all.layers, i + 2);
               }
               op.apply(all.layers[i], range, ratios[i]);
             });
  for (size_t i = 0; i < op.size(); ++i) {
    op.write_back(all.tensors[i], i);
  }
}

// Updates the moments of all layers, and writes the squared norms of parameters and updates.
void measure_updates(Adam op, const at::Tensor& written) {
  if (op.is_skipped()) {
    written.zero_();
    return;
  }
  const AllLayers<Adam> all(op);
  auto [squared_norms, of_updates] = op.squared_norms(all.layers, plan_of(all.layers), Share::kOfAll);
  squared_norms.insert(squared_norms.end(), of_updates.begin(), of_updates.end());
  written.copy_(vector_of(squared_norms));
  note_write(written);
  for (size_t i = 0; i < op.size(); ++i) {
    op.write_back_state(all.tensors[i], i);
  }
}

// Measures all layers, writes their trust ratios, and takes the step. A layer is stepped right after it is measured,
// while caches hold it. Most layers are taken by one thread each, in one parallel region, which begins when the memory
// of all is known. Large ones, and those of which kernels take copies, are shared by all threads before, as many at a
// time as the caches of all hold.
template <typename AnyOp>
void measure_and_step(AnyOp op, const RatioNumbers& numbers, Order order, const at::Tensor& ratios) {
  void* const written = ratios.mutable_data_ptr();
  const bool in_double = ratios.scalar_type() == c10::kDouble;
  const auto decide = [&](size_t i, double param_squared_norm, double other_squared_norm) -> double {
    const double ratio = numbers.of(i, param_squared_norm, other_squared_norm);
    return in_double ? static_cast<double*>(written)[i] = ratio
                     : static_cast<float*>(written)[i] = static_cast<float>(ratio);
  };
  std::vector<Layer> own, shared;
  std::vector<typename AnyOp::Tensors> tensors_of_shared;
  int64_t shared_bytes = 0;
  const int64_t limit = kSharedBytes * at::get_num_threads();
  const auto step_shared = [&] {
    if (shared.empty()) {
      return;
    }
    const Plan plan = plan_of(shared);
    const auto [param_norms, other_norms] = op.squared_norms(shared, plan, Share::kOfEach);
    std::vector<double> of_shared;
    for (size_t i = 0; i < shared.size(); ++i) {
      of_shared.push_back(decide(shared[i].index, param_norms[i], other_norms[i]));
    }
    if (!op.is_skipped()) {
      for_chunks(plan, op.bytes_per_element(), Share::kOfEach, Order::kBackwards,
                 [&](int64_t i, int64_t, Range range) { op.apply(shared[i], range, of_shared[i]); });
      for (size_t i = 0; i < shared.size(); ++i) {
        op.write_back(tensors_of_shared[i], shared[i].index);
      }
    }
    shared.clear();
    tensors_of_shared.clear();
    shared_bytes = 0;
  };
  own.reserve(op.size());
  for (size_t n = 0; n < op.size(); ++n) {
    const size_t i = order == Order::kForwards ? n : op.size() - 1 - n;
    if (op.is_skipped()) {  // only norms are read
      Layer layer;
      layer.index = i;
      layer.numel = op.numel(i);
      shared.push_back(layer);
      continue;
    }
    typename AnyOp::Tensors tensors = op.tensors(i);
    own.push_back(op.layer(tensors, i));
    const int64_t bytes = 2 * own.back().numel * op.bytes_per_element();
    if (are_borrowed(tensors) && bytes <= AnyOp::kOwnBytes) {
      op.write_back(tensors, i);  // without copies it only notes the writes
      continue;
    }
    if (shared_bytes + bytes > limit) {
      step_shared();
    }
    shared.push_back(own.back());
    own.pop_back();
    tensors_of_shared.push_back(std::move(tensors));
    shared_bytes += bytes;
  }
  step_shared();
  for_layers(own, op.bytes_per_element(), [&](const Layer& layer) {
    std::array<double, 2> sums{};
    for_chunks_of(layer.numel, Order::kForwards, [&](Range range) {
      const auto [param_sum, other_sum] = op.squared_norms_of_chunk(layer, range);
      sums[0] += param_sum;
      sums[1] += other_sum;
    });
    const auto [param_squared_norm, other_squared_norm] = op.completed(sums);
    const double ratio = decide(layer.index, param_squared_norm, other_squared_norm);
    for_chunks_of(layer.numel, Order::kBackwards, [&](Range range) { op.apply(layer, range, ratio); });
  });
  note_write(ratios);
}

}  // namespace

at::Tensor squared_norms(const SquaredNormsArguments& arguments) {
  const auto& [tensors, others, scales, inv_scale] = arguments;
  std::vector<size_t> positions(tensors.size());
  std::iota(positions.begin(), positions.end(), 0);
  return vector_of(measure<1>(plan_of(tensors), positions, {tensors}, value_of(inv_scale),
                              {others.value_or(tensors), scales}, Share::kOfAll)[0]);
}

at::Tensor trust_ratios(const TrustRatiosArguments& arguments) {
  RatioOptions options;
  options.clip = arguments.clip;
  options.of_updates = arguments.of_updates;
  const RatioNumbers numbers{arguments.weight_decays, arguments.trust_coefs, arguments.eps,
                             Lrs(arguments.lrs, arguments.lr_tensor), options};
  const auto* param_squared_norm = arguments.param_squared_norms.const_data_ptr<double>();
  const auto* grad_squared_norm = arguments.grad_squared_norms.const_data_ptr<double>();
  std::vector<double> ratios;
  for (size_t i = 0; i < arguments.weight_decays.size(); ++i) {
    ratios.push_back(numbers.of(i, param_squared_norm[i], grad_squared_norm[i]));
  }
  return vector_of(ratios).to(arguments.dtype);
}

void scale_gradients_(const ScaleGradientsArguments& arguments) {
  if (!measures(arguments)) {
    step(ScaleGradients(arguments), values_of_ratios(arguments.ratios, arguments.grads.size()));
    return;
  }
  const RatioNumbers numbers{arguments.weight_decays, arguments.trust_coefs, arguments.eps,
                             Lrs(arguments.lrs, arguments.lr_tensor), ratio_options(arguments)};
  // From the last layer to the first: the base optimizer reads the first ones next, from cache.
  measure_and_step(ScaleGradients(arguments), numbers, Order::kBackwards, *arguments.ratios);
}

void scale_updates_(const ScaleUpdatesArguments& arguments) {
  if (!measures(arguments)) {
    step(ScaleUpdates(arguments), values_of_ratios(arguments.ratios, arguments.params.size()));
    return;
  }
  RatioOptions options;
  options.clip = arguments.clip;
  options.of_updates = true;
  const RatioNumbers numbers{
      {}, arguments.trust_coefs, arguments.eps, Lrs(arguments.lrs, arguments.lr_tensor), options};
  measure_and_step(ScaleUpdates(arguments), numbers, Order::kBackwards, arguments.ratios);
}

void sgd_(const SgdArguments& arguments) {
  if (!measures(arguments)) {
    step(Sgd(arguments), values_of_ratios(arguments.ratios, arguments.params.size()));
    return;
  }
  const RatioNumbers numbers{arguments.weight_decays, arguments.trust_coefs, arguments.eps,
                             Lrs(arguments.lrs, arguments.lr_tensor), ratio_options(arguments)};
  measure_and_step(Sgd(arguments), numbers, Order::kForwards, *arguments.ratios);
}

void adam_(const AdamArguments& arguments) {
  Adam op(arguments);
  if (arguments.squared_norms.has_value()) {
    measure_updates(std::move(op), *arguments.squared_norms);
  } else if (!measures(arguments)) {
    step(std::move(op), values_of_ratios(arguments.ratios, arguments.params.size()));
  } else {
    RatioOptions options = ratio_options(arguments);
    options.of_updates = arguments.of_updates;
    const bool decays = !arguments.of_updates && !arguments.decoupled_weight_decay;
    const auto weight_decays = decays ? arguments.weight_decays : at::ArrayRef<double>();
    const Lrs lrs(arguments.of_updates ? at::ArrayRef<double>() : arguments.lrs, arguments.lr_tensor);
    const RatioNumbers numbers{weight_decays, arguments.trust_coefs, arguments.eps, lrs, options};
    measure_and_step(std::move(op), numbers, Order::kForwards, *arguments.ratios);
  }
}

}  // namespace torchlars::cpu
