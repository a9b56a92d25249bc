// The inner loop of products without tiles: rows, in the order in which they are read, times a panel
// of columns whose sums stay in registers.
#pragma once

#include "avx512.h"
#include "vectors.h"

#include <algorithm>

constexpr int kPanel = 32;                      // columns that lie together
constexpr int kHalves = kPanel / (2 * kLanes);  // of a panel, of two vectors
constexpr int kRows = kManyRegisters ? 12 : 6;  // of x that meet two vectors in registers
constexpr bool kMeanwhile = kHalves == 1;       // weights are widened while the first rows meet them
constexpr int64_t kFresh = 4;                   // words, at a time

#ifdef __AVX512F__

// 16 words, of which `left` numbers are there.
template <bool Rounded>
inline __m512 load_words(const float* from, int64_t left) {
#ifdef ADDBENCH_BF16
  if (Rounded) return (__m512)_mm512_cvtne2ps_pbh(load(from + 16, left - 16), load(from, left));
#endif
  return load(from, left);
}

#endif

// At most 16 rows of x, each with `left` numbers, as a product reads them: out [word][row], whose
// words are `pitch` apart. What is missing is zero. Vectors of AVX-512 write 16 rows: beyond the
// pitch, where the next words go.
template <bool Rounded>
void pack_rows(const float* x, int64_t stride, int64_t rows, int64_t left, int64_t words,
               int64_t pitch, Word* out) {
#ifdef __AVX512F__
  for (int64_t w = 0; w < words; w += 16) {
    int64_t at = w * numbers_of(Rounded);
    __m512 square[16] = {};
    for (int64_t i = 0; i < rows; ++i)
      square[i] = load_words<Rounded>(x + i * stride + at, left - at);
    transpose(square);
    for (int64_t j = 0; j < std::min<int64_t>(16, words - w); ++j, out += pitch)
      _mm512_storeu_ps(out, square[j]);
  }
#elif defined(ADDBENCH_NEON)
  int64_t columns = std::min<int64_t>(16, pitch), i = 0;
  for (; i + 4 <= std::min(rows, columns); i += 4) {  // squares of 4, rows for columns
    const float* from = x + i * stride;
    int64_t w = 0;
    for (; w + 4 <= std::min(left, words); w += 4) {
      float32x4_t a = vld1q_f32(from + w), b = vld1q_f32(from + stride + w);
      float32x4_t c = vld1q_f32(from + 2 * stride + w), d = vld1q_f32(from + 3 * stride + w);
      float64x2_t ab0 = vreinterpretq_f64_f32(vtrn1q_f32(a, b));
      float64x2_t ab1 = vreinterpretq_f64_f32(vtrn2q_f32(a, b));
      float64x2_t cd0 = vreinterpretq_f64_f32(vtrn1q_f32(c, d));
      float64x2_t cd1 = vreinterpretq_f64_f32(vtrn2q_f32(c, d));
      float* to = reinterpret_cast<float*>(out) + w * pitch + i;
      vst1q_f32(to, vreinterpretq_f32_f64(vtrn1q_f64(ab0, cd0)));
      vst1q_f32(to + pitch, vreinterpretq_f32_f64(vtrn1q_f64(ab1, cd1)));
      vst1q_f32(to + 2 * pitch, vreinterpretq_f32_f64(vtrn2q_f64(ab0, cd0)));
      vst1q_f32(to + 3 * pitch, vreinterpretq_f32_f64(vtrn2q_f64(ab1, cd1)));
    }
    for (; w < words; ++w)
      for (int64_t j = 0; j < 4; ++j)
        out[w * pitch + i + j] =
            w < left ? reinterpret_cast<const Word*>(from + j * stride)[w] : 0;
  }
  for (; i < columns; ++i)
    for (int64_t w = 0; w < words; ++w)
      out[w * pitch + i] =
          i < rows && w < left ? reinterpret_cast<const Word*>(x + i * stride)[w] : 0;
#else
  for (int64_t i = 0; i < std::min<int64_t>(16, pitch); ++i, x += stride)
    for (int64_t w = 0; w < words; ++w)
      out[w * pitch + i] = i < rows && w < left ? reinterpret_cast<const Word*>(x)[w] : 0;
#endif
}

