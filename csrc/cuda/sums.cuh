// Sums of squares, over flat ranges of memory. Their relative error is below 1e-12, beside what double loses in
// x + scale * y itself; for 16-bit numbers below 2^-23.
//
// Most GPUs add doubles at 1/32 or 1/64 of the rate of floats, which is slower than memory delivers them. So the
// elements that a thread has loaded are squared and summed in float, together with the rounding errors, and only this
// sum is added in double. Where float lacks the range or the precision, the elements themselves are squared and added
// in double.
#pragma once

#include <cmath>
#include <cstdint>

#include "packs.cuh"

namespace torchlars::cuda {

// The sum of every thread's value, in the first thread. A fixed tree, of one warp.
__device__ inline double block_sum(double value) {
  __shared__ double values[kThreads];
  values[threadIdx.x] = value;
  __syncthreads();
  double sum = 0;
  if (threadIdx.x < kWarp) {
    for (int i = threadIdx.x; i < kThreads; i += kWarp) {
      sum += values[i];
    }
    for (int offset = kWarp / 2; offset > 0; offset /= 2) {
      sum += __shfl_down_sync(0xffffffffu, sum, offset);
    }
  }
  __syncthreads();  // values may be written again
  return sum;
}

// The first thread's value, in every thread. A kernel may do it once for each type.
template <typename Value>
__device__ inline Value broadcast(const Value& value) {
  __shared__ Value shared;
  if (threadIdx.x == 0) {
    shared = value;
  }
  __syncthreads();
  return shared;
}

// What a + b lost when it was rounded to sum, exactly. Knuth's TwoSum.
__device__ inline float lost_in_sum(float a, float b, float sum) {
  const float added = sum - a;
  return (a - (sum - added)) + (b - added);
}

// A number as the sum of two floats.
struct FloatPair {
  float high;
  float low;
};

// A sum of squares in float, and what its roundings lost.
class FloatSum {
 public:
  __device__ void add_square(float x) {
    const float square = x * x;
    add(square);
    lost_ += fmaf(x, x, -square);
  }

  // rest, scale_rest: the parts of x.low that float rounded, by up to 2^-24 of each.
  __device__ void add_square(FloatPair x, float rest, float scale_rest) {
    const float square = x.high * x.high;
    add(square);
    lost_ += fmaf(x.high, x.high, -square) + 2 * x.high * x.low;
    rests_ = fmaf(scale_rest, scale_rest, fmaf(rest, rest, rests_));
  }

  // Of 16-bit numbers, whose squares float holds exactly: one rounding for two of them, which is lost.
  __device__ void add_squares(float x, float y) { add(fmaf(y, y, x * x)); }

  // Whether float was enough: no square that matters was too small or too large for it, and no terms of x + scale * y
  // cancelled so nearly that what it rounded of their rests matters. False for NaN.
  __device__ bool is_accurate() const { return kLeast <= sum_ && sum_ <= kMost && rests_ <= kMostRests * sum_; }

  __device__ double value() const { return static_cast<double>(sum_) + static_cast<double>(lost_); }

 private:
  static constexpr float kLeast = 0x1p-80f, kMost = 0x1p120f, kMostRests = 0x1p-45f;

  __device__ void add(float square) {
    const float sum = sum_ + square;
    lost_ += lost_in_sum(sum_, square, sum);
    sum_ = sum;
  }

  float sum_ = 0;
  float lost_ = 0;
  float rests_ = 0;  // the sum of squares of rests
};

// What is summed: the squares of an array.
template <bool kAligned, typename T, int kNumbers = Pack<T>::kSize>
struct Numbers {
  using Loaded = Pack<T, kNumbers>;
  static constexpr int kSize = kNumbers, kUnroll = kAligned ? 4 : 1;

  __device__ Loaded load(int64_t pack) const { return load_pack<kAligned, kSize>(x, pack); }
  __device__ bool is_zero(const Loaded& loaded, int i) const { return static_cast<float>(loaded.values[i]) == 0; }
  __device__ double operator()(const Loaded& loaded, int i) const { return static_cast<double>(loaded.values[i]); }
  __device__ double operator[](int64_t i) const { return static_cast<double>(x[i]); }
  __device__ void add_to(FloatSum& squares, const Loaded& loaded) const {
#pragma unroll
    for (int i = 0; i < kSize; i += 4 / sizeof(T)) {
      const auto number = static_cast<float>(loaded.values[i]);
      if constexpr (sizeof(T) == 2) {
        squares.add_squares(number, static_cast<float>(loaded.values[i + 1]));
      } else {
        squares.add_square(number);
      }
    }
  }

  const T* __restrict__ x;
};

// The same of x + scale * y.
template <bool kAligned, typename T>
struct Sums {
  struct Loaded {
    Pack<T> x, y;
  };
  static constexpr int kSize = Pack<T>::kSize, kUnroll = kAligned ? 2 : 1;

