// Vectors of FP32, as wide as the CPU has them, their products and exponential, and FP16 widened.
#pragma once

#include "bf16.h"

#include <cstdint>
#include <cstring>

#ifdef __AVX2__
#include <immintrin.h>
#endif

// 64-bit ARM: every CPU has these vectors, products that are added in one rounding, and FP16
// widened.
#if defined(__aarch64__) && defined(__ARM_NEON)
#include <arm_neon.h>
#define ADDBENCH_NEON
#endif

#if defined(__AVX512F__)
constexpr int kLanes = 16;
#elif defined(__AVX__)
constexpr int kLanes = 8;
#else
constexpr int kLanes = 4;
#endif

#if defined(__AVX512F__) || defined(ADDBENCH_NEON)
constexpr bool kManyRegisters = true;  // 32 vectors, not 16
#else
constexpr bool kManyRegisters = false;
#endif

typedef float Vec __attribute__((vector_size(4 * kLanes), aligned(4), may_alias));
typedef int32_t Ints __attribute__((vector_size(4 * kLanes), aligned(4), may_alias));
typedef uint16_t Half;  // bits of an FP16 number

#ifdef ADDBENCH_NEON
inline Vec load(const float* from) { return (Vec)vld1q_f32(from); }
inline void store(float* to, Vec value) { vst1q_f32(to, (float32x4_t)value); }
#else
inline Vec load(const float* from) { return *reinterpret_cast<const Vec*>(from); }
inline void store(float* to, Vec value) { *reinterpret_cast<Vec*>(to) = value; }
#endif

// The first `count` numbers, fewer than a vector has; the rest of it is `fill`.
inline Vec load_some(const float* from, int64_t count, float fill) {
  Vec value = Vec{} + fill;
  std::memcpy(&value, from, sizeof(float) * count);
  return value;
}
inline void store_some(float* to, int64_t count, Vec value) {
  std::memcpy(to, &value, sizeof(float) * count);
}

typedef uint32_t Word __attribute__((may_alias));  // a number of FP32; rounded, two of BF16
constexpr int numbers_of(bool rounded) { return rounded ? 2 : 1; }

// sum + x w, in each place; rounded, of both numbers.
template <bool Rounded>
inline Vec add_products(Vec sum, Word x, Vec w) {
#ifdef ADDBENCH_NEON
  return (Vec)vfmaq_f32((float32x4_t)sum, vreinterpretq_f32_u32(vdupq_n_u32(x)), (float32x4_t)w);
#endif
  Vec all = (Vec)(Ints{} + static_cast<int32_t>(x));
#ifdef ADDBENCH_BF16
  if (Rounded) return _mm512_dpbf16_ps(sum, (__m512bh)all, (__m512bh)w);
#endif
  return sum + all * w;
}

// e^x within 2 units in the last place; beyond [-87.3, 88] that of the bound, so that neither it
// nor its reciprocal overflows. No number stays none.
//
// e^x = 2^n e^r with n the integer nearest to x / log(2). The polynomial and log(2) in two parts,
// the first of few bits, are those of Moshier's Cephes (expf.c).
inline Vec exponential(Vec x) {
  constexpr float kRound = 0x1.8p23f;  // a number added to it is rounded to an integer
  constexpr int32_t kRoundBits = 0x4b400000;
  x = x < -87.3f ? Vec{} - 87.3f : x;
  x = x > 88.0f ? Vec{} + 88.0f : x;
  Vec rounded = x * 1.44269504f + kRound;
  Vec n = rounded - kRound;
  Vec r = x - n * 0.693359375f;
  r = r + n * 2.12194440e-4f;
  Vec p = Vec{} + 1.9875691500e-4f;
  p = p * r + 1.3981999507e-3f;
  p = p * r + 8.3334519073e-3f;
  p = p * r + 4.1665795894e-2f;
  p = p * r + 1.6666665459e-1f;
  p = p * r + 5.0000001201e-1f;
  p = p * (r * r) + r + 1.0f;
  Ints power = ((Ints)rounded - kRoundBits + 127) << 23;  // the bits of 2^n
  return p * (Vec)power;
}

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
#elif defined(ADDBENCH_NEON)
      uint16x4x2_t both = vld2_u16(pair);
      vst1q_f32(even, vcvt_f32_f16(vreinterpret_f16_u16(both.val[0])));
      vst1q_f32(odd, vcvt_f32_f16(vreinterpret_f16_u16(both.val[1])));
#else
      for (int i = 0; i < kLanes; ++i) even[i] = widen(pair[2 * i]), odd[i] = widen(pair[2 * i + 1]);
#endif
    }
}
