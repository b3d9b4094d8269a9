// The CUDA kernels, over flat ranges of memory. Without ATen and with few features of CUDA, as a host shim in tests/
// compiles and runs this file on a CPU.
//
// A step is two launches for as many layers as `Layers` holds, or for each run of layers if `set_run_bytes` was called.
// `measure` has one block for each chunk, which writes a partial sum of the parameter and one of the gradient. In
// `apply`, `apply_to_updates` and `update` every block adds its layer's partial sums, all in the same order. So blocks
// do not wait for each other, there are no atomics, and the bits are the same on every run. Where norms are needed by
// themselves, `add_partials` and `decide` compute the ratios, which are given to the kernels that follow. The kernels
// of Adam are in adam.cuh.
#pragma once

#include <c10/util/BFloat16.h>
#include <c10/util/Half.h>

#include <cstddef>
#include <cstdint>

#include "../codes.h"
#include "../plan.h"
#include "../sgd.h"
#include "../trust_ratio.h"
#include "packs.cuh"
#include "sums.cuh"

namespace torchlars::cuda {

// One layer of a launch. Pointers that a kernel does not read may be null, numbers that it does not use 0.

struct MeasuredLayer {
  int64_t numel = 0;
  const void* param = nullptr;
  const void* grad = nullptr;
  double scale = 0;       // times the parameter is added to the gradient before that is measured
  float* step = nullptr;  // of Adam, to be incremented
};

// For updates, grad is the parameter after the base optimizer's step, and param the parameter before it.
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

// The same with momentum in 8 bits: momentum_buffer points to the codes.
struct CodedSgdLayer : SgdLayer {
  float* momentum_scales = nullptr;
  Rows rows;
};

// Sizes of a launch's arguments, in bytes. A launch copies its arguments whole, so it takes the smallest size that
// holds its layers. The last is the most that CUDA allows, the first is the most before driver 530.
constexpr size_t kArgumentBytes[] = {4096, 16384, 32764};
constexpr size_t kOtherArguments = 80;  // for all arguments but the layers

// The layers of one launch, passed as a kernel argument: without a copy to the device, no buffer has to be kept until
// the kernel has run.
template <typename AnyLayer, size_t kBytes>
struct Layers {
  // As many as fit beside count, the last of first_chunk and padding.
  static constexpr int kCapacity =
      (kBytes - kOtherArguments - 3 * sizeof(int32_t)) / (sizeof(AnyLayer) + sizeof(int32_t));

  int32_t count;
  int32_t
      first_chunk[kCapacity + 1];  // of each layer, counted from this launch's first; the last entry is their number
  AnyLayer layer[kCapacity];
};

// Partial sums of squares, one for each chunk. Null: there are none.
struct Partials {
  double* params = nullptr;
  double* grads = nullptr;  // or updates
  float* steps = nullptr;   // of Adam, for each chunk that of its layer; where they wait until they can be written

