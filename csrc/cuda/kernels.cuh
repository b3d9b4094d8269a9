// The kernels, over flat ranges of memory. Nothing of ATen and nothing but the plainest CUDA: a host shim in tests/
// compiles and runs this very file on a CPU.
//
// A step is two launches. `measure` has one block a chunk, which leaves one partial sum for the parameter and one for
// the gradient. In `decide_and_apply` every block adds its layer's partial sums again, in the same order as all others,
// so that blocks need not wait for each other and nothing is accumulated atomically: the bits are the same on every
// run. The other kernels are the same pieces apart, for layers whose norms are completed elsewhere in between.
#pragma once

#include <c10/util/BFloat16.h>
#include <c10/util/Half.h>

#include <cstdint>

#include "../plan.h"
#include "../trust_ratio.h"

namespace torchlars::cuda {

constexpr int kThreads = 256;
constexpr int kWarp = 32;

// The layers of one launch. Travels as a kernel argument, of which there are 32,764 bytes: no copy to the device, so
// that nothing needs to be staged, waited for or kept alive.
struct Layers {
  static constexpr int kCapacity = 600;

  int32_t count;
  int32_t
      first_chunk[kCapacity + 1];  // of each layer, counted from this launch's first; the last entry is their number
  int64_t numel[kCapacity];
  const void* param[kCapacity];  // may be null where a kernel need not read it
  void* grad[kCapacity];         // likewise
  double weight_decay[kCapacity];
  double trust_coef[kCapacity];
  double eps[kCapacity];
};
static_assert(sizeof(Layers) + 64 <= 32764, "Layers and a few pointers must fit the arguments of a kernel");

// Sixteen bytes, the widest load there is.
template <typename T>
struct alignas(16) Pack {
  static constexpr int kSize = 16 / sizeof(T);
  T values[kSize];
};

template <typename T>
__device__ inline bool is_aligned(const T* pointer) {
  return reinterpret_cast<uintptr_t>(pointer) % alignof(Pack<T>) == 0;
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
  constexpr int kUnroll = 4;  // packs in flight per thread
  double sum = 0;
  int64_t peeled = 0;
  if (is_aligned(x)) {
    const auto* packs = reinterpret_cast<const Pack<T>*>(x);
    const int64_t num_packs = count / kSize;
    peeled = num_packs * kSize;
    for (int64_t first = threadIdx.x; first < num_packs; first += kUnroll * kThreads) {
      Pack<T> loaded[kUnroll];
#pragma unroll
      for (int u = 0; u < kUnroll; ++u) {
        if (first + u * kThreads < num_packs) {
          loaded[u] = packs[first + u * kThreads];
        }
      }
#pragma unroll
      for (int u = 0; u < kUnroll; ++u) {
        if (first + u * kThreads < num_packs) {
#pragma unroll
          for (int i = 0; i < kSize; ++i) {
            sum = add_square(sum, static_cast<double>(loaded[u].values[i]));
          }
        }
      }
    }
  }
  for (int64_t i = peeled + threadIdx.x; i < count; i += kThreads) {
    sum = add_square(sum, static_cast<double>(x[i]));
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
__device__ inline T adapt_one(T grad, T param, Compute weight_decay, Compute ratio) {
  return static_cast<T>(adapted_gradient(static_cast<Compute>(grad), static_cast<Compute>(param), weight_decay, ratio));
}

template <typename T, typename Compute>
__device__ inline T adapt_one(T grad, Compute ratio) {
  return static_cast<T>(adapted_gradient(static_cast<Compute>(grad), ratio));
}

// Adapts a range of a gradient, in place. kDecays: whether the parameter is read.
template <bool kDecays, typename T, typename Compute>
__device__ void adapt_range(T* __restrict__ grad, const T* __restrict__ param, int64_t count, Compute weight_decay,
                            Compute ratio) {
  constexpr int kSize = Pack<T>::kSize;
  constexpr int kUnroll = 2;  // packs of each in flight per thread
  int64_t peeled = 0;
  if (is_aligned(grad) && is_aligned(param)) {
    auto* grad_packs = reinterpret_cast<Pack<T>*>(grad);
    const auto* param_packs = reinterpret_cast<const Pack<T>*>(param);
    const int64_t num_packs = count / kSize;
    peeled = num_packs * kSize;
    for (int64_t first = threadIdx.x; first < num_packs; first += kUnroll * kThreads) {
      Pack<T> g[kUnroll];
      Pack<T> p[kUnroll];
#pragma unroll
      for (int u = 0; u < kUnroll; ++u) {
        if (first + u * kThreads < num_packs) {
          g[u] = grad_packs[first + u * kThreads];
          if constexpr (kDecays) {
            p[u] = param_packs[first + u * kThreads];
          }
        }
      }
#pragma unroll
      for (int u = 0; u < kUnroll; ++u) {
        if (first + u * kThreads < num_packs) {
#pragma unroll
          for (int i = 0; i < kSize; ++i) {
            if constexpr (kDecays) {
              g[u].values[i] = adapt_one(g[u].values[i], p[u].values[i], weight_decay, ratio);
            } else {
              g[u].values[i] = adapt_one(g[u].values[i], ratio);
            }
          }
          grad_packs[first + u * kThreads] = g[u];
        }
      }
    }
  }
  for (int64_t i = peeled + threadIdx.x; i < count; i += kThreads) {
    if constexpr (kDecays) {
      grad[i] = adapt_one(grad[i], param[i], weight_decay, ratio);
    } else {
      grad[i] = adapt_one(grad[i], ratio);
    }
  }
}

template <typename T, typename Compute>
__device__ void adapt_chunk(const Layers& layers, int layer, Range range, double sign, Compute ratio) {
  T* grad = static_cast<T*>(layers.grad[layer]) + range.begin;
  const int64_t count = range.end - range.begin;
  if (layers.param[layer] == nullptr) {
    adapt_range<false>(grad, static_cast<const T*>(nullptr), count, Compute(0), ratio);
  } else {
    const T* param = static_cast<const T*>(layers.param[layer]) + range.begin;
    adapt_range<true>(grad, param, count, static_cast<Compute>(sign * layers.weight_decay[layer]), ratio);
  }
}

// Partial sums of squares of the parameters, or of the gradients, or of both. One block a chunk.
template <typename T>
__global__ void __launch_bounds__(kThreads)
    measure(const __grid_constant__ Layers layers, double* param_partials, double* grad_partials) {
  const int chunk = blockIdx.x;
  const int layer = find_start(layers.first_chunk, layers.count, chunk);
  const Range range = chunk_range(layers.numel[layer], chunk - layers.first_chunk[layer]);
  const int64_t count = range.end - range.begin;
  if (param_partials != nullptr) {
    const double sum = sum_of_squares(static_cast<const T*>(layers.param[layer]) + range.begin, count);
    if (threadIdx.x == 0) {
      param_partials[chunk] = sum;
    }
  }
  if (grad_partials != nullptr) {
    const double sum = sum_of_squares(static_cast<const T*>(layers.grad[layer]) + range.begin, count);
    if (threadIdx.x == 0) {
      grad_partials[chunk] = sum;
    }
  }
}

// Squared norms from partial sums. One block a layer.
__global__ void __launch_bounds__(kThreads)
    add_partials(const __grid_constant__ Layers layers, const double* partials, double* squared_norms) {
  const int layer = blockIdx.x;
  const int first = layers.first_chunk[layer];
  const double sum = sum_of_partials(partials + first, layers.first_chunk[layer + 1] - first);
  if (threadIdx.x == 0) {
    squared_norms[layer] = sum;
  }
}

// Trust ratios from squared norms. One thread a layer.
template <typename Ratio>
__global__ void __launch_bounds__(kThreads)
    decide(const __grid_constant__ Layers layers, const double* param_squared_norms, const double* grad_squared_norms,
           Ratio* ratios) {
  const int layer = blockIdx.x * kThreads + threadIdx.x;
  if (layer < layers.count) {
    ratios[layer] =
        static_cast<Ratio>(trust_ratio(param_squared_norms[layer], grad_squared_norms[layer],
                                       layers.weight_decay[layer], layers.trust_coef[layer], layers.eps[layer]));
  }
}

// Gradients in place, from trust ratios. One block a chunk, the last chunk first: what was measured last may still be
// in cache.
template <typename T, typename Ratio>
__global__ void __launch_bounds__(kThreads)
    apply(const __grid_constant__ Layers layers, const Ratio* ratios, double sign) {
  const int chunk = gridDim.x - 1 - blockIdx.x;
  const int layer = find_start(layers.first_chunk, layers.count, chunk);
  const Range range = chunk_range(layers.numel[layer], chunk - layers.first_chunk[layer]);
  adapt_chunk<T, Ratio>(layers, layer, range, sign, ratios[layer]);
}

// The same from partial sums. The block of a layer's first chunk also tells the ratio.
template <typename T, typename Ratio>
__global__ void __launch_bounds__(kThreads)
    decide_and_apply(const __grid_constant__ Layers layers, const double* param_partials, const double* grad_partials,
                     Ratio* ratios, double sign) {
  const int chunk = gridDim.x - 1 - blockIdx.x;
  const int layer = find_start(layers.first_chunk, layers.count, chunk);
  const int first = layers.first_chunk[layer];
  const int num_partials = layers.first_chunk[layer + 1] - first;
  const double param_squared_norm = sum_of_partials(param_partials + first, num_partials);
  const double grad_squared_norm = sum_of_partials(grad_partials + first, num_partials);
  const auto ratio = static_cast<Ratio>(trust_ratio(param_squared_norm, grad_squared_norm, layers.weight_decay[layer],
                                                    layers.trust_coef[layer], layers.eps[layer]));
  if (chunk == first && threadIdx.x == 0) {
    ratios[layer] = ratio;
  }
  adapt_chunk<T, Ratio>(layers, layer, chunk_range(layers.numel[layer], chunk - first), sign, ratio);
}

}  // namespace torchlars::cuda
