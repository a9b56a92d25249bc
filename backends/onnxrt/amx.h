// Tiles (Intel AMX): 16 rows of 64 bytes, whose BF16 products are summed in FP32.
#pragma once

#if defined(__AMX_BF16__) && defined(__AVX512BF16__) && defined(__AVX512BW__) && \
    defined(__linux__)
#define ADDBENCH_AMX

#include <immintrin.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <cstdint>

constexpr int kTile = 1024;  // bytes

// Whether Linux lets this process use them: it must be asked, once.
inline bool may_use_tiles() {
  constexpr int kAskForState = 0x1023, kTileData = 18;  // ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA
  static const bool allowed = syscall(SYS_arch_prctl, kAskForState, kTileData) == 0;
  return allowed;
}

// Eight whole tiles, for as long as this lives; others on the same thread set their own.
class Tiles {
 public:
  Tiles() {
    struct __attribute__((packed)) {
      uint8_t palette = 1, start = 0, reserved[14] = {};
      uint16_t bytes[16] = {64, 64, 64, 64, 64, 64, 64, 64};
      uint8_t rows[16] = {16, 16, 16, 16, 16, 16, 16, 16};
    } layout;
    _tile_loadconfig(&layout);
  }
  Tiles(const Tiles&) = delete;
  ~Tiles() { _tile_release(); }
};

// Sums of 32 rows (16, unless `two`) and 32 columns are in tiles 0 and 1, 2 and 3.
inline void clear_sums() {
  _tile_zero(0);
  _tile_zero(1);
  _tile_zero(2);
  _tile_zero(3);
}
inline void load_sums(const float* from, int64_t stride, bool two) {
  _tile_loadd(0, from, stride);
  _tile_loadd(1, from + 16, stride);
  if (two) {
    _tile_loadd(2, from + 4 * stride, stride);
    _tile_loadd(3, from + 4 * stride + 16, stride);
  }
}
inline void store_sums(float* to, int64_t stride, bool two) {
  _tile_stored(0, to, stride);
  _tile_stored(1, to + 16, stride);
  if (two) {
    _tile_stored(2, to + 4 * stride, stride);
    _tile_stored(3, to + 4 * stride + 16, stride);
  }
}

// The first `count` of 16 numbers, zeros after them; none are read beyond.
inline __m512 load(const float* from, int64_t count) {
  if (count >= 16) return _mm512_loadu_ps(from);
  return count > 0 ? _mm512_maskz_loadu_ps((1u << count) - 1, from) : _mm512_setzero_ps();
}

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
