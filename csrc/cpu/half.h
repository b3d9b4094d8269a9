// Conversion of float16 to float and back, with F16C instructions where the processor has them.
#pragma once

#include <c10/util/Half.h>

#include <cstdint>

#if defined(__x86_64__) && defined(__GNUC__)
#include <immintrin.h>
#define TORCHLARS_F16C 1
#endif

namespace torchlars::cpu {

#ifdef TORCHLARS_F16C
inline bool has_f16c() {
  static const bool has = __builtin_cpu_supports("avx2");  // clang before 17 cannot ask for F16C
  return has;
}

// Both return how many elements they converted: all but a tail.
__attribute__((target("avx,f16c"))) inline int64_t to_float_f16c(const c10::Half* from, float* to, int64_t count) {
  int64_t i = 0;
  for (; i + 8 <= count; i += 8) {
    const __m128i packed = _mm_loadu_si128(reinterpret_cast<const __m128i*>(from + i));
    _mm256_storeu_ps(to + i, _mm256_cvtph_ps(packed));
  }
  return i;
}

__attribute__((target("avx,f16c"))) inline int64_t to_half_f16c(const float* from, c10::Half* to, int64_t count) {
  int64_t i = 0;
  for (; i + 8 <= count; i += 8) {
    const __m256 wide = _mm256_loadu_ps(from + i);
    _mm_storeu_si128(reinterpret_cast<__m128i*>(to + i), _mm256_cvtps_ph(wide, _MM_FROUND_TO_NEAREST_INT));
  }
  return i;
}
#endif

inline void to_float(const c10::Half* from, float* to, int64_t count) {
  int64_t i = 0;
#ifdef TORCHLARS_F16C
  i = has_f16c() ? to_float_f16c(from, to, count) : 0;
#endif
  for (; i < count; ++i) {
    to[i] = static_cast<float>(from[i]);
  }
}

inline void to_half(const float* from, c10::Half* to, int64_t count) {
  int64_t i = 0;
#ifdef TORCHLARS_F16C
  i = has_f16c() ? to_half_f16c(from, to, count) : 0;
#endif
  for (; i < count; ++i) {
    to[i] = static_cast<c10::Half>(from[i]);
  }
}

}  // namespace torchlars::cpu
