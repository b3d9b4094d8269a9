// The loops, over flat ranges of memory. Plain code that a compiler turns into vector instructions.
#pragma once

#include <c10/util/BFloat16.h>
#include <c10/util/Half.h>

#include <cstdint>

#include "../trust_ratio.h"

// One binary for every x86-64: the loader picks the widest version that the processor runs. Elsewhere the same loops
// are compiled once, for the baseline.
#if defined(__x86_64__) && defined(__linux__) && defined(__GNUC__) && !defined(__clang__) && __GNUC__ >= 11
#define TORCHLARS_CLONES __attribute__((target_clones("arch=x86-64-v4", "arch=x86-64-v3", "default")))
#define TORCHLARS_INLINE inline __attribute__((always_inline))
#else
#define TORCHLARS_CLONES
#define TORCHLARS_INLINE inline
#endif

namespace torchlars::cpu {

// Sums in double, in independent lanes that vector registers can hold, joined in a fixed order.
template <typename T>
TORCHLARS_INLINE double sum_of_squares_loop(const T* x, int64_t count) {
  constexpr int kLanes = 32;
  double lanes[kLanes] = {};
  int64_t i = 0;
  for (; i + kLanes <= count; i += kLanes) {
    for (int lane = 0; lane < kLanes; ++lane) {
      const double value = static_cast<double>(x[i + lane]);
      lanes[lane] += value * value;
    }
  }
  for (int lane = 0; i < count; ++i, ++lane) {
    const double value = static_cast<double>(x[i]);
    lanes[lane] += value * value;
  }
  for (int width = kLanes / 2; width > 0; width /= 2) {
    for (int lane = 0; lane < width; ++lane) {
      lanes[lane] += lanes[lane + width];
    }
  }
  return lanes[0];
}

template <typename T, typename Compute>
TORCHLARS_INLINE void adapt_loop(T* __restrict grad, const T* __restrict param, int64_t count, Compute weight_decay,
                                 Compute ratio) {
  if (param == nullptr) {
    for (int64_t i = 0; i < count; ++i) {
      grad[i] = static_cast<T>(adapted_gradient(static_cast<Compute>(grad[i]), ratio));
    }
  } else {
    for (int64_t i = 0; i < count; ++i) {
      grad[i] = static_cast<T>(
          adapted_gradient(static_cast<Compute>(grad[i]), static_cast<Compute>(param[i]), weight_decay, ratio));
    }
  }
}

// Clones are made of functions, not of templates: hence an overload a type.
#define TORCHLARS_KERNELS(T, Compute)                                                                         \
  TORCHLARS_CLONES double sum_of_squares(const T* x, int64_t count) { return sum_of_squares_loop(x, count); } \
  TORCHLARS_CLONES void adapt(T* grad, const T* param, int64_t count, Compute weight_decay, Compute ratio) {  \
    adapt_loop<T, Compute>(grad, param, count, weight_decay, ratio);                                          \
  }

TORCHLARS_KERNELS(double, double)
TORCHLARS_KERNELS(float, float)
TORCHLARS_KERNELS(c10::BFloat16, float)
TORCHLARS_KERNELS(c10::Half, float)

#undef TORCHLARS_KERNELS

}  // namespace torchlars::cpu
