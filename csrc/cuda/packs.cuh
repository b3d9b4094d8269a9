// Access to arrays by the threads of a block, in packs of 16 bytes, the widest that there is.
#pragma once

#include <cstdint>

namespace torchlars::cuda {

constexpr int kThreads = 256;
constexpr int kWarp = 32;

// As many elements of T as 16 bytes hold; or kNumbers of them, which may take several accesses, to go with packs of
// another type.
template <typename T, int kNumbers = 16 / sizeof(T)>
struct alignas(kNumbers * sizeof(T) < 16 ? kNumbers * sizeof(T) : 16) Pack {
  static constexpr int kSize = kNumbers;
  T values[kSize];
};

template <int kNumbers, typename T>
__device__ inline bool is_aligned_for(const T* array) {
  return reinterpret_cast<uintptr_t>(array) % alignof(Pack<T, kNumbers>) == 0;
}

template <typename T>
__device__ inline bool is_aligned(const T* array) {
  return is_aligned_for<16 / sizeof(T)>(array);
}

// A pack of an array. If the array is not aligned it is read element by element. kAligned: it is known to be aligned.
template <bool kAligned, int kSize, typename T>
__device__ inline Pack<T, kSize> load_pack(const T* array, int64_t pack) {
  if (kAligned || is_aligned(array)) {
    return reinterpret_cast<const Pack<T, kSize>*>(array)[pack];
  }
  Pack<T, kSize> loaded;
#pragma unroll
  for (int i = 0; i < kSize; ++i) {
    loaded.values[i] = array[pack * kSize + i];
  }
  return loaded;
}

template <bool kAligned, int kSize, typename T>
__device__ inline void store_pack(T* array, int64_t pack, const Pack<T, kSize>& stored) {
  if (kAligned || is_aligned(array)) {
    reinterpret_cast<Pack<T, kSize>*>(array)[pack] = stored;
    return;
  }
#pragma unroll
  for (int i = 0; i < kSize; ++i) {
    array[pack * kSize + i] = stored.values[i];
  }
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

}  // namespace torchlars::cuda
