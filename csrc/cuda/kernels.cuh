// The kernels, over flat ranges of memory. Nothing of ATen and nothing but the plainest CUDA: a host shim in tests/
// compiles and runs this very file on a CPU.
//
// A step is two launches for as many layers as `Layers` holds. `measure` has one block a chunk, which leaves
// one partial sum for the parameter and one for the gradient. In `decide_and_apply`, `decide_and_apply_to_updates` and
// `decide_and_update` every block adds its layer's partial sums again, in the same order as all others, so that blocks
// need not wait for each other and nothing is accumulated atomically: the bits are the same on every run. The other
// kernels are the same pieces apart, for layers whose norms are completed elsewhere in between.
#pragma once

#include <c10/util/BFloat16.h>
#include <c10/util/Half.h>

#include <cstddef>
#include <cstdint>

#include "../plan.h"
#include "../sgd.h"
#include "../trust_ratio.h"

namespace torchlars::cuda {

constexpr int kThreads = 256;
constexpr int kWarp = 32;

// Layers as the caller names them. Pointers that a kernel does not read may be null, numbers that it does not use 0.

struct MeasuredLayer {
  int64_t numel = 0;
  const void* param = nullptr;
  const void* grad = nullptr;
  double scale = 0;  // times the parameter is added to the gradient before that is measured
};

// Of an update, grad is the parameter after the base optimizer's step, and param the parameter before it.
struct Layer {
  int64_t numel = 0;
  const void* param = nullptr;
  void* grad = nullptr;
  double weight_decay = 0;
  double trust_coef = 0;
  double eps = 0;
  double lr = 0;
};

struct SgdLayer {
  int64_t numel = 0;
  void* param = nullptr;
  const void* grad = nullptr;
  void* momentum_buffer = nullptr;  // null: no momentum
  double weight_decay = 0;
  double trust_coef = 0;
  double eps = 0;
  double lr = 0;
  double momentum = 0;
  double dampening = 0;
};

constexpr size_t kArgumentBytes = 32764;  // that a kernel can take
constexpr size_t kOtherArguments = 64;    // of them, for all but the layers

// The layers of one launch. Travels as a kernel argument: no copy to the device, so that nothing needs to be staged,
// waited for or kept alive.
template <typename AnyLayer>
struct Layers {
  // As many as fit beside count, the last of first_chunk and padding. But no more than 600: an argument is copied whole
  // at each launch, however few layers there are.
  static constexpr size_t kFit =
      (kArgumentBytes - kOtherArguments - 3 * sizeof(int32_t)) / (sizeof(AnyLayer) + sizeof(int32_t));
  static constexpr int kCapacity = kFit < 600 ? kFit : 600;

