// Vectors of AVX-512: those that are not full, and squares of them.
#pragma once

#ifdef __AVX512F__

#include <immintrin.h>

#include <cstdint>

// The first `count` of 16 numbers, zeros after them; none are read beyond.
inline __m512 load(const float* from, int64_t count) {
  if (count >= 16) return _mm512_loadu_ps(from);
  return count > 0 ? _mm512_maskz_loadu_ps((1u << count) - 1, from) : _mm512_setzero_ps();
}

// 16 vectors of 16, rows for columns.
inline void transpose(__m512* rows) {
  __m512 other[16];
  for (int i = 0; i < 16; i += 2) {
    other[i] = _mm512_unpacklo_ps(rows[i], rows[i + 1]);
    other[i + 1] = _mm512_unpackhi_ps(rows[i], rows[i + 1]);
  }
  for (int i = 0; i < 16; i += 4)
    for (int j = 0; j < 2; ++j) {
      __m512d low = _mm512_castps_pd(other[i + j]), high = _mm512_castps_pd(other[i + j + 2]);
      rows[i + 2 * j] = _mm512_castpd_ps(_mm512_unpacklo_pd(low, high));
      rows[i + 2 * j + 1] = _mm512_castpd_ps(_mm512_unpackhi_pd(low, high));
    }
  for (int i = 0; i < 16; i += 8)
    for (int j = 0; j < 4; ++j) {
      other[i + j] = _mm512_shuffle_f32x4(rows[i + j], rows[i + j + 4], 0x88);
      other[i + j + 4] = _mm512_shuffle_f32x4(rows[i + j], rows[i + j + 4], 0xdd);
    }
  for (int j = 0; j < 8; ++j) {
    rows[j] = _mm512_shuffle_f32x4(other[j], other[j + 8], 0x88);
    rows[j + 8] = _mm512_shuffle_f32x4(other[j], other[j + 8], 0xdd);
  }
}

#endif
