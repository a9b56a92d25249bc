// Vectors of FP32, as wide as the CPU has them, and FP16 widened to them.
#pragma once

#include <cstdint>
#include <cstring>

#ifdef __AVX2__
#include <immintrin.h>
#endif

#if defined(__AVX512F__)
constexpr int kLanes = 16;
#elif defined(__AVX__)
constexpr int kLanes = 8;
#else
constexpr int kLanes = 4;
#endif

typedef float Vec __attribute__((vector_size(4 * kLanes), aligned(4), may_alias));
typedef uint16_t Half;  // bits of an FP16 number

// FP16 to FP32 without instructions for it.
inline float widen(Half half) {
  uint32_t sign = uint32_t{half} >> 15 << 31, rest = half & 0x7fffu;
  uint32_t bits = rest << 13;
  float value;
  if (rest >= 0x7c00) {  // infinite, or no number
    bits |= 0x7f800000;
    std::memcpy(&value, &bits, 4);
  } else {  // FP32's exponent is larger by 112, of small numbers too
    std::memcpy(&value, &bits, 4);
    value *= 0x1p112f;
  }
  std::memcpy(&bits, &value, 4);
  bits |= sign;
  std::memcpy(&value, &bits, 4);
  return value;
}

// [depth/2][columns][2] FP16 -> [columns / (2 vectors)][depth][2 vectors] FP32; depth is even.
inline void widen_pairs(const Half* from, int64_t depth, int columns, float* to) {
  constexpr int kPair = 2 * kLanes;
  for (int64_t k = 0; k < depth; k += 2)
    for (int c = 0; c < columns; c += kLanes) {
      const Half* pair = from + k * columns + 2 * c;
      float* even = to + (c / kPair * depth + k) * kPair + c % kPair;
      float* odd = even + kPair;
#if defined(__AVX512F__)
      __m512i both = _mm512_loadu_si512(pair);
      _mm512_storeu_ps(even, _mm512_cvtph_ps(_mm512_cvtepi32_epi16(both)));
      _mm512_storeu_ps(odd, _mm512_cvtph_ps(_mm512_cvtepi32_epi16(_mm512_srli_epi32(both, 16))));
#elif defined(__AVX2__) && defined(__F16C__)
      __m256i both = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(pair));
      __m256i low = _mm256_blend_epi16(both, _mm256_setzero_si256(), 0xaa);
      __m256i mixed = _mm256_packus_epi32(low, _mm256_srli_epi32(both, 16));
      __m256i apart = _mm256_permute4x64_epi64(mixed, 0xd8);
      _mm256_storeu_ps(even, _mm256_cvtph_ps(_mm256_castsi256_si128(apart)));
      _mm256_storeu_ps(odd, _mm256_cvtph_ps(_mm256_extracti128_si256(apart, 1)));
#else
      for (int i = 0; i < kLanes; ++i) even[i] = widen(pair[2 * i]), odd[i] = widen(pair[2 * i + 1]);
#endif
    }
}