// A panel of weights: out [half][word][2 vectors].
template <bool Rounded>
void widen_panel(const Half* from, int64_t words, float* out) {
#ifdef ADDBENCH_BF16
  if (Rounded) {
    for (int64_t i = 0; i < 2 * words; ++i)
      cut_halves<1>(from + i * 32, reinterpret_cast<char*>(out + i * 16), 0);
    return;
  }
#endif
  widen_pairs(from, words, kPanel, out);
}

// The same of weights in FP16 from some word of the depth on.
template <bool Rounded>
inline void widen_some(const Half* panel, int64_t word, int64_t words, float* out) {
  widen_panel<Rounded>(panel + word * kPanel * numbers_of(Rounded), words, out);
}

// A panel of weights in 8 bits, [depth][32], with a scale for each column and 2^shift of the depth.
struct Bytes {
  const int8_t* numbers = nullptr;
  const float* scales = nullptr;  // [depth >> shift][32]
  int shift = 0;
  explicit operator bool() const { return numbers != nullptr; }
};

template <bool Rounded>
inline void widen_some(const Bytes& panel, int64_t word, int64_t words, float* out) {
  static_assert(!Rounded, "numbers of 8 bits with scales are widened to FP32");
  constexpr int kPair = 2 * kLanes;
  for (int64_t k = 0; k < words; ++k) {
    const int8_t* numbers = panel.numbers + (word + k) * kPanel;
    const float* scales = panel.scales + ((word + k) >> panel.shift) * kPanel;
    for (int c = 0; c < kPanel; c += kLanes) {
      float* to = out + (c / kPair * words + k) * kPair + c % kPair;
#if defined(__AVX512F__)
      __m128i some = _mm_loadu_si128(reinterpret_cast<const __m128i*>(numbers + c));
      _mm512_storeu_ps(to, _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(some)) *
                               _mm512_loadu_ps(scales + c));
#elif defined(__AVX2__)
      __m128i some = _mm_loadl_epi64(reinterpret_cast<const __m128i*>(numbers + c));
      _mm256_storeu_ps(to, _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(some)) *
                               _mm256_loadu_ps(scales + c));
#elif defined(ADDBENCH_NEON)
      uint32_t four;
      std::memcpy(&four, numbers + c, sizeof four);
      int16x4_t some = vget_low_s16(vmovl_s8(vreinterpret_s8_u32(vdup_n_u32(four))));
      vst1q_f32(to, vmulq_f32(vcvtq_f32_s32(vmovl_s16(some)), vld1q_f32(scales + c)));
#else
      for (int i = c; i < c + kLanes; ++i) to[i - c] = float(numbers[i]) * scales[i];
#endif
    }
  }
}

// R rows of x times two vectors of columns: sums [R][32], or what is added to them, for `more`. The
// weights are widened from `fresh` on the way, if that is there: other units do it meanwhile.
template <bool Rounded, int R, class Panel>
void multiply_rows(const Word* x, const Panel& fresh, float* weights, int64_t words, bool more,
                   float* sums) {
  Vec sum[R][2] = {};
  for (int64_t w = 0; w < words;) {
    int64_t until = fresh ? std::min(w + kFresh, words) : words;
    if (fresh) widen_some<Rounded>(fresh, w, until - w, weights);
    for (; w < until; ++w, weights += 2 * kLanes, x += R) {
      Vec left = load(weights), right = load(weights + kLanes);
#pragma GCC unroll 12
      for (int i = 0; i < R; ++i) {
        sum[i][0] = add_products<Rounded>(sum[i][0], x[i], left);
        sum[i][1] = add_products<Rounded>(sum[i][1], x[i], right);
      }
    }
  }
#pragma GCC unroll 12
  for (int i = 0; i < R; ++i)
    for (int j = 0; j < 2; ++j) {
      float* to = sums + i * kPanel + j * kLanes;
      store(to, more ? load(to) + sum[i][j] : sum[i][j]);
    }
}

// As many rows as are left, at most R.
template <bool Rounded, int R, class Panel>
void multiply_some(int64_t rows, const Word* x, const Panel& fresh, float* weights, int64_t words,
                   bool more, float* sums) {
  if constexpr (R > 1)
    if (rows < R) return multiply_some<Rounded, R - 1>(rows, x, fresh, weights, words, more, sums);
  multiply_rows<Rounded, R>(x, fresh, weights, words, more, sums);
}

// Weights that are there already, widened.
constexpr const Half* kWidened = nullptr;
