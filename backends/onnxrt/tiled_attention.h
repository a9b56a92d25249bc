// Attention with tiles (AMX): 32 queries meet all keys at a time (attention.cc).
//
// All is computed transposed, so that a vector holds 16 queries: scores of keys in rows and queries
// in columns are what the second product wants of them, two rows to a word. The scores stay in the
// second cache.
#pragma once

#include "amx.h"
#include "kernel.h"

#include <algorithm>
#include <cmath>
#include <cstdint>

namespace attention {

struct Problem {
  const float *q, *k, *v;
  float* y;
  int64_t images, queries, keys, heads, size;  // size: D
  float scale;
  bool causal, rounded;
};

inline int64_t up(int64_t value, int64_t step) { return (value + step - 1) / step * step; }

#ifdef ADDBENCH_AMX

constexpr int64_t kQueries = 32;  // of a block
constexpr int64_t kWords = kTile / 4;

// 16 x 16 numbers at `from`, of which `rows` and `columns` are there; the others are zero.
inline void load_square(const float* from, int64_t stride, int64_t rows, int64_t columns,
                        __m512* out) {
  for (int64_t i = 0; i < 16; ++i)
    out[i] = i < rows ? load(from + i * stride, columns) : _mm512_setzero_ps();
}

// Words of two BF16 numbers, one below the other, of the parts of two vectors.
template <int Parts>
void cut_pairs(__m512 low, __m512 high, uint32_t* to, int64_t stride) {
  if (Parts == 1) low = nearest(low), high = nearest(high);
  for (int i = 0; i < Parts; ++i, to += stride) {
    __m512 low_part = leading(low), high_part = leading(high);
    _mm512_storeu_si512(to, pair_up(low_part, high_part));
    low -= low_part, high -= high_part;
  }
}

// e^x for x <= 0, to 1e-7 of it (Cephes' expf); 0 where it is below FP32's normal numbers.
inline __m512 vanishing_exponential(__m512 x) {
  __m512 least = _mm512_set1_ps(-87.0f);
  __mmask16 some = _mm512_cmp_ps_mask(x, least, _CMP_NLT_UQ);  // what is no number stays none
  __m512 n = _mm512_roundscale_ps(x * _mm512_set1_ps(1.44269504088896341f), 0);
  __m512 r = _mm512_fnmadd_ps(n, _mm512_set1_ps(0.693359375f), x);
  r = _mm512_fnmadd_ps(n, _mm512_set1_ps(-2.12194440e-4f), r);
  __m512 sum = _mm512_set1_ps(1.9875691500e-4f);
  for (float c : {1.3981999507e-3f, 8.3334519073e-3f, 4.1665795894e-2f, 1.6666665459e-1f,
                  5.0000001201e-1f})
    sum = _mm512_fmadd_ps(sum, r, _mm512_set1_ps(c));
  sum = _mm512_fmadd_ps(sum, r * r, r + _mm512_set1_ps(1.0f));
  return _mm512_maskz_scalef_ps(some, sum, n);
}

// The keys and values of one head, cut, and room for one block of queries.
template <int Parts>
struct Head {
  int64_t keys, size;  // filled up to 32
  char* k;             // [16 keys][32 of size][part] tiles
  char* v;             // [16 of size][32 keys][part] tiles: transposed
  uint32_t* q;         // [32 of size][part][16 queries] tiles: transposed
  float* scores;       // [keys][32 queries]
  uint32_t* weights;   // [32 keys][part][16 queries] tiles

