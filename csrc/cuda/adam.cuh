// The CUDA kernels of Adam. As kernels.cuh, without ATen and with few features of CUDA.
//
// A step with trust ratios of updates is two launches: `measure_adam` updates the moments and sums the squares of
// parameters and updates, `update_adam` computes the same updates again, from moments that may still be in cache, and
// applies them. Any other step is one of `measure` and `update_adam`, which updates the moments as well.
//
// No block writes a layer's step while others read it. `measure` increments it, in a launch of its own or in the one
// that measures gradients; where there is none of these, `measure_adam` leaves the new step in Partials, and
// `update_adam` writes it.
#pragma once

#include <cstdint>

#include "../adam.h"
#include "kernels.cuh"

namespace torchlars::cuda {

struct AdamLayer {
  int64_t numel = 0;
  void* param = nullptr;
  const void* grad = nullptr;  // for update_adam null: the moments are those of this step already
  void* exp_avg = nullptr;
  void* exp_avg_sq = nullptr;
  float* step = nullptr;
  double weight_decay = 0;
  double trust_coef = 0;
  double eps = 0;
  double lr = 0;
};

// What all layers of a launch have in common.
struct AdamOptions {
  RatioOptions ratio;
  bool maximize = false;
  bool decoupled_weight_decay = false;
  double beta1 = 0;
  double beta2 = 0;
  double adam_eps = 0;
  const double* lr_tensor = nullptr;  // null: 1
  const float* inv_scale = nullptr;   // null: 1; where it is 0 only ratios and partial sums are written
};
static_assert(fits_beside_layers<AdamOptions>);

// Updates are those of unscaled gradients.
__device__ inline float scale_of_sums(const AdamOptions& options) {
  return options.ratio.of_updates ? 1 : value_of(options.inv_scale);
}

// Updates are measured before lr multiplies them, and they hold the weight decay; decoupled from gradients, it has no
// part in their ratio.
template <typename Ratio>
__device__ inline Ratio trust_ratio_of(const AdamLayer& layer, const AdamOptions& options, double param_squared_norm,
                                       double squared_norm) {
  const bool of_updates = options.ratio.of_updates;
  const double weight_decay = of_updates || options.decoupled_weight_decay ? 0 : layer.weight_decay;
  const double lr = of_updates ? 1 : lr_of(layer, options);
  return static_cast<Ratio>(
      trust_ratio(param_squared_norm, squared_norm, weight_decay, layer.trust_coef, layer.eps, lr, options.ratio));
}

// The numbers of a layer's step, given its trust ratio of gradients and, in the block's first thread, which of its
// steps this is. One thread computes the corrections, as powers and roots in double are slow.
template <typename Compute>
__device__ inline AdamNumbers<Compute> numbers_of(const AdamLayer& layer, const AdamOptions& options, Compute ratio,
                                                  float step) {
  BiasCorrections corrections{};
  if (threadIdx.x == 0) {
    corrections = bias_corrections(options.beta1, options.beta2, step);
  }
  return AdamNumbers<Compute>(ratio, layer.weight_decay, options.decoupled_weight_decay, options.maximize,
                              options.beta1, options.beta2, options.adam_eps, broadcast(corrections),
                              value_of(options.inv_scale));
}

// A part of the step of one element. kMoments: updates the moments. kApplies: updates the parameter. Returns the
// update. One that two passes compute is that of the moments as they are stored.
template <bool kMoments, bool kApplies, typename T, typename M, typename Compute>
__device__ inline Compute adam_one(T& param, T grad, M& exp_avg, M& exp_avg_sq, const AdamNumbers<Compute>& numbers,
                                   Compute lr) {
  const auto w = static_cast<Compute>(param);
  auto m = static_cast<Compute>(exp_avg), v = static_cast<Compute>(exp_avg_sq);
  if constexpr (kMoments) {
    const auto g = static_cast<Compute>(grad);
    numbers.weight_decay != 0 ? update_moments<true>(w, g, m, v, numbers) : update_moments<false>(w, g, m, v, numbers);
    exp_avg = static_cast<M>(m);
    exp_avg_sq = static_cast<M>(v);
    if constexpr (!kApplies) {
      m = static_cast<Compute>(exp_avg);
      v = static_cast<Compute>(exp_avg_sq);
    }
  }
  const Compute update =
      numbers.decoupled_weight_decay != 0 ? adam_update<true>(w, m, v, numbers) : adam_update<false>(w, m, v, numbers);
  if constexpr (kApplies) {
    param = static_cast<T>(w - lr * update);
  }
  return update;
}

// A thread's sums of squares.
struct AdamSums {
  double params = 0;
  double updates = 0;
};

// A part of the step of packs, in place. What is not applied is added to sums.
template <bool kAligned, bool kMoments, bool kApplies, typename T, typename M, typename Compute>
__device__ void adam_packs(T* __restrict__ param, const T* __restrict__ grad, M* __restrict__ exp_avg,
                           M* __restrict__ exp_avg_sq, int64_t num_packs, const AdamNumbers<Compute>& numbers,
                           Compute lr, AdamSums& sums) {
  constexpr int kSize = Pack<T>::kSize;
  constexpr int kUnroll = kAligned && sizeof(T) > 2 ? 2 : 1;  // 2 take up to 124 registers for 16-bit numbers
  for (int64_t first = threadIdx.x; first < num_packs; first += kUnroll * kThreads) {
    Pack<T> params[kUnroll] = {}, grads[kUnroll] = {};
    Pack<M, kSize> exp_avgs[kUnroll], exp_avg_sqs[kUnroll];
    Pack<Compute, kSize> updates[kUnroll] = {};
#pragma unroll
    for (int u = 0; u < kUnroll; ++u) {
      if (const int64_t pack = first + u * kThreads; pack < num_packs) {
        params[u] = load_pack<kAligned, kSize>(param, pack);
        if constexpr (kMoments) {
          grads[u] = load_pack<kAligned, kSize>(grad, pack);
        }
        exp_avgs[u] = load_pack<kAligned, kSize>(exp_avg, pack);
        exp_avg_sqs[u] = load_pack<kAligned, kSize>(exp_avg_sq, pack);
      }
    }
#pragma unroll
    for (int u = 0; u < kUnroll; ++u) {
      if (const int64_t pack = first + u * kThreads; pack < num_packs) {
#pragma unroll
        for (int i = 0; i < kSize; ++i) {
          updates[u].values[i] = adam_one<kMoments, kApplies>(
              params[u].values[i], grads[u].values[i], exp_avgs[u].values[i], exp_avg_sqs[u].values[i], numbers, lr);
        }
        if constexpr (kMoments) {
          store_pack<kAligned>(exp_avg, pack, exp_avgs[u]);
          store_pack<kAligned>(exp_avg_sq, pack, exp_avg_sqs[u]);
        }
        if constexpr (kApplies) {
          store_pack<kAligned>(param, pack, params[u]);
        }
      }
    }
    if constexpr (!kApplies) {
      add_squares<T>(sums.params, Numbers<kAligned, T>{}, params);
      add_squares<Compute>(sums.updates, Numbers<kAligned, Compute, kSize>{}, updates);
    }
  }
}

// A part of the step of a chunk.
template <bool kMoments, bool kApplies, typename T, typename M, typename Compute>
__device__ void adam_chunk(const AdamLayer& layer, Range range, const AdamNumbers<Compute>& numbers, Compute lr,
                           AdamSums& sums) {
  T* const param = static_cast<T*>(layer.param) + range.begin;
  const T* const grad = kMoments ? static_cast<const T*>(layer.grad) + range.begin : nullptr;
  M* const exp_avg = static_cast<M*>(layer.exp_avg) + range.begin;
  M* const exp_avg_sq = static_cast<M*>(layer.exp_avg_sq) + range.begin;
  const int64_t count = range.end - range.begin;
  const int64_t num_packs = count / Pack<T>::kSize;
  if (is_aligned(param) && is_aligned(grad) && is_aligned(exp_avg) && is_aligned(exp_avg_sq)) {
    adam_packs<true, kMoments, kApplies>(param, grad, exp_avg, exp_avg_sq, num_packs, numbers, lr, sums);
  } else {
    adam_packs<false, kMoments, kApplies>(param, grad, exp_avg, exp_avg_sq, num_packs, numbers, lr, sums);
  }
  const int64_t i = num_packs * Pack<T>::kSize + threadIdx.x;  // what fills no pack
  if (i < count) {
    const double update =
        adam_one<kMoments, kApplies>(param[i], kMoments ? grad[i] : T(0), exp_avg[i], exp_avg_sq[i], numbers, lr);
    if constexpr (!kApplies) {
      const auto w = static_cast<double>(param[i]);
      sums.params = fma(w, w, sums.params);
      sums.updates = fma(update, update, sums.updates);
    }
  }
}

// Updates moments, and writes partial sums of squares of parameters and of updates, of a skipped step zeros. M: the
// type of the moments. The steps were incremented before, unless there is room for them in partials.
template <typename T, typename M, typename Compute, typename AnyLayers>
__global__ void __launch_bounds__(kThreads)
    measure_adam(const __grid_constant__ AnyLayers layers, Partials partials, AdamOptions options) {
  const Place place = place_of(layers, blockIdx.x);
  const AdamLayer& layer = layers.layer[place.layer];
  wait_for_earlier_kernels();
  AdamSums sums;
  if (value_of(options.inv_scale) != 0) {
    float step = 0;
    if (threadIdx.x == 0) {
      step = *layer.step;
      if (partials.steps != nullptr) {
        step += 1;
        partials.steps[place.chunk] = step;
      }
    }
    const AdamNumbers<Compute> numbers = numbers_of<Compute>(layer, options, 1, step);
    adam_chunk<true, false, T, M>(layer, place.range, numbers, Compute(0), sums);
  }
  const double of_params = block_sum(sums.params);
  const double of_updates = block_sum(sums.updates);
  if (threadIdx.x == 0) {
    partials.params[place.chunk] = of_params;
    partials.grads[place.chunk] = of_updates;
  }
}

// Updates parameters, and moments as well where there are gradients and measure_adam has not just read them.
template <typename T, typename M, typename Compute, typename AnyLayers>
__global__ void __launch_bounds__(kThreads)
    update_adam(const __grid_constant__ AnyLayers layers, Partials partials, Compute* ratios, AdamOptions options) {
  const Place place = place_from_the_end(layers);
  const AdamLayer& layer = layers.layer[place.layer];
  wait_for_earlier_kernels();
  const Compute ratio = ratio_at(place, layers, options, partials, ratios);
  if (value_of(options.inv_scale) == 0) {
    return;
  }
  const bool was_measured = partials.steps != nullptr;
  float step = 0;
  if (threadIdx.x == 0) {
    step = was_measured ? partials.steps[place.chunk] : *layer.step;
    if (was_measured && place.chunk == layers.first_chunk[place.layer]) {
      *layer.step = step;
    }
  }
  const bool of_updates = options.ratio.of_updates;
  const AdamNumbers<Compute> numbers = numbers_of<Compute>(layer, options, of_updates ? 1 : ratio, step);
  const auto lr = static_cast<Compute>(lr_of(layer, options) * (of_updates ? ratio : 1));
  AdamSums none;
  if (was_measured || layer.grad == nullptr) {
    adam_chunk<false, true, T, M>(layer, place.range, numbers, lr, none);
  } else {
    adam_chunk<true, true, T, M>(layer, place.range, numbers, lr, none);
  }
}

}  // namespace torchlars::cuda