  int32_t count;
  int32_t
      first_chunk[kCapacity + 1];  // of each layer, counted from this launch's first; the last entry is their number
  AnyLayer layer[kCapacity];
};

// Where a block works: in one chunk of the launch.
struct Place {
  int chunk;
  int layer;
  Range range;  // of the layer
};

template <typename AnyLayer>
__device__ inline Place place_of(const Layers<AnyLayer>& layers, int chunk) {
  const int layer = find_start(layers.first_chunk, layers.count, chunk);
  return {chunk, layer, chunk_range(layers.layer[layer].numel, chunk - layers.first_chunk[layer])};
}

// The place of a block where the last chunk comes first: what was measured last may still be in cache.
template <typename AnyLayer>
__device__ inline Place place_from_the_end(const Layers<AnyLayer>& layers) {
  return place_of(layers, gridDim.x - 1 - blockIdx.x);
}

// As many numbers of T as sixteen bytes hold, the widest load there is. Or kSize numbers, moved by as many such loads
// as it takes: to go side by side with packs of a smaller type.
template <typename T, int kNumbers = 16 / sizeof(T)>
struct alignas(16) Pack {
  static constexpr int kSize = kNumbers;
  T values[kSize];
};

template <typename T>
__device__ inline bool is_aligned(const T* pointer) {
  return reinterpret_cast<uintptr_t>(pointer) % alignof(Pack<T>) == 0;
}

// Calls use(i, load(i)) for all packs, which the threads of the block share. kUnroll of them are in flight per thread.
template <int kUnroll, typename Load, typename Use>
__device__ inline void for_packs(int64_t num_packs, const Load& load, const Use& use) {
  for (int64_t first = threadIdx.x; first < num_packs; first += kUnroll * kThreads) {
    decltype(load(first)) loaded[kUnroll];
#pragma unroll
    for (int u = 0; u < kUnroll; ++u) {
      if (first + u * kThreads < num_packs) {
        loaded[u] = load(first + u * kThreads);
      }
    }
#pragma unroll
    for (int u = 0; u < kUnroll; ++u) {
      if (first + u * kThreads < num_packs) {
        use(first + u * kThreads, loaded[u]);
      }
    }
  }
}

// The sum of every thread's value, for every thread. A fixed tree: lanes, then warps.
__device__ inline double block_sum(double value) {
  __shared__ double warp_sums[kThreads / kWarp];
  for (int offset = kWarp / 2; offset > 0; offset /= 2) {
    value += __shfl_down_sync(0xffffffffu, value, offset);
  }
  if (threadIdx.x % kWarp == 0) {
    warp_sums[threadIdx.x / kWarp] = value;
  }
  __syncthreads();
  double sum = 0;
  for (int warp = 0; warp < kThreads / kWarp; ++warp) {
    sum += warp_sums[warp];
  }
  __syncthreads();  // warp_sums may be written again
  return sum;
}

__device__ inline double add_square(double sum, double value) { return fma(value, value, sum); }

// The sum of squares of a range, for every thread of the block. In double throughout: no square of a float overflows or
// vanishes in it, and the sum is exact to far below a float's last bit.
template <typename T>
__device__ double sum_of_squares(const T* __restrict__ x, int64_t count) {
  constexpr int kSize = Pack<T>::kSize;
  double sum = 0;
  int64_t peeled = 0;
  if (is_aligned(x)) {
    const auto* packs = reinterpret_cast<const Pack<T>*>(x);
    const int64_t num_packs = count / kSize;
    peeled = num_packs * kSize;
    for_packs<4>(
        num_packs, [&](int64_t pack) { return packs[pack]; },
        [&](int64_t, const Pack<T>& x) {
#pragma unroll
          for (int i = 0; i < kSize; ++i) {
            sum = add_square(sum, static_cast<double>(x.values[i]));
          }
        });
  }
  for (int64_t i = peeled + threadIdx.x; i < count; i += kThreads) {
    sum = add_square(sum, static_cast<double>(x[i]));
  }
  return block_sum(sum);
}

// The same of x + scale * y.
template <typename T>
__device__ double sum_of_squares_of_sums(const T* __restrict__ x, const T* __restrict__ y, int64_t count,
                                         double scale) {
  constexpr int kSize = Pack<T>::kSize;
  double sum = 0;
  int64_t peeled = 0;
  if (is_aligned(x) && is_aligned(y)) {
    const auto* xs = reinterpret_cast<const Pack<T>*>(x);
    const auto* ys = reinterpret_cast<const Pack<T>*>(y);
    const int64_t num_packs = count / kSize;
    peeled = num_packs * kSize;
    struct Packs {
      Pack<T> x, y;
    };
    for_packs<2>(
        num_packs, [&](int64_t pack) { return Packs{xs[pack], ys[pack]}; },
        [&](int64_t, const Packs& packs) {
#pragma unroll
          for (int i = 0; i < kSize; ++i) {
            const double y = static_cast<double>(packs.y.values[i]);
            sum = add_square(sum, static_cast<double>(packs.x.values[i]) + scale * y);
          }
        });
  }
  for (int64_t i = peeled + threadIdx.x; i < count; i += kThreads) {
    sum = add_square(sum, static_cast<double>(x[i]) + scale * static_cast<double>(y[i]));
  }
  return block_sum(sum);
}

// The sum of a layer's partial sums, for every thread of the block.
__device__ inline double sum_of_partials(const double* __restrict__ partials, int64_t count) {
  double sum = 0;
  for (int64_t i = threadIdx.x; i < count; i += kThreads) {
    sum += partials[i];
  }
  return block_sum(sum);
}

template <typename T, typename Compute>
__device__ inline T adapt_one(T grad, T param, Compute weight_decay, Compute ratio, Compute inv_scale) {
  return static_cast<T>(
      adapted_gradient(static_cast<Compute>(grad), static_cast<Compute>(param), weight_decay, ratio, inv_scale));
}

template <typename T, typename Compute>
__device__ inline T adapt_one(T grad, Compute ratio, Compute inv_scale) {
  return static_cast<T>(adapted_gradient(static_cast<Compute>(grad), ratio, inv_scale));
}

// Rewrites a range in place: each element of x becomes rewrite(itself, that of y). kReads: whether y is read.
template <bool kReads, typename T, typename Rewrite>
__device__ void rewrite_range(T* __restrict__ x, const T* __restrict__ y, int64_t count, const Rewrite& rewrite) {
  constexpr int kSize = Pack<T>::kSize;
  int64_t peeled = 0;
  if (is_aligned(x) && is_aligned(y)) {
    auto* xs = reinterpret_cast<Pack<T>*>(x);
    const auto* ys = reinterpret_cast<const Pack<T>*>(y);
    const int64_t num_packs = count / kSize;
    peeled = num_packs * kSize;
    struct Packs {
      Pack<T> x, y;
    };
    for_packs<2>(
        num_packs,
        [&](int64_t pack) {
          Packs packs;
          packs.x = xs[pack];
          if constexpr (kReads) {
            packs.y = ys[pack];
          }
          return packs;
        },
        [&](int64_t pack, Packs& packs) {
#pragma unroll
          for (int i = 0; i < kSize; ++i) {
            if constexpr (kReads) {
              packs.x.values[i] = rewrite(packs.x.values[i], packs.y.values[i]);
            } else {
              packs.x.values[i] = rewrite(packs.x.values[i]);
            }
          }
          xs[pack] = packs.x;
        });
  }
  for (int64_t i = peeled + threadIdx.x; i < count; i += kThreads) {
    if constexpr (kReads) {
      x[i] = rewrite(x[i], y[i]);
    } else {
      x[i] = rewrite(x[i]);
    }
  }
}

// What all layers of a launch have in common.
struct LarsOptions {
  RatioOptions ratio;
  bool maximize = false;
  bool lr_in_momentum = false;
  const double* lr_scale = nullptr;  // null: 1
  const float* inv_scale = nullptr;  // null: 1; where it is 0 nothing is written
};

template <typename AnyLayer, typename Options>
__device__ inline double lr_of(const AnyLayer& layer, const Options& options) {
  return options.lr_scale == nullptr ? layer.lr : layer.lr * *options.lr_scale;
}

__device__ inline float value_of(const float* inv_scale) { return inv_scale == nullptr ? 1 : *inv_scale; }

// Adapts a chunk of a gradient, in place.
template <typename T, typename Compute>
__device__ void adapt_chunk(const Layer& layer, Range range, const LarsOptions& options, Compute ratio) {
  const Compute inv_scale = value_of(options.inv_scale);
  if (inv_scale == 0) {
    return;
  }
  T* grad = static_cast<T*>(layer.grad) + range.begin;
  const int64_t count = range.end - range.begin;
  const auto factor =
      options.lr_in_momentum ? static_cast<Compute>(static_cast<double>(ratio) * lr_of(layer, options)) : ratio;
  if (layer.param == nullptr) {
    rewrite_range<false>(grad, static_cast<const T*>(nullptr), count,
                         [&](T g) { return adapt_one(g, factor, inv_scale); });
  } else {
    const T* param = static_cast<const T*>(layer.param) + range.begin;
    const auto weight_decay = static_cast<Compute>(options.maximize ? -layer.weight_decay : layer.weight_decay);
    rewrite_range<true>(grad, param, count, [&](T g, T p) { return adapt_one(g, p, weight_decay, factor, inv_scale); });
  }
}

// Scales a chunk of an update, in place. What has the ratio 1 is not touched.
template <typename T, typename Compute>
__device__ void scale_update_chunk(const Layer& layer, Range range, Compute ratio) {
  if (ratio != 1) {
    const T* old_param = static_cast<const T*>(layer.param) + range.begin;
    rewrite_range<true>(static_cast<T*>(layer.grad) + range.begin, old_param, range.end - range.begin, [&](T p, T old) {
      return static_cast<T>(scaled_update(static_cast<Compute>(p), static_cast<Compute>(old), ratio));
    });
  }
}

template <bool kDecays, bool kMomentum, bool kNesterov, typename T, typename M, typename Compute>
__device__ inline void update_one(T& param, const T& grad, M& momentum, const SgdNumbers<Compute>& numbers) {
  Compute m = 0;
  if constexpr (kMomentum) {
    m = static_cast<Compute>(momentum);
  }
  param = static_cast<T>(
      sgd<kDecays, kMomentum, kNesterov>(static_cast<Compute>(param), static_cast<Compute>(grad), m, numbers));
  if constexpr (kMomentum) {
    momentum = static_cast<M>(m);
  }
}

// Updates a range of a parameter and its momentum, in place.
template <bool kDecays, bool kMomentum, bool kNesterov, typename T, typename M, typename Compute>
__device__ void update_range(T* __restrict__ param, const T* __restrict__ grad, M* __restrict__ momentum, int64_t count,
                             const SgdNumbers<Compute>& numbers) {
  constexpr int kSize = Pack<T>::kSize;
  int64_t peeled = 0;
  if (is_aligned(param) && is_aligned(grad) && is_aligned(momentum)) {
    auto* params = reinterpret_cast<Pack<T>*>(param);
    const auto* grads = reinterpret_cast<const Pack<T>*>(grad);
    auto* momenta = reinterpret_cast<Pack<M, kSize>*>(momentum);
    const int64_t num_packs = count / kSize;
    peeled = num_packs * kSize;
    struct Packs {
      Pack<T> param, grad;
      Pack<M, kSize> momentum;
    };
    for_packs<sizeof(T) == 2 ? 2 : 4>(  // 4 take up to 126 registers for 16-bit numbers
        num_packs,
        [&](int64_t pack) {
          Packs x;
          x.param = params[pack];
          x.grad = grads[pack];
          if constexpr (kMomentum) {
            x.momentum = momenta[pack];
          }
          return x;
        },
        [&](int64_t pack, Packs& x) {
#pragma unroll
          for (int i = 0; i < kSize; ++i) {
            update_one<kDecays, kMomentum, kNesterov>(x.param.values[i], x.grad.values[i], x.momentum.values[i],
                                                      numbers);
          }
          params[pack] = x.param;
          if constexpr (kMomentum) {
            momenta[pack] = x.momentum;
          }
        });
  }
  M none{};
  for (int64_t i = peeled + threadIdx.x; i < count; i += kThreads) {
    update_one<kDecays, kMomentum, kNesterov>(param[i], grad[i], kMomentum ? momentum[i] : none, numbers);
  }
}

// What all layers of a launch have in common.
struct SgdOptions {
  bool nesterov;
  bool maximize;
  const double* lr_scale;  // null: 1
  RatioOptions ratio;
  bool lr_in_momentum = false;
  const float* inv_scale = nullptr;  // null: 1; where it is 0 nothing is written
};

// No kernel takes more beside its layers than three pointers and these.
static_assert(3 * sizeof(void*) + sizeof(LarsOptions) <= kOtherArguments);
static_assert(3 * sizeof(void*) + sizeof(SgdOptions) <= kOtherArguments);

template <typename T, typename M, typename Compute>
__device__ void update_chunk(const SgdLayer& layer, Range range, const SgdOptions& options, Compute ratio) {
  const float inv_scale = value_of(options.inv_scale);
  if (inv_scale == 0) {
    return;
  }
  const SgdNumbers<Compute> numbers(ratio, layer.weight_decay, lr_of(layer, options), layer.momentum, layer.dampening,
                                    options.maximize, options.lr_in_momentum, inv_scale);
  T* param = static_cast<T*>(layer.param) + range.begin;
  const T* grad = static_cast<const T*>(layer.grad) + range.begin;
  M* momentum = layer.momentum_buffer == nullptr ? nullptr : static_cast<M*>(layer.momentum_buffer) + range.begin;
  const int64_t count = range.end - range.begin;
  const bool decays = numbers.weight_decay != 0;
  if (momentum == nullptr) {
    decays ? update_range<true, false, false>(param, grad, momentum, count, numbers)
           : update_range<false, false, false>(param, grad, momentum, count, numbers);
  } else if (options.nesterov) {
    decays ? update_range<true, true, true>(param, grad, momentum, count, numbers)
           : update_range<false, true, true>(param, grad, momentum, count, numbers);
  } else {
    decays ? update_range<true, true, false>(param, grad, momentum, count, numbers)
           : update_range<false, true, false>(param, grad, momentum, count, numbers);
  }
}

template <typename Ratio, typename AnyLayer, typename Options>
__device__ inline Ratio trust_ratio_of(const AnyLayer& layer, const Options& options, double param_squared_norm,
                                       double grad_squared_norm) {
  return static_cast<Ratio>(trust_ratio(param_squared_norm, grad_squared_norm, layer.weight_decay, layer.trust_coef,
                                        layer.eps, lr_of(layer, options), options.ratio));
}

// The trust ratio of a block's layer, from partial sums. The block of the layer's first chunk also tells it.
template <typename Ratio, typename AnyLayer, typename Options>
__device__ inline Ratio decide_at(const Place& place, const Layers<AnyLayer>& layers, const Options& options,
                                  const double* param_partials, const double* grad_partials, Ratio* ratios) {
  const int first = layers.first_chunk[place.layer];
  const int num_partials = layers.first_chunk[place.layer + 1] - first;
  const double param_squared_norm = sum_of_partials(param_partials + first, num_partials);
  const double grad_sum = sum_of_partials(grad_partials + first, num_partials);
  const double grad_squared_norm = unscaled_squared_norm(grad_sum, value_of(options.inv_scale));
  const auto ratio = trust_ratio_of<Ratio>(layers.layer[place.layer], options, param_squared_norm, grad_squared_norm);
  if (place.chunk == first && threadIdx.x == 0) {
    ratios[place.layer] = ratio;
  }
  return ratio;
}

// Partial sums of squares of the parameters, or of the gradients with what is added to them, or of both. One block a
// chunk. Gradients are measured as they are, and what is added is scaled like them: whoever adds the partial sums
// unscales both.
template <typename T>
__global__ void __launch_bounds__(kThreads)
    measure(const __grid_constant__ Layers<MeasuredLayer> layers, double* param_partials, double* grad_partials,
            const float* inv_scale) {
  const Place place = place_of(layers, blockIdx.x);
  const MeasuredLayer& layer = layers.layer[place.layer];
  const int64_t count = place.range.end - place.range.begin;
  if (param_partials != nullptr) {
    const double sum = sum_of_squares(static_cast<const T*>(layer.param) + place.range.begin, count);
    if (threadIdx.x == 0) {
      param_partials[place.chunk] = sum;
    }
  }
  if (grad_partials != nullptr) {
    const T* grad = static_cast<const T*>(layer.grad) + place.range.begin;
    double sum;
    if (layer.scale == 0) {
      sum = sum_of_squares(grad, count);
    } else {
      const T* param = static_cast<const T*>(layer.param) + place.range.begin;
      sum = sum_of_squares_of_sums(grad, param, count, layer.scale / value_of(inv_scale));
    }
    if (threadIdx.x == 0) {
      grad_partials[place.chunk] = sum;
    }
  }
}

// Squared norms from partial sums. One block a layer.
__global__ void __launch_bounds__(kThreads)
    add_partials(const __grid_constant__ Layers<MeasuredLayer> layers, const double* partials, double* squared_norms,
                 const float* inv_scale) {
  const int layer = blockIdx.x;
  const int first = layers.first_chunk[layer];
  const double sum = sum_of_partials(partials + first, layers.first_chunk[layer + 1] - first);
  if (threadIdx.x == 0) {
    squared_norms[layer] = unscaled_squared_norm(sum, value_of(inv_scale));
  }
}

// Trust ratios from squared norms. One thread a layer.
template <typename Ratio>
__global__ void __launch_bounds__(kThreads)
    decide(const __grid_constant__ Layers<Layer> layers, const double* param_squared_norms,
           const double* grad_squared_norms, Ratio* ratios, LarsOptions options) {
  const int layer = blockIdx.x * kThreads + threadIdx.x;
  if (layer < layers.count) {
    ratios[layer] =
        trust_ratio_of<Ratio>(layers.layer[layer], options, param_squared_norms[layer], grad_squared_norms[layer]);
  }
}

// Gradients in place, from trust ratios. One block a chunk.
template <typename T, typename Ratio>
__global__ void __launch_bounds__(kThreads)
    apply(const __grid_constant__ Layers<Layer> layers, const Ratio* ratios, LarsOptions options) {
  const Place place = place_from_the_end(layers);
  adapt_chunk<T>(layers.layer[place.layer], place.range, options, ratios[place.layer]);
}

// The same from partial sums.
template <typename T, typename Ratio>
__global__ void __launch_bounds__(kThreads)
    decide_and_apply(const __grid_constant__ Layers<Layer> layers, const double* param_partials,
                     const double* grad_partials, Ratio* ratios, LarsOptions options) {
  const Place place = place_from_the_end(layers);
  const Ratio ratio = decide_at(place, layers, options, param_partials, grad_partials, ratios);
  adapt_chunk<T>(layers.layer[place.layer], place.range, options, ratio);
}

// Updates in place, from trust ratios. One block a chunk.
template <typename T, typename Ratio>
__global__ void __launch_bounds__(kThreads)
    apply_to_updates(const __grid_constant__ Layers<Layer> layers, const Ratio* ratios) {
  const Place place = place_from_the_end(layers);
  scale_update_chunk<T>(layers.layer[place.layer], place.range, ratios[place.layer]);
}

// The same from partial sums.
template <typename T, typename Ratio>
__global__ void __launch_bounds__(kThreads)
    decide_and_apply_to_updates(const __grid_constant__ Layers<Layer> layers, const double* param_partials,
                                const double* grad_partials, Ratio* ratios, LarsOptions options) {
  const Place place = place_from_the_end(layers);
  const Ratio ratio = decide_at(place, layers, options, param_partials, grad_partials, ratios);
  scale_update_chunk<T>(layers.layer[place.layer], place.range, ratio);
}

// Parameters and their momentum in place, with trust ratios or, if ratios is null, without. M: the type of the
// momentum.
template <typename T, typename M, typename Ratio>
__global__ void __launch_bounds__(kThreads)
    update(const __grid_constant__ Layers<SgdLayer> layers, const Ratio* ratios, SgdOptions options) {
  const Place place = place_from_the_end(layers);
  const Ratio ratio = ratios == nullptr ? Ratio(1) : ratios[place.layer];
  update_chunk<T, M>(layers.layer[place.layer], place.range, options, ratio);
}

// The same from partial sums.
template <typename T, typename M, typename Ratio>
__global__ void __launch_bounds__(kThreads)
    decide_and_update(const __grid_constant__ Layers<SgdLayer> layers, const double* param_partials,
                      const double* grad_partials, Ratio* ratios, SgdOptions options) {
  const Place place = place_from_the_end(layers);
  const Ratio ratio = decide_at(place, layers, options, param_partials, grad_partials, ratios);
  update_chunk<T, M>(layers.layer[place.layer], place.range, options, ratio);
}

}  // namespace torchlars::cuda