  __device__ Sums(const T* x, const T* y, double scale) : x(x), y(y), scale(scale) {
    const bool is_in_range = 0x1p-100 <= fabs(scale) && fabs(scale) <= 0x1p100;
    in_floats.high = is_in_range ? static_cast<float>(scale) : NAN;  // which leaves the range of a FloatSum
    in_floats.low = static_cast<float>(scale - static_cast<double>(in_floats.high));
  }

  __device__ Loaded load(int64_t pack) const {
    return {load_pack<kAligned, kSize>(x, pack), load_pack<kAligned, kSize>(y, pack)};
  }
  // Whether x + scale * y is 0, where that is seen without double: both are 0, or an update has not moved the number.
  __device__ bool is_zero(const Loaded& loaded, int i) const {
    const auto a = static_cast<float>(loaded.x.values[i]), b = static_cast<float>(loaded.y.values[i]);
    return (a == 0 && b == 0) || (scale == -1 && a - b == 0);
  }
  __device__ double sum(T x, T y) const { return static_cast<double>(x) + scale * static_cast<double>(y); }
  __device__ double operator()(const Loaded& loaded, int i) const {
    return sum(loaded.x.values[i], loaded.y.values[i]);
  }
  __device__ double operator[](int64_t i) const { return sum(x[i], y[i]); }
  __device__ void add_to(FloatSum& squares, const Loaded& loaded) const {
#pragma unroll
    for (int i = 0; i < kSize; ++i) {
      const auto a = static_cast<float>(loaded.x.values[i]);
      const auto b = static_cast<float>(loaded.y.values[i]);
      const float product = in_floats.high * b;
      const float scale_rest = in_floats.low * b;
      const float rest = scale_rest + fmaf(in_floats.high, b, -product);
      const float sum = a + product;
      squares.add_square(FloatPair{sum, lost_in_sum(a, product, sum) + rest}, rest, scale_rest);
    }
  }

  const T* __restrict__ x;
  const T* __restrict__ y;
  double scale;
  FloatPair in_floats;  // scale
};

// Adds the squares of what a thread has loaded; zeros, where there was nothing.
template <typename T, typename Summed, int kUnroll>
__device__ inline void add_squares(double& sum, const Summed& summed,
                                   const typename Summed::Loaded (&loaded)[kUnroll]) {
  if constexpr (sizeof(T) < 8) {
    FloatSum squares;
#pragma unroll
    for (int u = 0; u < kUnroll; ++u) {
      summed.add_to(squares, loaded[u]);
    }
    if (squares.is_accurate()) {
      sum += squares.value();
      return;
    }
    bool is_zero = true;
#pragma unroll
    for (int u = 0; u < kUnroll; ++u) {
#pragma unroll
      for (int i = 0; i < Summed::kSize; ++i) {
        is_zero = is_zero && summed.is_zero(loaded[u], i);
      }
    }
    if (is_zero) {  // as most gradients and updates of embeddings are
      return;
    }
  }
#pragma unroll
  for (int u = 0; u < kUnroll; ++u) {
#pragma unroll
    for (int i = 0; i < Summed::kSize; ++i) {
      const double x = summed(loaded[u], i);
      sum = fma(x, x, sum);
    }
  }
}

// The sum of squares of a range, in the first thread of the block.
template <typename T, typename Summed>
__device__ double sum_of_squares(const Summed& summed, int64_t count) {
  constexpr int kSize = Summed::kSize, kUnroll = Summed::kUnroll;
  const int64_t num_packs = count / kSize;
  double sum = 0;
  for (int64_t first = threadIdx.x; first < num_packs; first += kUnroll * kThreads) {
    typename Summed::Loaded loaded[kUnroll] = {};  // zeros, where there is nothing
#pragma unroll
    for (int u = 0; u < kUnroll; ++u) {
      if (first + u * kThreads < num_packs) {
        loaded[u] = summed.load(first + u * kThreads);
      }
    }
    add_squares<T>(sum, summed, loaded);
  }
  const int64_t i = num_packs * kSize + threadIdx.x;  // what fills no pack
  if (i < count) {
    const double x = summed[i];
    sum = fma(x, x, sum);
  }
  return block_sum(sum);
}

template <typename T>
__device__ double sum_of_squares(const T* x, int64_t count) {
  return is_aligned(x) ? sum_of_squares<T>(Numbers<true, T>{x}, count) : sum_of_squares<T>(Numbers<false, T>{x}, count);
}

// The same of x + scale * y.
template <typename T>
__device__ double sum_of_squares_of_sums(const T* x, const T* y, int64_t count, double scale) {
  return is_aligned(x) && is_aligned(y) ? sum_of_squares<T>(Sums<true, T>(x, y, scale), count)
                                        : sum_of_squares<T>(Sums<false, T>(x, y, scale), count);
}

// The sum of a layer's partial sums, in the first thread.
__device__ inline double sum_of_partials(const double* __restrict__ partials, int64_t count) {
  double sum = 0;
  for (int64_t i = threadIdx.x; i < count; i += kThreads) {
    sum += partials[i];
  }
  return block_sum(sum);
}

}  // namespace torchlars::cuda