  Partials from(int64_t chunk) const {
    return {params ? params + chunk : nullptr, grads ? grads + chunk : nullptr, steps ? steps + chunk : nullptr};
  }
};

// Waits for the kernels that were launched before. If the host allows overlap (ops_cuda.cu), a block gets here while
// they still run, and lets blocks of the next launch start. Before this call a kernel may read its arguments only.
__device__ inline void wait_for_earlier_kernels() {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
  cudaTriggerProgrammaticLaunchCompletion();
  cudaGridDependencySynchronize();
#endif
}

// What a block works on: one chunk of the launch.
struct Place {
  int chunk;
  int layer;
  Range range;  // of the layer
};

template <typename AnyLayers>
__device__ inline Place place_of(const AnyLayers& layers, int chunk) {
  const int layer = find_start(layers.first_chunk, layers.count, chunk);
  return {chunk, layer, chunk_range(layers.layer[layer].numel, chunk - layers.first_chunk[layer])};
}

// The place of a block, with the last chunk first: what was measured last may still be in cache.
template <typename AnyLayers>
__device__ inline Place place_from_the_end(const AnyLayers& layers) {
  return place_of(layers, gridDim.x - 1 - blockIdx.x);
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

// Rewrites the packs of x in place, element by element, given those of y. kReads: whether y is read.
template <bool kAligned, bool kReads, typename T, typename Rewrite>
__device__ void rewrite_packs(T* __restrict__ x, const T* __restrict__ y, int64_t num_packs, const Rewrite& rewrite) {
  constexpr int kSize = Pack<T>::kSize;
  struct Packs {
    Pack<T> x, y;
  };
  for_packs<kAligned ? 2 : 1>(
      num_packs,
      [&](int64_t pack) {
        Packs packs;
        packs.x = load_pack<kAligned, kSize>(x, pack);
        if constexpr (kReads) {
          packs.y = load_pack<kAligned, kSize>(y, pack);
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
        store_pack<kAligned>(x, pack, packs.x);
      });
}

template <bool kReads, typename T, typename Rewrite>
__device__ void rewrite_range(T* __restrict__ x, const T* __restrict__ y, int64_t count, const Rewrite& rewrite) {
  const int64_t num_packs = count / Pack<T>::kSize;
  if (is_aligned(x) && is_aligned(y)) {
    rewrite_packs<true, kReads>(x, y, num_packs, rewrite);
  } else {
    rewrite_packs<false, kReads>(x, y, num_packs, rewrite);
  }
  const int64_t i = num_packs * Pack<T>::kSize + threadIdx.x;  // what fills no pack
  if (i < count) {
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
  const double* lr_tensor = nullptr;  // null: 1
  const float* inv_scale = nullptr;   // null: 1; where it is 0 nothing is written
};

template <typename AnyLayer, typename Options>
__device__ inline double lr_of(const AnyLayer& layer, const Options& options) {
  return options.lr_tensor == nullptr ? layer.lr : layer.lr * *options.lr_tensor;
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

// Scales a chunk of an update, in place. With the ratio 1 nothing is written.
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

// Updates packs of a parameter and its momentum, in place.
template <bool kAligned, bool kDecays, bool kMomentum, bool kNesterov, typename T, typename M, typename Compute>
__device__ void update_packs(T* __restrict__ param, const T* __restrict__ grad, M* __restrict__ momentum,
                             int64_t num_packs, const SgdNumbers<Compute>& numbers) {
  constexpr int kSize = Pack<T>::kSize;
  struct Packs {
    Pack<T> param, grad;
    Pack<M, kSize> momentum;
  };
  constexpr int kUnroll = !kAligned ? 1 : sizeof(T) == 2 ? 2 : 4;  // 4 take up to 126 registers for 16-bit numbers
  for_packs<kUnroll>(
      num_packs,
      [&](int64_t pack) {
        Packs x;
        x.param = load_pack<kAligned, kSize>(param, pack);
        x.grad = load_pack<kAligned, kSize>(grad, pack);
        if constexpr (kMomentum) {
          x.momentum = load_pack<kAligned, kSize>(momentum, pack);
        }
        return x;
      },
      [&](int64_t pack, Packs& x) {
#pragma unroll
        for (int i = 0; i < kSize; ++i) {
          update_one<kDecays, kMomentum, kNesterov>(x.param.values[i], x.grad.values[i], x.momentum.values[i], numbers);
        }
        store_pack<kAligned>(param, pack, x.param);
        if constexpr (kMomentum) {
          store_pack<kAligned>(momentum, pack, x.momentum);
        }
      });
}

template <bool kDecays, bool kMomentum, bool kNesterov, typename T, typename M, typename Compute>
__device__ void update_range(T* __restrict__ param, const T* __restrict__ grad, M* __restrict__ momentum, int64_t count,
                             const SgdNumbers<Compute>& numbers) {
  const int64_t num_packs = count / Pack<T>::kSize;
  if (is_aligned(param) && is_aligned(grad) && is_aligned(momentum)) {
    update_packs<true, kDecays, kMomentum, kNesterov>(param, grad, momentum, num_packs, numbers);
  } else {
    update_packs<false, kDecays, kMomentum, kNesterov>(param, grad, momentum, num_packs, numbers);
  }
  const int64_t i = num_packs * Pack<T>::kSize + threadIdx.x;  // what fills no pack
  if (i < count) {
    M none{};
    update_one<kDecays, kMomentum, kNesterov>(param[i], grad[i], kMomentum ? momentum[i] : none, numbers);
  }
}

// The largest value of a warp, in every lane.
__device__ inline uint32_t warp_max(uint32_t value) {
  for (int offset = kWarp / 2; offset > 0; offset /= 2) {
    const uint32_t other = __shfl_xor_sync(0xffffffffu, value, offset);
    value = value < other ? other : value;
  }
  return value;
}

// Updates a block whose momentum is in 8 bits, in place, and codes that anew: one warp, four elements a lane.
// kAligned: the four are next to each other, in packs; else a warp reads consecutive elements at a time.
template <bool kAligned, bool kDecays, bool kNesterov, typename T>
__device__ void update_block(T* param, const T* grad, int8_t* codes, float* scale, const Block& block,
                             const SgdNumbers<float>& numbers) {
  constexpr int kEach = kBlock / kWarp;
  const int lane = threadIdx.x % kWarp;
  const auto index = [&](int i) { return kAligned ? lane * kEach + i : i * kWarp + lane; };
  Pack<T, kEach> params, grads;
  Pack<int8_t, kEach> coded;
  if constexpr (kAligned) {
    if (index(0) < block.count) {
      params = load_pack<true, kEach>(param, lane);
      grads = load_pack<true, kEach>(grad, lane);
      coded = load_pack<true, kEach>(codes, lane);
    }
  } else {
#pragma unroll
    for (int i = 0; i < kEach; ++i) {
      if (index(i) < block.count) {
        params.values[i] = param[index(i)];
        grads.values[i] = grad[index(i)];
        coded.values[i] = codes[index(i)];
      }
    }
  }
  const float old_scale = *scale;
  float momentum[kEach];
  uint32_t salts[kEach];
  uint32_t largest = 0;
#pragma unroll
  for (int i = 0; i < kEach; ++i) {
    if (index(i) < block.count) {
      salts[i] = salt_of(static_cast<float>(params.values[i]), index(i));
      momentum[i] = static_cast<float>(coded.values[i]) * old_scale;
      update_one<kDecays, true, kNesterov>(params.values[i], grads.values[i], momentum[i], numbers);
      largest = largest < magnitude(momentum[i]) ? magnitude(momentum[i]) : largest;
    }
  }
  largest = warp_max(largest);  // of the block; also keeps lanes from writing the scale before all have read it
  const Scale scaled(largest);
  const uint32_t salt = salt_of(block.position, largest);
#pragma unroll
  for (int i = 0; i < kEach; ++i) {
    if (index(i) < block.count) {
      coded.values[i] = scaled.inverse == 0 ? 0 : code_of(momentum[i], salts[i] + salt, scaled.inverse);
    }
  }
  if constexpr (kAligned) {
    if (index(0) < block.count) {
      store_pack<true>(param, lane, params);
      store_pack<true>(codes, lane, coded);
    }
  } else {
#pragma unroll
    for (int i = 0; i < kEach; ++i) {
      if (index(i) < block.count) {
        param[index(i)] = params.values[i];
        codes[index(i)] = coded.values[i];
      }
    }
  }
  if (lane == 0) {
    *scale = scaled.scale;
  }
}

template <bool kDecays, bool kNesterov, typename T>
__device__ void update_blocks(const CodedSgdLayer& layer, Range range, const SgdNumbers<float>& numbers) {
  T* const param = static_cast<T*>(layer.param);
  const T* const grad = static_cast<const T*>(layer.grad);
  auto* const codes = static_cast<int8_t*>(layer.momentum_buffer);
  constexpr int kEach = kBlock / kWarp;
  const bool is_aligned = layer.rows.row_length % kEach == 0 && is_aligned_for<kEach>(param) &&
                          is_aligned_for<kEach>(grad) && is_aligned_for<kEach>(codes);
  layer.rows.for_blocks(range, threadIdx.x / kWarp, kThreads / kWarp, [&](const Block& block) {
    const int64_t begin = block.begin;
    float* const scale = layer.momentum_scales + block.index;
    if (is_aligned) {
      update_block<true, kDecays, kNesterov>(param + begin, grad + begin, codes + begin, scale, block, numbers);
    } else {
      update_block<false, kDecays, kNesterov>(param + begin, grad + begin, codes + begin, scale, block, numbers);
    }
  });
}

// What all layers of a launch have in common.
struct SgdOptions {
  RatioOptions ratio;
  bool maximize = false;
  bool lr_in_momentum = false;
  bool nesterov = false;
  const double* lr_tensor = nullptr;  // null: 1
  const float* inv_scale = nullptr;   // null: 1; where it is 0 nothing is written
};

// What kernels take beside their layers, at most.
template <typename Options>
constexpr bool fits_beside_layers = sizeof(Partials) + sizeof(void*) + sizeof(Options) <= kOtherArguments;
static_assert(fits_beside_layers<LarsOptions> && fits_beside_layers<SgdOptions>);

template <typename Compute>
__device__ inline SgdNumbers<Compute> numbers_of(const SgdLayer& layer, const SgdOptions& options, Compute ratio) {
  return SgdNumbers<Compute>(ratio, layer.weight_decay, options.maximize, lr_of(layer, options), options.lr_in_momentum,
                             layer.momentum, layer.dampening, value_of(options.inv_scale));
}

template <typename T, typename M, typename Compute>
__device__ void update_chunk(const SgdLayer& layer, Range range, const SgdOptions& options, Compute ratio) {
  if (value_of(options.inv_scale) == 0) {
    return;
  }
  const SgdNumbers<Compute> numbers = numbers_of(layer, options, ratio);
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

// The same with momentum in 8 bits. M is that of the codes.
template <typename T, typename M>
__device__ void update_chunk(const CodedSgdLayer& layer, Range range, const SgdOptions& options, float ratio) {
  if (value_of(options.inv_scale) == 0) {
    return;
  }
  const SgdNumbers<float> numbers = numbers_of(layer, options, ratio);
  const bool decays = numbers.weight_decay != 0;
  if (options.nesterov) {
    decays ? update_blocks<true, true, T>(layer, range, numbers) : update_blocks<false, true, T>(layer, range, numbers);
  } else {
    decays ? update_blocks<true, false, T>(layer, range, numbers)
           : update_blocks<false, false, T>(layer, range, numbers);
  }
}

// The factor of what was measured beside the parameters.
template <typename Options>
__device__ inline float scale_of_sums(const Options& options) {
  return value_of(options.inv_scale);
}

template <typename Ratio, typename AnyLayer, typename Options>
__device__ inline Ratio trust_ratio_of(const AnyLayer& layer, const Options& options, double param_squared_norm,
                                       double grad_squared_norm) {
  return static_cast<Ratio>(trust_ratio(param_squared_norm, grad_squared_norm, layer.weight_decay, layer.trust_coef,
                                        layer.eps, lr_of(layer, options), options.ratio));
}

// The trust ratio of a block's layer. With partial sums every block decides it, and the block of the layer's first
// chunk writes it to ratios. Else it is read from ratios, or 1 if ratios is null. One thread decides, as square roots
// and divisions in double are slow.
template <typename Ratio, typename AnyLayers, typename Options>
__device__ inline Ratio ratio_at(const Place& place, const AnyLayers& layers, const Options& options, Partials partials,
                                 Ratio* ratios) {
  if (partials.params == nullptr) {
    return ratios == nullptr ? Ratio(1) : ratios[place.layer];
  }
  const int first = layers.first_chunk[place.layer];
  const int num_partials = layers.first_chunk[place.layer + 1] - first;
  const double param_squared_norm = sum_of_partials(partials.params + first, num_partials);
  const double grad_sum = sum_of_partials(partials.grads + first, num_partials);
  Ratio ratio = 0;
  if (threadIdx.x == 0) {
    const double grad_squared_norm = unscaled_squared_norm(grad_sum, scale_of_sums(options));
    ratio = trust_ratio_of<Ratio>(layers.layer[place.layer], options, param_squared_norm, grad_squared_norm);
    if (place.chunk == first) {
      ratios[place.layer] = ratio;
    }
  }
  return broadcast(ratio);
}

// Partial sums of squares of parameters, of gradients plus layer.scale times the parameter, or of both. One block for
// each chunk. Gradients are not unscaled: the parameter is divided by inv_scale instead, and the kernel that adds the
// partial sums multiplies by its square. Steps of Adam are incremented, unless the step is skipped.
template <typename T, typename AnyLayers>
__global__ void __launch_bounds__(kThreads)
    measure(const __grid_constant__ AnyLayers layers, Partials partials, const float* inv_scale) {
  const Place place = place_of(layers, blockIdx.x);
  const MeasuredLayer& layer = layers.layer[place.layer];
  const int64_t count = place.range.end - place.range.begin;
  wait_for_earlier_kernels();
  if (partials.params != nullptr) {
    const double sum = sum_of_squares(static_cast<const T*>(layer.param) + place.range.begin, count);
    if (threadIdx.x == 0) {
      partials.params[place.chunk] = sum;
    }
  }
  if (partials.grads != nullptr) {
    const T* grad = static_cast<const T*>(layer.grad) + place.range.begin;
    double sum;
    if (layer.scale == 0) {
      sum = sum_of_squares(grad, count);
    } else {
      const T* param = static_cast<const T*>(layer.param) + place.range.begin;
      sum = sum_of_squares_of_sums(grad, param, count, layer.scale / value_of(inv_scale));
    }
    if (threadIdx.x == 0) {
      partials.grads[place.chunk] = sum;
    }
  }
  const bool is_first = place.chunk == layers.first_chunk[place.layer] && threadIdx.x == 0;
  if (layer.step != nullptr && is_first && value_of(inv_scale) != 0) {
    *layer.step += 1;
  }
}

// Squared norms from partial sums. One block for each layer.
template <typename AnyLayers>
__global__ void __launch_bounds__(kThreads)
    add_partials(const __grid_constant__ AnyLayers layers, const double* partials, double* squared_norms,
                 const float* inv_scale) {
  const int layer = blockIdx.x;
  const int first = layers.first_chunk[layer];
  wait_for_earlier_kernels();
  const double sum = sum_of_partials(partials + first, layers.first_chunk[layer + 1] - first);
  if (threadIdx.x == 0) {
    squared_norms[layer] = unscaled_squared_norm(sum, value_of(inv_scale));
  }
}

// Trust ratios from squared norms. One thread for each layer.
template <typename Ratio, typename AnyLayers>
__global__ void __launch_bounds__(kThreads)
    decide(const __grid_constant__ AnyLayers layers, const double* param_squared_norms,
           const double* grad_squared_norms, Ratio* ratios, LarsOptions options) {
  const int layer = blockIdx.x * kThreads + threadIdx.x;
  wait_for_earlier_kernels();
  if (layer < layers.count) {
    ratios[layer] =
        trust_ratio_of<Ratio>(layers.layer[layer], options, param_squared_norms[layer], grad_squared_norms[layer]);
  }
}

// Scales gradients in place, by partial sums or trust ratios. One block for each chunk, as in the kernels that follow.
template <typename T, typename Ratio, typename AnyLayers>
__global__ void __launch_bounds__(kThreads)
    apply(const __grid_constant__ AnyLayers layers, Partials partials, Ratio* ratios, LarsOptions options) {
  const Place place = place_from_the_end(layers);
  wait_for_earlier_kernels();
  const Ratio ratio = ratio_at(place, layers, options, partials, ratios);
  adapt_chunk<T>(layers.layer[place.layer], place.range, options, ratio);
}

// Scales updates in place.
template <typename T, typename Ratio, typename AnyLayers>
__global__ void __launch_bounds__(kThreads)
    apply_to_updates(const __grid_constant__ AnyLayers layers, Partials partials, Ratio* ratios, LarsOptions options) {
  const Place place = place_from_the_end(layers);
  wait_for_earlier_kernels();
  const Ratio ratio = ratio_at(place, layers, options, partials, ratios);
  scale_update_chunk<T>(layers.layer[place.layer], place.range, ratio);
}

// Takes a step of SGD. M: the type of the momentum.
template <typename T, typename M, typename Ratio, typename AnyLayers>
__global__ void __launch_bounds__(kThreads)
    update(const __grid_constant__ AnyLayers layers, Partials partials, Ratio* ratios, SgdOptions options) {
  const Place place = place_from_the_end(layers);
  wait_for_earlier_kernels();
  const Ratio ratio = ratio_at(place, layers, options, partials, ratios);
  update_chunk<T, M>(layers.layer[place.layer], place.range, options, ratio);
}

}  // namespace torchlars::cuda
