// The transforms of Winograd's F(2x2, 3x3): of an image's tiles, and back (winograd.cc).
#pragma once

#include "vectors.h"

#include <algorithm>
#include <cmath>
#include <cstring>

namespace winograd {

constexpr int kRows = 8;             // output channels that lie together in the weights
constexpr int kTiles = 2 * kLanes;   // tiles of a panel
constexpr int kPanels = 2;           // panels that weights meet before the next ones, in large images
constexpr int64_t kLarge = 64;       // panels of a large image
constexpr int kProduct = kRows * kTiles;
constexpr float kWild = 1e18f;  // products beyond it, or none: their tile is computed again

struct Problem {
  const float *x, *bias, *residual;
  const Word* weights;
  float* y;
  int64_t channels, height, width, filters;  // of the input; K
  bool upsample, relu, rounded;              // rounded: to BF16
  int64_t words;  // of a tile's channels, each of one or, rounded, two of them

  int64_t rows, columns, tiles, panels;  // of tiles: in an image, in all
  int elements, span;                    // of tiles: transformed elements; panels of a block

  void finish(int64_t batch) {
    rows = upsample ? height : (height + 1) / 2;
    columns = upsample ? width : (width + 1) / 2;
    tiles = batch * rows * columns;
    panels = (tiles + kTiles - 1) / kTiles;
    elements = upsample ? 9 : 16;
    span = panels < kLarge ? 1 : kPanels;
  }
};

// A row of an image, padded: columns 2c - 1 + 2i (odd) and 2c + 2i (even) for i in 0..count.
inline void split_row(const Problem& p, const float* plane, int64_t y, int64_t c, int count,
                      float* __restrict odd, float* __restrict even) {
  if (y < 0 || y >= p.height) {
    std::memset(odd, 0, sizeof(float) * (count + 1));
    std::memset(even, 0, sizeof(float) * (count + 1));
    return;
  }
  const float* row = plane + y * p.width + 2 * c;
  int inside = static_cast<int>(std::min<int64_t>(count + 1, (p.width - 2 * c) / 2));
  odd[0] = c > 0 ? row[-1] : 0;
  for (int i = 0; i < inside; ++i) {
    even[i] = row[2 * i];
    odd[i + 1] = row[2 * i + 1];  // one more than is read
  }
  for (int i = inside; i <= count; ++i) {
    int64_t at = 2 * (c + i);
    even[i] = at < p.width ? row[2 * i] : 0;
    if (i > inside) odd[i] = 0;
  }
}

// Bt d B of `count` tiles of one row of tiles, from column c on; element e goes to out + e * stride.
inline void transform_tiles(const Problem& p, const float* plane, int64_t r, int64_t c, int count,
                            float* __restrict out, int64_t stride) {
  float odd[4][kTiles + 2], even[4][kTiles + 2];
  for (int i = 0; i < 4; ++i) split_row(p, plane, 2 * r - 1 + i, c, count, odd[i], even[i]);
  for (int i = 0; i <= count; ++i) {
    float a0 = odd[0][i], a1 = odd[1][i], a2 = odd[2][i], a3 = odd[3][i];
    float b0 = even[0][i], b1 = even[1][i], b2 = even[2][i], b3 = even[3][i];
    odd[0][i] = a0 - a2, odd[1][i] = a1 + a2, odd[2][i] = a2 - a1, odd[3][i] = a1 - a3;
    even[0][i] = b0 - b2, even[1][i] = b1 + b2, even[2][i] = b2 - b1, even[3][i] = b1 - b3;
  }
  for (int e = 0; e < 4; ++e, out += 4 * stride) {
    for (int i = 0; i < count; ++i) out[i] = odd[e][i] - odd[e][i + 1];
    for (int i = 0; i < count; ++i) out[stride + i] = even[e][i] + odd[e][i + 1];
    for (int i = 0; i < count; ++i) out[2 * stride + i] = odd[e][i + 1] - even[e][i];
    for (int i = 0; i < count; ++i) out[3 * stride + i] = even[e][i] - even[e][i + 1];
  }
}

// The same of an enlarged image, whose tiles are centred on the pixels of the small one.
inline void transform_enlarged(const Problem& p, const float* plane, int64_t r, int64_t c,
                               int count, float* __restrict out, int64_t stride) {
  float d[3][kTiles + 2];  // columns c - 1 .. c + count
  for (int i = 0; i < 3; ++i) {
    int64_t y = r - 1 + i;
    if (y < 0 || y >= p.height) {
      std::memset(d[i], 0, sizeof(float) * (count + 2));
      continue;
    }
    const float* row = plane + y * p.width + c;
    d[i][0] = c > 0 ? row[-1] : 0;
    std::memcpy(d[i] + 1, row, sizeof(float) * count);
    d[i][count + 1] = c + count < p.width ? row[count] : 0;
  }
  for (int i = 0; i < count + 2; ++i) {
    float above = d[0][i], here = d[1][i], below = d[2][i];
    d[0][i] = above - here, d[1][i] = 2 * here, d[2][i] = here - below;
  }
  for (int e = 0; e < 3; ++e, out += 3 * stride) {
    for (int i = 0; i < count; ++i) out[i] = d[e][i] - d[e][i + 1];
    for (int i = 0; i < count; ++i) out[stride + i] = 2 * d[e][i + 1];
    for (int i = 0; i < count; ++i) out[2 * stride + i] = d[e][i + 1] - d[e][i + 2];
  }
}

#ifdef ADDBENCH_BF16

// Two channels of some tiles, rounded: out is laid out as theirs.
inline void pair_channels(const float* low, const float* high, int elements, int count,
                          Word* out, int64_t stride) {
  for (int e = 0; e < elements; ++e, low += kTiles, high += kTiles, out += stride)
    for (int i = 0; i < count; i += 16) {
      __mmask16 mask = (1u << std::min(16, count - i)) - 1;
      __m512 left = _mm512_maskz_loadu_ps(mask, low + i);
      __m512 right = _mm512_maskz_loadu_ps(mask, high + i);
      _mm512_mask_storeu_epi32(out + i, mask, pair_up(nearest(left), nearest(right)));
    }
}

#endif

// Bt d B of tiles of a row, of the channel, or the two of them, that word number `word` is of.
template <bool Rounded>
void transform_word(const Problem& p, int64_t image, int64_t word, int64_t r, int64_t c, int count,
                    Word* out, int64_t stride) {
  auto* transform = p.upsample ? transform_enlarged : transform_tiles;
  int64_t channel = word * numbers_of(Rounded), size = p.height * p.width;
  const float* plane = p.x + (image * p.channels + channel) * size;
#ifdef ADDBENCH_BF16
  if (Rounded) {
    alignas(64) float low[16 * kTiles], high[16 * kTiles] = {};
    transform(p, plane, r, c, count, low, kTiles);
    if (channel + 1 < p.channels) transform(p, plane + size, r, c, count, high, kTiles);
    return pair_channels(low, high, p.elements, count, out, stride);
  }
#endif
  transform(p, plane, r, c, count, reinterpret_cast<float*>(out), stride);
}

// Panels [first, first + count): out [element][panel][word][tile].
template <bool Rounded>
void transform_input(const Problem& p, int64_t first, int count, Word* out) {
  int64_t panel = p.words * kTiles, stride = count * panel;
  int64_t end = std::min(p.tiles, (first + count) * kTiles);
  for (int64_t word = 0; word < p.words; ++word) {
    Word* target = out + word * kTiles;
    for (int64_t tile = first * kTiles; tile < end;) {
      int64_t row = tile / p.columns, column = tile % p.columns;
      int64_t within = tile % kTiles;
      int run = static_cast<int>(
          std::min({p.columns - column, kTiles - within, end - tile}));
      Word* at = target + (tile / kTiles - first) * panel + within;
      transform_word<Rounded>(p, row / p.rows, word, row % p.rows, column, run, at, stride);
      tile += run;
    }
    if (int64_t left = (first + count) * kTiles - end; left > 0) {  // of the last panel
      for (int e = 0; e < p.elements; ++e)
        for (int64_t i = 0; i < left; ++i) {
          int64_t tile = end + i - first * kTiles;
          target[e * stride + tile / kTiles * panel + tile % kTiles] = 0;
        }
    }
  }
}

// The direct form's weights of one channel, out of G w Gt: exact where G's sums were, else within
// their rounding.
inline void weights_of(const Problem& p, int64_t filter, int64_t channel, float (&w)[3][3]) {
  int side = p.upsample ? 3 : 4, numbers = numbers_of(p.rounded);
  float half[3][4];
  auto inner = [&](float a, float b, float c) { return p.upsample ? 2 * b - a - c : b - c; };
  for (int j = 0; j < side; ++j) {
    float u[4];
    for (int i = 0; i < side; ++i) {
      int64_t block = filter / kRows * p.elements + i * side + j;
      Word word = p.weights[(block * p.words + channel / numbers) * kRows + filter % kRows];
      uint32_t bits = word;
      if (p.rounded) bits = channel % 2 ? bits & 0xffff0000 : bits << 16;
      std::memcpy(&u[i], &bits, sizeof bits);
    }
    half[0][j] = u[0], half[2][j] = u[side - 1];
    half[1][j] = p.upsample ? inner(u[0], u[1], u[2]) : inner(0, u[1], u[2]);
  }
  for (int i = 0; i < 3; ++i) {
    float* h = half[i];
    w[i][0] = h[0], w[i][2] = h[side - 1];
    w[i][1] = p.upsample ? inner(h[0], h[1], h[2]) : inner(0, h[1], h[2]);
  }
}

// One number of the output by the direct form. The differences of a tile turn an infinity into no
// number, its sums overflow where those of the direct form need not, and what is as large as that
// leaves its rounding in the whole tile.
inline float direct(const Problem& p, int64_t image, int64_t filter, int64_t row, int64_t column) {
  int64_t scale = p.upsample ? 2 : 1;
  double sum = p.bias ? p.bias[filter] : 0;
  for (int64_t c = 0; c < p.channels; ++c) {
    const float* plane = p.x + (image * p.channels + c) * p.height * p.width;
    float x[3][3] = {}, w[3][3], any = 0;
    for (int i = 0; i < 3; ++i)
      for (int j = 0; j < 3; ++j) {
        int64_t y = row + i - 1, z = column + j - 1;
        if (y < 0 || y >= scale * p.height || z < 0 || z >= scale * p.width) continue;
        x[i][j] = plane[y / scale * p.width + z / scale];
        if (std::isnan(x[i][j])) any = x[i][j];
      }
    if (std::isnan(any)) return any;  // at once: a whole image may be no number
    weights_of(p, filter, c, w);
    for (int i = 0; i < 3; ++i)
      for (int j = 0; j < 3; ++j) sum += double{x[i][j]} * w[i][j];
    if (std::isnan(sum)) break;
  }
  return static_cast<float>(sum);
}

// At m A + bias of a panel of one filter; m [element] at stride kProduct.
template <bool Upsample>
void transform_output(const Problem& p, const float* m, int64_t filter, int64_t panel) {
  constexpr int kSide = Upsample ? 3 : 4;
  float result[4][kTiles];
  float bias = p.bias ? p.bias[filter] : 0;
  int wild[kTiles], any = 0;
  for (int i = 0; i < kTiles; ++i) {
    float top[kSide], bottom[kSide], squares = 0;
#pragma GCC unroll 4
    for (int j = 0; j < kSide; ++j) {
      const float* at = m + j * kProduct + i;
      constexpr int kRow = kSide * kProduct;
      float second = Upsample ? 0 : at[2 * kRow], last = at[(kSide - 1) * kRow];
      squares += at[0] * at[0] + at[kRow] * at[kRow] + second * second + last * last;
      top[j] = at[0] + at[kRow] + second;
      bottom[j] = at[kRow] - second - last;
    }
    float t2 = Upsample ? 0 : top[2], b2 = Upsample ? 0 : bottom[2];
    result[0][i] = bias + top[0] + top[1] + t2;
    result[1][i] = bias + top[1] - t2 - top[kSide - 1];
    result[2][i] = bias + bottom[0] + bottom[1] + b2;
    result[3][i] = bias + bottom[1] - b2 - bottom[kSide - 1];
    wild[i] = !(squares < kWild * kWild), any |= wild[i];
  }
  int64_t height = Upsample ? 2 * p.height : p.height, width = Upsample ? 2 * p.width : p.width;
  int64_t end = std::min(p.tiles, (panel + 1) * kTiles);
  for (int64_t tile = panel * kTiles; tile < end;) {
    int64_t row = tile / p.columns, column = tile % p.columns, first = tile - panel * kTiles;
    int64_t run = std::min(p.columns - column, end - tile);
    int64_t whole = std::min(run, (width - 2 * column) / 2), y = 2 * (row % p.rows);
    int64_t plane = (row / p.rows * p.filters + filter) * height * width;
    for (int half = 0; half < 2 && y + half < height; ++half) {
      int64_t at = plane + (y + half) * width + 2 * column;
      const float* left = result[2 * half] + first;
      const float* right = result[2 * half + 1] + first;
      float line[2 * kTiles];  // not in place: the output may be the memory of what is added
      for (int64_t i = 0; i < whole; ++i) line[2 * i] = left[i], line[2 * i + 1] = right[i];
      if (whole < run) line[2 * whole] = left[whole];  // an odd width's last column
      int64_t length = whole + run;
      for (int64_t i = 0; any && i < length; ++i)
        if (wild[first + i / 2])
          line[i] = direct(p, row / p.rows, filter, y + half, 2 * column + i);
      if (p.residual)
        for (int64_t i = 0; i < length; ++i) line[i] += p.residual[at + i];
      if (p.relu)
        for (int64_t i = 0; i < length; ++i) line[i] = std::max(line[i], 0.0f);
      std::memcpy(p.y + at, line, sizeof(float) * length);
    }
    tile += run;
  }
}

}  // namespace winograd
