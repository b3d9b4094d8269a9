// The CPU kernels over ranges of memory whose dtype is found at run time: functions by dtype.
#pragma once

#include <ATen/Dispatch.h>
#include <ATen/OpMathType.h>

#include <algorithm>
#include <array>

#include "../adam.h"
#include "../codes.h"
#include "../plan.h"
#include "../sgd.h"
#include "kernels.h"

namespace torchlars::cpu {

#define TORCHLARS_DISPATCH(TYPE, NAME, ...) \
  AT_DISPATCH_FLOATING_TYPES_AND2(c10::kBFloat16, c10::kHalf, TYPE, NAME, __VA_ARGS__)

// Prefetches a part of a tensor.
C10_ALWAYS_INLINE void prefetch(const void* data, Range range, int64_t bytes_per_element) {
  const char* const begin = static_cast<const char*>(data);
  cpu::prefetch(begin + range.begin * bytes_per_element, begin + range.end * bytes_per_element);
}

using AddSquares = void (*)(Lanes& lanes, const void* x, Range range);

inline AddSquares add_squares_of(c10::ScalarType dtype) {
  AddSquares function = nullptr;
  TORCHLARS_DISPATCH(dtype, "squared_norms", [&] {
    function = [](Lanes& lanes, const void* x, Range range) {
      cpu::add_squares(lanes, static_cast<const scalar_t*>(x) + range.begin, range.end - range.begin);
    };
  });
  return function;
}

using SumOfSquares = double (*)(const void* x, Range range);

inline SumOfSquares sum_of_squares_of(c10::ScalarType dtype) {
  SumOfSquares function = nullptr;
  TORCHLARS_DISPATCH(dtype, "squared_norms", [&] {
    function = [](const void* x, Range range) {
      return cpu::sum_of_squares(static_cast<const scalar_t*>(x) + range.begin, range.end - range.begin);
    };
  });
  return function;
}

using AddSquaresOfSums = void (*)(Lanes& lanes, const void* x, const void* y, Range range, double scale);

inline AddSquaresOfSums add_squares_of_sums_of(c10::ScalarType dtype) {
  AddSquaresOfSums function = nullptr;
  TORCHLARS_DISPATCH(dtype, "squared_norms", [&] {
    function = [](Lanes& lanes, const void* x, const void* y, Range range, double scale) {
      cpu::add_squares_of_sums(lanes, static_cast<const scalar_t*>(x) + range.begin,
                               static_cast<const scalar_t*>(y) + range.begin, range.end - range.begin, scale);
    };
  });
  return function;
}

using Adapt = void (*)(void* grad, const void* param, Range range, double weight_decay, double ratio, double inv_scale);

inline Adapt adapt_of(c10::ScalarType dtype) {
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

using ScaleUpdate = void (*)(void* param, const void* old_param, Range range, double ratio);

inline ScaleUpdate scale_update_of(c10::ScalarType dtype) {
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

using SgdRange = void (*)(void* param, const void* grad, void* momentum, Range range, bool nesterov,
                          const SgdNumbers<double>& numbers);

template <typename T, typename M>
void sgd_range(void* param, const void* grad, void* momentum, Range range, bool nesterov,
               const SgdNumbers<double>& numbers) {
  cpu::sgd(static_cast<T*>(param) + range.begin, static_cast<const T*>(grad) + range.begin,
           momentum ? static_cast<M*>(momentum) + range.begin : nullptr, range.end - range.begin, nesterov,
           SgdNumbers<at::opmath_type<T>>(numbers));
}

inline SgdRange sgd_of(c10::ScalarType dtype, c10::ScalarType momentum_dtype) {
  SgdRange function = nullptr;
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

inline SgdBlocks sgd_blocks_of(c10::ScalarType dtype) {
  return dtype == c10::kFloat      ? sgd_blocks<float>
         : dtype == c10::kBFloat16 ? sgd_blocks<c10::BFloat16>
                                   : sgd_blocks<c10::Half>;
}

// A part of a layer's step of Adam. With a grad it updates the moments. Without lanes it updates the parameter by lr
// times the update; with lanes it adds the squares of the parameter and of the update to them.
using AdamRange = void (*)(void* param, const void* grad, void* exp_avg, void* exp_avg_sq, Range range,
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

inline AdamRange adam_of(c10::ScalarType dtype, c10::ScalarType moment_dtype) {
  AdamRange function = nullptr;
  TORCHLARS_DISPATCH(dtype, "adam_", [&] {
    using compute_t = at::opmath_type<scalar_t>;
    function = moment_dtype == dtype ? adam_range<scalar_t, scalar_t> : adam_range<scalar_t, compute_t>;
  });
  return function;
}

}  // namespace torchlars::cpu