  Head(const Problem& p, Scratch& memory) : keys(up(p.keys, 32)), size(up(p.size, 32)) {
    int64_t side = keys * size * Parts * 2, block = kQueries * size * Parts * 2;
    int64_t table = keys * kQueries * 4, cut = keys * kQueries * Parts * 2;
    k = memory.of<char>(2 * side + block + table + cut);
    v = k + side;
    q = reinterpret_cast<uint32_t*>(v + side);
    scores = reinterpret_cast<float*>(v + side + block);
    weights = reinterpret_cast<uint32_t*>(v + side + block + table);
  }
};

template <int Parts>
void cut_head(const Problem& p, int64_t image, int64_t head, const Head<Parts>& h) {
  int64_t stride = p.heads * p.size, first = image * p.keys * stride + head * p.size;
  for (int64_t key = 0; key < h.keys; ++key)
    for (int64_t d = 0; d < h.size; d += 32) {
      char* to = h.k + ((key / 16 * h.size + d) / 32 * Parts) * kTile + key % 16 * 64;
      const float* from = p.k + first + key * stride + d;
      int64_t left = key < p.keys ? p.size - d : 0;
      cut<Parts>(load(from, left), load(from + 16, left - 16), to, kTile);
    }
  for (int64_t d = 0; d < h.size; d += 16)
    for (int64_t key = 0; key < h.keys; key += 32) {
      __m512 low[16], high[16];
      const float* from = p.v + first + key * stride + d;
      load_square(from, stride, p.keys - key, p.size - d, low);
      load_square(from + 16 * stride, stride, p.keys - key - 16, p.size - d, high);
      transpose(low), transpose(high);
      char* to = h.v + (d / 16 * h.keys + key) / 32 * Parts * kTile;
      for (int i = 0; i < 16; ++i) cut<Parts>(low[i], high[i], to + i * 64, kTile);
    }
}

// Queries [first, first + 32), times scale.
template <int Parts>
void cut_queries(const Problem& p, int64_t image, int64_t head, int64_t first,
                 const Head<Parts>& h) {
  int64_t stride = p.heads * p.size;
  const float* from = p.q + (image * p.queries + first) * stride + head * p.size;
  __m512 scale = _mm512_set1_ps(p.scale), square[16];
  for (int64_t half = 0; half < 2; ++half)
    for (int64_t d = 0; d < h.size; d += 16) {
      load_square(from + half * 16 * stride + d, stride, p.queries - first - half * 16, p.size - d,
                  square);
      transpose(square);
      uint32_t* to = h.q + (d / 32 * Parts * 2 + half) * kWords + d % 32 / 2 * 16;
      for (int i = 0; i < 16; i += 2)
        cut_pairs<Parts>(square[i] * scale, square[i + 1] * scale, to + i / 2 * 16, 2 * kWords);
    }
}

// 32 rows times 32 columns over `steps` of depth: rows [16][step][part], columns [step][part][16].
template <int Parts>
void multiply_tiles(const char* rows, int64_t stride, const uint32_t* columns, int64_t steps,
                    float* out) {
  clear_sums();
  for (int64_t s = 0; s < steps; ++s, rows += Parts * kTile, columns += Parts * 2 * kWords)
#pragma GCC unroll 3
    for (int i = 0; i < Parts; ++i) {
      _tile_loadd(4, rows + i * kTile, 64);
      _tile_loadd(5, rows + stride + i * kTile, 64);
#pragma GCC unroll 3
      for (int j = 0; j < Parts; ++j) {
        if (i + j >= Parts) break;  // below FP32's last place
        _tile_loadd(6, columns + 2 * j * kWords, 64);
        _tile_loadd(7, columns + (2 * j + 1) * kWords, 64);
        _tile_dpbf16ps(0, 4, 6);
        _tile_dpbf16ps(1, 4, 7);
        _tile_dpbf16ps(2, 5, 6);
        _tile_dpbf16ps(3, 5, 7);
      }
    }
  store_sums(out, 4 * kQueries, true);
}

// Scores to weights, cut, of the queries from `first` on; 1 / their sums.
template <int Parts>
void soften(const Problem& p, const Head<Parts>& h, int64_t first, __m512 inverse[2]) {
  __m512 none = _mm512_set1_ps(-INFINITY);
  for (int half = 0; half < 2; ++half) {
    __m512i place = _mm512_add_epi32(_mm512_set1_epi32(int(first) + half * 16),
                                     _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12,
                                                       13, 14, 15));
    auto score = [&](int64_t key) {
      if (key >= p.keys) return none;
      __m512 found = _mm512_loadu_ps(h.scores + key * kQueries + half * 16);
      if (!p.causal) return found;
      __mmask16 seen = _mm512_cmple_epi32_mask(_mm512_set1_epi32(int(key)), place);
      return _mm512_mask_blend_ps(seen, none, found);
    };
    __m512 most = none, sum = _mm512_setzero_ps();
    for (int64_t key = 0; key < p.keys; ++key) most = _mm512_max_ps(most, score(key));
    for (int64_t key = 0; key < h.keys; key += 2) {
      __m512 low = vanishing_exponential(score(key) - most);
      __m512 high = vanishing_exponential(score(key + 1) - most);
      sum += low + high;
      cut_pairs<Parts>(low, high,
                       h.weights + (key / 32 * Parts * 2 + half) * kWords + key % 32 / 2 * 16,
                       2 * kWords);
    }
    inverse[half] = _mm512_set1_ps(1.0f) / sum;
  }
}

template <int Parts>
void attend_with_tiles(const Problem& p, int64_t image, int64_t head, int64_t from, int64_t to) {
  static thread_local Scratch memory;
  Tiles tiles;
  Head<Parts> h(p, memory);
  cut_head(p, image, head, h);
  alignas(64) float part[32 * kQueries];
  int64_t stride = p.heads * p.size;
  for (int64_t first = from; first < to; first += kQueries) {
    cut_queries(p, image, head, first, h);
    for (int64_t key = 0; key < h.keys; key += 32)
      multiply_tiles<Parts>(h.k + key * h.size * Parts * 2, h.size * Parts * 32, h.q, h.size / 32,
                            h.scores + key * kQueries);
    __m512 inverse[2];
    soften(p, h, first, inverse);
    for (int64_t d = 0; d < h.size; d += 32) {
      multiply_tiles<Parts>(h.v + d * h.keys * Parts * 2, h.keys * Parts * 32, h.weights,
                            h.keys / 32, part);
      for (int64_t half = 0; half < 2; ++half)
        for (int64_t low = 0; low < 32 && d + low < p.size; low += 16) {
          __m512 square[16];
          for (int i = 0; i < 16; ++i)
            square[i] = _mm512_loadu_ps(part + (low + i) * kQueries + half * 16) * inverse[half];
          transpose(square);
          int64_t count = std::min<int64_t>(16, p.size - d - low), query = first + half * 16;
          float* out = p.y + (image * p.queries + query) * stride + head * p.size + d + low;
          for (int64_t i = 0; i < std::min<int64_t>(16, p.queries - query); ++i)
            _mm512_mask_storeu_ps(out + i * stride, (1u << count) - 1, square[i]);
        }
    }
  }
}

#endif

}  // namespace attention
