// The CPU kernels: plain loops over flat ranges of memory, which the compiler vectorises.
#pragma once

#include <c10/macros/Macros.h>
#include <c10/util/BFloat16.h>
#include <c10/util/Half.h>

#include <algorithm>
#include <cstdint>
#include <type_traits>

#include "../adam.h"
#include "../codes.h"
#include "../sgd.h"
#include "../trust_ratio.h"
#include "half.h"

// On x86-64, functions are compiled for several instruction sets, and glibc's loader picks the widest that the
// processor supports. Elsewhere they are compiled once, for the baseline. clang has target_clones since 14, but up to
// 16 it chooses wrongly among levels of x86-64, hence the names of instruction sets. All that is called is inlined, and
// so compiled for the same set.
#if defined(__x86_64__) && defined(__GLIBC__) && defined(__clang__) && __clang_major__ >= 14
#define TORCHLARS_CLONES __attribute__((target_clones("avx512f", "avx2", "default")))
#elif defined(__x86_64__) && defined(__GLIBC__) && !defined(__clang__) && __GNUC__ >= 11
#define TORCHLARS_CLONES __attribute__((target_clones("arch=x86-64-v4", "arch=x86-64-v3", "default")))
#else
#define TORCHLARS_CLONES
#endif

namespace torchlars::cpu {

// Prefetches memory that is read next. It raises the bandwidth of passes that only read.
C10_ALWAYS_INLINE void prefetch(const void* begin, const void* end) {
#if defined(__GNUC__)
  constexpr int kCacheLine = 64;
  for (const char* line = static_cast<const char*>(begin); line < end; line += kCacheLine) {
    __builtin_prefetch(line);
  }
#endif
}

// A partial sum of squares, in double: independent lanes that fit vector registers and are added in a fixed order.
struct Lanes {
  static constexpr int kCount = 32;
  double sums[kCount] = {};
};

template <typename T>
C10_ALWAYS_INLINE void add_squares_loop(Lanes& lanes, const T* x, int64_t count) {
  constexpr int kCount = Lanes::kCount;
  Lanes local = lanes;
  const T* const tail = x + count / kCount * kCount;
  for (; x != tail; x += kCount) {
    for (int lane = 0; lane < kCount; ++lane) {
      const double value = static_cast<double>(x[lane]);
      local.sums[lane] += value * value;
    }
  }
  if (const int64_t rest = count % kCount; rest != 0) {
    for (int lane = 0; lane < kCount; ++lane) {  // of constant length, so that lanes stay in registers
      const double value = lane < rest ? static_cast<double>(tail[lane]) : 0.0;
      local.sums[lane] += value * value;
    }
  }
  lanes = local;
}

// The same of x + scale * y.
template <typename T>
C10_ALWAYS_INLINE void add_squares_of_sums_loop(Lanes& lanes, const T* x, const T* y, int64_t count, double scale) {
  constexpr int kCount = Lanes::kCount;
  Lanes local = lanes;
  const T* const tail = x + count / kCount * kCount;
  for (; x != tail; x += kCount, y += kCount) {
    for (int lane = 0; lane < kCount; ++lane) {
      const double value = static_cast<double>(x[lane]) + scale * static_cast<double>(y[lane]);
      local.sums[lane] += value * value;
    }
  }
  for (int lane = 0; lane < count % kCount; ++lane) {
    const double value = static_cast<double>(x[lane]) + scale * static_cast<double>(y[lane]);
    local.sums[lane] += value * value;
  }
  lanes = local;
}

template <int kWidth>
C10_ALWAYS_INLINE double join_lanes(const double* lanes) {
  if constexpr (kWidth == 1) {
    return lanes[0];
  } else {
    double halves[kWidth / 2];
    for (int lane = 0; lane < kWidth / 2; ++lane) {
      halves[lane] = lanes[lane] + lanes[lane + kWidth / 2];
    }
    return join_lanes<kWidth / 2>(halves);
  }
}

template <bool kDecays, typename T, typename Compute>
C10_ALWAYS_INLINE void adapt_loop(T* __restrict grad, const T* __restrict param, int64_t count, Compute weight_decay,
                                  Compute ratio, Compute inv_scale) {
  for (int64_t i = 0; i < count; ++i) {
    const auto value = static_cast<Compute>(grad[i]);
    if constexpr (kDecays) {
      grad[i] = static_cast<T>(adapted_gradient(value, static_cast<Compute>(param[i]), weight_decay, ratio, inv_scale));
    } else {
      grad[i] = static_cast<T>(adapted_gradient(value, ratio, inv_scale));
    }
  }
}

template <bool kDecays, bool kMomentum, bool kNesterov, typename T, typename M, typename Compute>
C10_ALWAYS_INLINE void sgd_loop(T* __restrict param, const T* __restrict grad, M* __restrict momentum, int64_t count,
                                const SgdNumbers<Compute>& given) {
  const SgdNumbers<Compute> numbers = given;  // a local copy, which cannot alias the outputs
  for (int64_t i = 0; i < count; ++i) {
    Compute m = 0;
    if constexpr (kMomentum) {
      m = static_cast<Compute>(momentum[i]);
    }
    param[i] = static_cast<T>(
        sgd<kDecays, kMomentum, kNesterov>(static_cast<Compute>(param[i]), static_cast<Compute>(grad[i]), m, numbers));
    if constexpr (kMomentum) {
      momentum[i] = static_cast<M>(m);
    }
  }
}

// Takes the step of a block whose momentum is in 8 bits, and codes that anew. kUsual: the block is full, so that the
// compiler unrolls both loops and keeps the arrays in registers, and gradients are neither scaled nor dampened, which
// saves two multiplications by 1.
template <bool kDecays, bool kNesterov, bool kUsual, typename T>
C10_ALWAYS_INLINE void sgd_block_loop(T* __restrict param, const T* __restrict grad, int8_t* __restrict codes,
                                      float& scale, const Block& block, const SgdNumbers<float>& given) {
  SgdNumbers<float> numbers = given;  // a local copy, which cannot alias the outputs
  if constexpr (kUsual) {
    numbers.inv_scale = numbers.undampened = 1;
  }
  const int count = kUsual ? kBlock : block.count;
  const float old_scale = scale;
  float momentum[kBlock];
  uint32_t salts[kBlock];
  uint32_t largest = 0;
  for (int i = 0; i < count; ++i) {
    const auto old_param = static_cast<float>(param[i]);
    float m = static_cast<float>(codes[i]) * old_scale;
    param[i] = static_cast<T>(sgd<kDecays, true, kNesterov>(old_param, static_cast<float>(grad[i]), m, numbers));
    momentum[i] = m;
    salts[i] = salt_of(old_param, i);
    largest = largest < magnitude(m) ? magnitude(m) : largest;
  }
  const Scale coded(largest);
  scale = coded.scale;
  if (coded.inverse == 0) {
    std::fill_n(codes, count, int8_t(0));
    return;
  }
  const uint32_t salt = salt_of(block.position, largest);
  for (int i = 0; i < count; ++i) {
    codes[i] = code_of(momentum[i], salts[i] + salt, coded.inverse);
  }
}

template <bool kDecays, bool kNesterov, typename T>
C10_ALWAYS_INLINE void sgd_block_loop(T* param, const T* grad, int8_t* codes, float& scale, const Block& block,
                                      const SgdNumbers<float>& numbers) {
  const bool is_usual = block.count == kBlock && numbers.inv_scale == 1 && numbers.undampened == 1;
  is_usual ? sgd_block_loop<kDecays, kNesterov, true>(param, grad, codes, scale, block, numbers)
           : sgd_block_loop<kDecays, kNesterov, false>(param, grad, codes, scale, block, numbers);
}

// A part of a step of Adam. kMoments: updates the moments; kApplies: updates the parameter, else writes the updates.
// kUsual: gradients are neither scaled nor negated, which saves two multiplications by 1. Moments of gradients that
// hold weight decay are updated in double: in float they would have two roundings more, which their square doubles.
// Updates that two passes compute are those of the moments as they are stored.
template <bool kMoments, bool kApplies, bool kUsual, bool kDecays, bool kDecoupled, typename T, typename M,
          typename Compute>
C10_ALWAYS_INLINE void adam_loop(T* __restrict param, const T* __restrict grad, M* __restrict exp_avg,
                                 M* __restrict exp_avg_sq, Compute* __restrict updates, int64_t count,
                                 const AdamNumbers<double>& given, Compute lr) {
  constexpr bool kGradientDecays = kDecays && !kDecoupled, kUpdateDecays = kDecays && kDecoupled;
  using Wide = std::conditional_t<kGradientDecays, double, Compute>;
  AdamNumbers<Wide> of_moments(given);  // local copies, which cannot alias the outputs
  const AdamNumbers<Compute> of_update(given);
  if constexpr (kUsual) {
    of_moments.ratio = of_moments.inv_scale = 1;
  }
  for (int64_t i = 0; i < count; ++i) {
    Compute m, v;
    if constexpr (kMoments) {
      auto new_m = static_cast<Wide>(exp_avg[i]);
      auto new_v = static_cast<Wide>(exp_avg_sq[i]);
      update_moments<kGradientDecays>(static_cast<Wide>(param[i]), static_cast<Wide>(grad[i]), new_m, new_v,
                                      of_moments);
      exp_avg[i] = static_cast<M>(new_m);
      exp_avg_sq[i] = static_cast<M>(new_v);
      m = static_cast<Compute>(new_m);
      v = static_cast<Compute>(new_v);
    }
    if constexpr (!kMoments || !kApplies) {
      m = static_cast<Compute>(exp_avg[i]);
      v = static_cast<Compute>(exp_avg_sq[i]);
    }
    const auto w = static_cast<Compute>(param[i]);
    const Compute update = adam_update<kUpdateDecays>(w, m, v, of_update);
    if constexpr (kApplies) {
      param[i] = static_cast<T>(w - lr * update);
    } else {
      updates[i] = update;
    }
  }
}

// Without grad, the moments are those of this step already. With updates, these are written instead of the parameter.
template <bool kDecays, bool kDecoupled, typename T, typename M, typename Compute>
C10_ALWAYS_INLINE void adam_loop(T* param, const T* grad, M* exp_avg, M* exp_avg_sq, Compute* updates, int64_t count,
                                 const AdamNumbers<double>& numbers, Compute lr) {
  // With coupled weight decay, ratios other than 1 are usual, and a loop without them is not worth 70 KB.
  const bool is_usual = (!kDecays || kDecoupled) && numbers.ratio == 1 && numbers.inv_scale == 1;
#define TORCHLARS_CALL(kMoments, kApplies, kUsual)                                                             \
  adam_loop<kMoments, kApplies, kUsual, kDecays, kDecoupled>(param, grad, exp_avg, exp_avg_sq, updates, count, \
                                                             numbers, lr)
  if (grad == nullptr) {
    updates == nullptr ? TORCHLARS_CALL(false, true, true) : TORCHLARS_CALL(false, false, true);
  } else if (is_usual) {
    updates == nullptr ? TORCHLARS_CALL(true, true, true) : TORCHLARS_CALL(true, false, true);
  } else {
    updates == nullptr ? TORCHLARS_CALL(true, true, false) : TORCHLARS_CALL(true, false, false);
  }
#undef TORCHLARS_CALL
}

template <typename T, typename Compute>
C10_ALWAYS_INLINE void scale_update_loop(T* __restrict param, const T* __restrict old_param, int64_t count,
                                         Compute ratio) {
  for (int64_t i = 0; i < count; ++i) {
    param[i] = static_cast<T>(scaled_update(static_cast<Compute>(param[i]), static_cast<Compute>(old_param[i]), ratio));
  }
}

// target_clones applies to functions, not to templates: hence one overload for each type.
TORCHLARS_CLONES double join(const Lanes& lanes) { return join_lanes<Lanes::kCount>(lanes.sums); }

// sum_of_squares is add_squares from zero and join, without the way through memory, which takes longer than few
// elements.
#define TORCHLARS_SUM(T)                                                                                            \
  TORCHLARS_CLONES void add_squares(Lanes& lanes, const T* x, int64_t count) { add_squares_loop(lanes, x, count); } \
                                                                                                                    \
  TORCHLARS_CLONES double sum_of_squares(const T* x, int64_t count) {                                               \
    Lanes lanes;                                                                                                    \
    add_squares_loop(lanes, x, count);                                                                              \
    return join_lanes<Lanes::kCount>(lanes.sums);                                                                   \
  }

#define TORCHLARS_SUM_OF_SUMS(T)                                                                                 \
  TORCHLARS_CLONES void add_squares_of_sums(Lanes& lanes, const T* x, const T* y, int64_t count, double scale) { \
    add_squares_of_sums_loop(lanes, x, y, count, scale);                                                         \
  }

#define TORCHLARS_SCALE_UPDATE(T, Compute)                                                         \
  TORCHLARS_CLONES void scale_update(T* param, const T* old_param, int64_t count, Compute ratio) { \
    scale_update_loop(param, old_param, count, ratio);                                             \
  }

#define TORCHLARS_ADAPT(T, Compute)                                                                        \
  TORCHLARS_CLONES void adapt(T* grad, const T* param, int64_t count, Compute weight_decay, Compute ratio, \
                              Compute inv_scale) {                                                         \
    if (inv_scale != 1) {                                                                                  \
      param ? adapt_loop<true>(grad, param, count, weight_decay, ratio, inv_scale)                         \
            : adapt_loop<false>(grad, param, count, weight_decay, ratio, inv_scale);                       \
    } else { /* a constant: the multiplication is left out */                                              \
      param ? adapt_loop<true>(grad, param, count, weight_decay, ratio, Compute(1))                        \
            : adapt_loop<false>(grad, param, count, weight_decay, ratio, Compute(1));                      \
    }                                                                                                      \
  }

#define TORCHLARS_SGD(T, M, Compute)                                                            \
  TORCHLARS_CLONES void sgd(T* param, const T* grad, M* momentum, int64_t count, bool nesterov, \
                            const SgdNumbers<Compute>& numbers) {                               \
    const bool decays = numbers.weight_decay != 0;                                              \
    if (momentum == nullptr) {                                                                  \
      decays ? sgd_loop<true, false, false>(param, grad, momentum, count, numbers)              \
             : sgd_loop<false, false, false>(param, grad, momentum, count, numbers);            \
    } else if (nesterov) {                                                                      \
      decays ? sgd_loop<true, true, true>(param, grad, momentum, count, numbers)                \
             : sgd_loop<false, true, true>(param, grad, momentum, count, numbers);              \
    } else {                                                                                    \
      decays ? sgd_loop<true, true, false>(param, grad, momentum, count, numbers)               \
             : sgd_loop<false, true, false>(param, grad, momentum, count, numbers);             \
    }                                                                                           \
  }

#define TORCHLARS_SGD_BLOCK(T)                                                                              \
  TORCHLARS_CLONES void sgd_block(T* param, const T* grad, int8_t* codes, float& scale, const Block& block, \
                                  bool nesterov, const SgdNumbers<float>& numbers) {                        \
    if (numbers.weight_decay != 0) {                                                                        \
      nesterov ? sgd_block_loop<true, true>(param, grad, codes, scale, block, numbers)                      \
               : sgd_block_loop<true, false>(param, grad, codes, scale, block, numbers);                    \
    } else {                                                                                                \
      nesterov ? sgd_block_loop<false, true>(param, grad, codes, scale, block, numbers)                     \
               : sgd_block_loop<false, false>(param, grad, codes, scale, block, numbers);                   \
    }                                                                                                       \
  }

#define TORCHLARS_ADAM(T, M, Compute)                                                                             \
  TORCHLARS_CLONES void adam(T* param, const T* grad, M* exp_avg, M* exp_avg_sq, Compute* updates, int64_t count, \
                             const AdamNumbers<double>& numbers, Compute lr) {                                    \
    if (numbers.decoupled_weight_decay != 0) {                                                                    \
      adam_loop<true, true>(param, grad, exp_avg, exp_avg_sq, updates, count, numbers, lr);                       \
    } else if (numbers.weight_decay != 0) {                                                                       \
      adam_loop<true, false>(param, grad, exp_avg, exp_avg_sq, updates, count, numbers, lr);                      \
    } else {                                                                                                      \
      adam_loop<false, false>(param, grad, exp_avg, exp_avg_sq, updates, count, numbers, lr);                     \
    }                                                                                                             \
  }

TORCHLARS_SUM(double)
// The square of a float is exact in double, so a fused multiply-add gives the same bits and is faster.
#if defined(__GNUC__) && !defined(__clang__)
#pragma GCC push_options
#pragma GCC optimize("fp-contract=fast")
#endif
TORCHLARS_SUM(float)
TORCHLARS_SUM(c10::BFloat16)
#if defined(__GNUC__) && !defined(__clang__)
#pragma GCC pop_options
#endif
TORCHLARS_SUM_OF_SUMS(double)
TORCHLARS_SUM_OF_SUMS(float)
TORCHLARS_SUM_OF_SUMS(c10::BFloat16)
TORCHLARS_SCALE_UPDATE(double, double)
TORCHLARS_SCALE_UPDATE(float, float)
TORCHLARS_SCALE_UPDATE(c10::BFloat16, float)
TORCHLARS_ADAPT(double, double)
TORCHLARS_ADAPT(float, float)
TORCHLARS_ADAPT(c10::BFloat16, float)
TORCHLARS_SGD(double, double, double)
TORCHLARS_SGD(float, float, float)
TORCHLARS_SGD(c10::BFloat16, c10::BFloat16, float)
TORCHLARS_SGD(c10::BFloat16, float, float)
TORCHLARS_SGD_BLOCK(float)
TORCHLARS_SGD_BLOCK(c10::BFloat16)
TORCHLARS_ADAM(double, double, double)
TORCHLARS_ADAM(float, float, float)
TORCHLARS_ADAM(c10::BFloat16, c10::BFloat16, float)
TORCHLARS_ADAM(c10::BFloat16, float, float)

#undef TORCHLARS_SUM
#undef TORCHLARS_SUM_OF_SUMS
#undef TORCHLARS_SCALE_UPDATE
#undef TORCHLARS_ADAPT
#undef TORCHLARS_SGD
#undef TORCHLARS_SGD_BLOCK
#undef TORCHLARS_ADAM

// float16 is converted tile by tile and takes the loops of float: compilers do not vectorise its conversions.
constexpr int64_t kHalfTile = 1024;

inline void add_squares(Lanes& lanes, const c10::Half* x, int64_t count) {
  float block[kHalfTile];
  for (int64_t i = 0; i < count; i += kHalfTile) {
    const int64_t size = std::min(kHalfTile, count - i);
    to_float(x + i, block, size);
    add_squares(lanes, block, size);
  }
}

inline double sum_of_squares(const c10::Half* x, int64_t count) {
  Lanes lanes;
  add_squares(lanes, x, count);
  return join(lanes);
}

inline void add_squares_of_sums(Lanes& lanes, const c10::Half* x, const c10::Half* y, int64_t count, double scale) {
  float x_block[kHalfTile];
  float y_block[kHalfTile];
  for (int64_t i = 0; i < count; i += kHalfTile) {
    const int64_t size = std::min(kHalfTile, count - i);
    to_float(x + i, x_block, size);
    to_float(y + i, y_block, size);
    add_squares_of_sums(lanes, x_block, y_block, size, scale);
  }
}

inline void scale_update(c10::Half* param, const c10::Half* old_param, int64_t count, float ratio) {
  float param_block[kHalfTile];
  float old_block[kHalfTile];
  for (int64_t i = 0; i < count; i += kHalfTile) {
    const int64_t size = std::min(kHalfTile, count - i);
    to_float(param + i, param_block, size);
    to_float(old_param + i, old_block, size);
    scale_update(param_block, old_block, size, ratio);
    to_half(param_block, param + i, size);
  }
}

inline void adapt(c10::Half* grad, const c10::Half* param, int64_t count, float weight_decay, float ratio,
                  float inv_scale) {
  float grad_block[kHalfTile];
  float param_block[kHalfTile];
  for (int64_t i = 0; i < count; i += kHalfTile) {
    const int64_t size = std::min(kHalfTile, count - i);
    to_float(grad + i, grad_block, size);
    if (param != nullptr) {
      to_float(param + i, param_block, size);
    }
    adapt(grad_block, param ? param_block : nullptr, size, weight_decay, ratio, inv_scale);
    to_half(grad_block, grad + i, size);
  }
}

// M: the type of the momentum, c10::Half or float.
template <typename M>
inline void sgd(c10::Half* param, const c10::Half* grad, M* momentum, int64_t count, bool nesterov,
                const SgdNumbers<float>& numbers) {
  float param_block[kHalfTile];
  float grad_block[kHalfTile];
  float momentum_block[kHalfTile];
  for (int64_t i = 0; i < count; i += kHalfTile) {
    const int64_t size = std::min(kHalfTile, count - i);
    to_float(param + i, param_block, size);
    to_float(grad + i, grad_block, size);
    if constexpr (std::is_same_v<M, float>) {
      sgd(param_block, grad_block, momentum ? momentum + i : nullptr, size, nesterov, numbers);
    } else if (momentum == nullptr) {
      sgd(param_block, grad_block, static_cast<float*>(nullptr), size, nesterov, numbers);
    } else {
      to_float(momentum + i, momentum_block, size);
      sgd(param_block, grad_block, momentum_block, size, nesterov, numbers);
      to_half(momentum_block, momentum + i, size);
    }
    to_half(param_block, param + i, size);
  }
}

inline void sgd_block(c10::Half* param, const c10::Half* grad, int8_t* codes, float& scale, const Block& block,
                      bool nesterov, const SgdNumbers<float>& numbers) {
  float param_block[kBlock];
  float grad_block[kBlock];
  to_float(param, param_block, block.count);
  to_float(grad, grad_block, block.count);
  sgd_block(param_block, grad_block, codes, scale, block, nesterov, numbers);
  to_half(param_block, param, block.count);
}

// M: the type of the moments, c10::Half or float.
template <typename M>
inline void adam(c10::Half* param, const c10::Half* grad, M* exp_avg, M* exp_avg_sq, float* updates, int64_t count,
                 const AdamNumbers<double>& numbers, float lr) {
  float param_block[kHalfTile];
  float grad_block[kHalfTile];
  float exp_avg_block[kHalfTile];
  float exp_avg_sq_block[kHalfTile];
  for (int64_t i = 0; i < count; i += kHalfTile) {
    const int64_t size = std::min(kHalfTile, count - i);
    float* const to_write = updates == nullptr ? nullptr : updates + i;
    const float* new_grad = grad == nullptr ? nullptr : grad_block;
    to_float(param + i, param_block, size);
    if (grad != nullptr) {
      to_float(grad + i, grad_block, size);
    }
    if constexpr (std::is_same_v<M, float>) {
      adam(param_block, new_grad, exp_avg + i, exp_avg_sq + i, to_write, size, numbers, lr);
    } else {
      to_float(exp_avg + i, exp_avg_block, size);
      to_float(exp_avg_sq + i, exp_avg_sq_block, size);
      adam(param_block, new_grad, exp_avg_block, exp_avg_sq_block, to_write, size, numbers, lr);
      if (grad != nullptr) {
        to_half(exp_avg_block, exp_avg + i, size);
        to_half(exp_avg_sq_block, exp_avg_sq + i, size);
      }
      if (grad != nullptr && updates != nullptr) {  // again, from the moments as they are stored
        to_float(exp_avg + i, exp_avg_block, size);
        to_float(exp_avg_sq + i, exp_avg_sq_block, size);
        adam(param_block, static_cast<const float*>(nullptr), exp_avg_block, exp_avg_sq_block, to_write, size, numbers,
             lr);
      }
    }
    if (updates == nullptr) {
      to_half(param_block, param + i, size);
    }
  }
}

}  // namespace torchlars::cpu
