// Numbers of BF16 in vectors of AVX-512: how FP32 and FP16 become them, whole or in parts.
// ADDBENCH_BF16: this build has them.
#pragma once

#include "avx512.h"

#if defined(__AVX512BF16__) && defined(__AVX512BW__)
#define ADDBENCH_BF16

// A number's first 8 bits: what is left of it when they are taken is exact.
inline __m512 leading(__m512 numbers) {
  return _mm512_castsi512_ps(
      _mm512_and_si512(_mm512_castps_si512(numbers), _mm512_set1_epi32(int(0xffff0000))));
}
inline void store_bf16(char* to, __m512 low, __m512 high) {
  _mm512_storeu_si512(to, (__m512i)_mm512_cvtne2ps_pbh(high, low));
}

// A number rounded to BF16, to nearest, ties to even.
inline __m512 nearest(__m512 numbers) {
  __m256i halves = (__m256i)_mm512_cvtneps_pbh(numbers);
  return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(halves), 16));
}

// Words of two BF16 numbers, which these vectors hold exactly.
inline __m512i pair_up(__m512 low, __m512 high) {
  return _mm512_or_si512(_mm512_srli_epi32(_mm512_castps_si512(low), 16),
                         _mm512_castps_si512(high));
}

// 32 numbers as sums of BF16 numbers: three for any of FP32, two for any of FP16; or rounded to one.
constexpr int weight_parts(int parts) { return parts == 3 ? 2 : 1; }

template <int Parts>
inline void cut(__m512 low, __m512 high, char* to, int64_t stride) {
  if constexpr (Parts > 1) {
    __m512 low1 = leading(low), high1 = leading(high);
    store_bf16(to, low1, high1);
    cut<Parts - 1>(low - low1, high - high1, to + stride, stride);
  } else {
    store_bf16(to, low, high);
  }
}

template <int Parts>
inline void cut_halves(const uint16_t* from, char* to, int64_t stride) {
  auto half = [&](int i) {
    return _mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(from + i)));
  };
  cut<Parts>(half(0), half(16), to, stride);
}

#endif
