// A 3x3 convolution by Winograd's F(2x2, 3x3), as an operator of onnxruntime.
//
// Lavin and Gray, "Fast Algorithms for Convolutional Neural Networks" (2015): an output tile of 2x2
// is At [(G w Gt) * (Bt d B)] A of an input tile d of 4x4, summed over channels between the two
// transforms: 16 products where the direct form has 36. These transforms only add, subtract and
// halve, so that the result is as exact as the direct form's. F(4x4, 3x3) would save more and lose
// digits to its constants.
//
// With `upsample`, the input is enlarged twice (nearest neighbour) before the convolution. Rows and
// columns 1 and 2 of d are then equal and the third of Bt d B is zero: 9 products are left, and the
// enlarged input is never made.
//
//   x [N, C, H, W], weights [K/8, 16 or 9, C, 8] (G w Gt), bias [K] -> [N, K, H, W] or, enlarged,
//   [N, K, 2H, 2W]. Stride 1, padding 1, no dilation, no groups; FP32. A fourth input, of the
//   output's shape, is added; `relu` makes what is negative zero.
//
// Tiles go in panels of two vectors. The products of one element of Bt d B, over all tiles, are a
// matrix product of their own: weights [K, C] with tiles [C, T].
#include "kernel.h"
#include "vectors.h"

#include <algorithm>
#include <atomic>
#include <cstring>

namespace {

constexpr int kStep = kLanes == 8 ? 4 : 8;  // filters that meet two vectors in registers
constexpr int kRows = 8;             // output channels that lie together in the weights
constexpr int kTiles = 2 * kLanes;   // tiles of a panel
constexpr int kPanels = 2;           // panels that weights meet before the next ones, in large images
constexpr int64_t kLarge = 64;       // panels of a large image
constexpr int kGroup = 8;            // blocks of weights that a panel meets while it is near
constexpr int kAhead = 2;            // blocks of weights that are fetched early
constexpr int kDepth = 64;           // channels of a panel that stay in the first cache
constexpr int kProduct = kRows * kTiles;
constexpr int64_t kUnits = 16;       // pieces of work, at least, for machines with many cores

struct Problem {
  const float *x, *weights, *bias, *residual;
  float* y;
  int64_t channels, height, width, filters;  // of the input; K
  bool upsample, relu;

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
void split_row(const Problem& p, const float* plane, int64_t y, int64_t c, int count,
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
void transform_tiles(const Problem& p, const float* plane, int64_t r, int64_t c, int count,
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
void transform_enlarged(const Problem& p, const float* plane, int64_t r, int64_t c, int count,
                        float* __restrict out, int64_t stride) {
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

// Panels [first, first + count): out [element][panel][channel][tile].
void transform_input(const Problem& p, int64_t first, int count, float* out) {
  int64_t panel = p.channels * kTiles, stride = count * panel;
  int64_t end = std::min(p.tiles, (first + count) * kTiles);
  for (int64_t channel = 0; channel < p.channels; ++channel) {
    float* target = out + channel * kTiles;
    for (int64_t tile = first * kTiles; tile < end;) {
      int64_t row = tile / p.columns, column = tile % p.columns;
      int64_t within = tile % kTiles;
      int run = static_cast<int>(
          std::min({p.columns - column, kTiles - within, end - tile}));
      const float* plane =
          p.x + (row / p.rows * p.channels + channel) * p.height * p.width;
      float* at = target + (tile / kTiles - first) * panel + within;
      (p.upsample ? transform_enlarged : transform_tiles)(p, plane, row % p.rows, column, run, at,
                                                          stride);
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

// out [8, tiles] = weights [C, 8] of 8 filters with a panel [C, tiles]; or plus that, for `more`.
// `next` is fetched meanwhile: the weights that come soon, which large layers read from memory.
void multiply(const float* weights, const float* panel, int64_t channels, bool more,
              const float* next, float* out) {
  for (int first = 0; first < kRows; first += kStep) {
    Vec sum[kStep][2] = {};
    if (more) {
#pragma GCC unroll 8
      for (int i = 0; i < kStep; ++i) {
        sum[i][0] = *reinterpret_cast<const Vec*>(out + (first + i) * kTiles);
        sum[i][1] = *reinterpret_cast<const Vec*>(out + (first + i) * kTiles + kLanes);
      }
    }
    const float* w = weights + first;
    const float* v = panel;
    for (int64_t k = 0; k < channels; ++k, w += kRows, v += kTiles) {
      Vec left = *reinterpret_cast<const Vec*>(v);
      Vec right = *reinterpret_cast<const Vec*>(v + kLanes);
      if (next && k % 2 == 0) __builtin_prefetch(next + k * kRows);
#pragma GCC unroll 8
      for (int i = 0; i < kStep; ++i) {
        sum[i][0] += w[i] * left;
        sum[i][1] += w[i] * right;
      }
    }
#pragma GCC unroll 8
    for (int i = 0; i < kStep; ++i) {
      *reinterpret_cast<Vec*>(out + (first + i) * kTiles) = sum[i][0];
      *reinterpret_cast<Vec*>(out + (first + i) * kTiles + kLanes) = sum[i][1];
    }
  }
}

// At m A + bias of a panel of one filter; m [element] at stride kProduct.
template <bool Upsample>
void transform_output(const Problem& p, const float* m, int64_t filter, int64_t panel) {
  constexpr int kSide = Upsample ? 3 : 4;
  float result[4][kTiles];
  float bias = p.bias ? p.bias[filter] : 0;
  for (int i = 0; i < kTiles; ++i) {
    float top[kSide], bottom[kSide];
#pragma GCC unroll 4
    for (int j = 0; j < kSide; ++j) {
      const float* at = m + j * kProduct + i;
      constexpr int kRow = kSide * kProduct;
      float second = Upsample ? 0 : at[2 * kRow], last = at[(kSide - 1) * kRow];
      top[j] = at[0] + at[kRow] + second;
      bottom[j] = at[kRow] - second - last;
    }
    float t2 = Upsample ? 0 : top[2], b2 = Upsample ? 0 : bottom[2];
    result[0][i] = bias + top[0] + top[1] + t2;
    result[1][i] = bias + top[1] - t2 - top[kSide - 1];
    result[2][i] = bias + bottom[0] + bottom[1] + b2;
    result[3][i] = bias + bottom[1] - b2 - bottom[kSide - 1];
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
      if (p.residual)
        for (int64_t i = 0; i < length; ++i) line[i] += p.residual[at + i];
      if (p.relu)
        for (int64_t i = 0; i < length; ++i) line[i] = std::max(line[i], 0.0f);
      std::memcpy(p.y + at, line, sizeof(float) * length);
    }
    tile += run;
  }
}

// Blocks [from, to) of 8 filters on `count` transformed panels, the first of which is `first`.
void filter_panels(const Problem& p, int64_t from, int64_t to, int64_t first, int count,
                   const float* tiles, int64_t stride, float* products) {
  int64_t panel = p.channels * kTiles, block = p.channels * kRows;
  for (int64_t group = from; group < to; group += kGroup) {
    int64_t end = std::min(to, group + kGroup);
    for (int e = 0; e < p.elements; ++e)
      for (int64_t k = 0; k < p.channels; k += kDepth)
        for (int64_t b = group; b < end; ++b) {
          const float* weights = p.weights + (b * p.elements + e) * block + k * kRows;
          const float* next = b + kAhead < end
                                  ? weights + kAhead * p.elements * block
                                  : weights + (kAhead - end + group) * p.elements * block +
                                        kDepth * kRows;
          for (int q = 0; q < count; ++q)
            multiply(weights, tiles + e * stride + q * panel + k * kTiles,
                     std::min<int64_t>(kDepth, p.channels - k), k > 0, q == 0 ? next : nullptr,
                     products + (((b - group) * kPanels + q) * p.elements + e) * kProduct);
        }
    for (int64_t b = group; b < end; ++b)
      for (int q = 0; q < count; ++q)
        for (int i = 0; i < kRows; ++i) {
          const float* m =
              products + ((b - group) * kPanels + q) * p.elements * kProduct + i * kTiles;
          (p.upsample ? transform_output<true> : transform_output<false>)(
              p, m, b * kRows + i, first + q);
        }
  }
}

struct Job {
  const Problem* problem;
  uint64_t number;      // tells one call from another
  int64_t shares;       // of the filters, of each block of panels
  std::atomic<bool> failed{false};
};

// Thread work: a share of the filters on a block of panels. The tiles that a thread has transformed
// serve the next share too.
void work(void* data, size_t index) noexcept {
  auto& job = *static_cast<Job*>(data);
  const Problem& p = *job.problem;
  static thread_local Scratch tiles, products;
  static thread_local uint64_t held_call = 0;
  static thread_local int64_t held_first = -1;
  int64_t first = static_cast<int64_t>(index) / job.shares * p.span;
  int64_t share = static_cast<int64_t>(index) % job.shares;
  int count = static_cast<int>(std::min<int64_t>(p.span, p.panels - first));
  int64_t blocks = p.filters / kRows, stride = count * p.channels * kTiles;
  try {
    float* v = tiles.of<float>(p.elements * stride);
    float* m = products.of<float>(size_t{kGroup} * kPanels * p.elements * kProduct);
    if (held_call != job.number || held_first != first) {
      transform_input(p, first, count, v);
      held_call = job.number, held_first = first;
    }
    filter_panels(p, blocks * share / job.shares, blocks * (share + 1) / job.shares, first, count,
                  v, stride, m);
  } catch (const std::bad_alloc&) {
    job.failed = true;
  }
}

OrtStatus* convolve(const Api& api, OrtKernelContext* context, const Problem& p) {
  static std::atomic<uint64_t> calls{0};
  int64_t blocks = (p.panels + p.span - 1) / p.span;
  int64_t most = std::max<int64_t>(1, p.filters / (kRows * kGroup));
  Job job{&p, ++calls, std::min(most, (kUnits + blocks - 1) / blocks)};
  if (auto* error = api.KernelContext_ParallelFor(context, work,
                                                  static_cast<size_t>(blocks * job.shares), 0,
                                                  &job))
    return error;
  if (job.failed)
    return api.CreateStatus(kFail, "bad_alloc: no memory for the tiles of a convolution");
  return nullptr;
}

struct WinogradConv {
  static constexpr const char* kName = "WinogradConv";
  static constexpr int kInputs[] = {kFloat, kFloat, kFloat, kFloat};
  static constexpr size_t kNeeded = 2;
  static constexpr int kOverwritten = 3;  // the sum in the memory of what is added

  Api api;
  int64_t upsample = 0, relu = 0;

  OrtStatus* configure(const OrtKernelInfo* info) {
    if (auto* error = api.KernelInfoGetAttribute_int64(info, "upsample", &upsample)) return error;
    return api.KernelInfoGetAttribute_int64(info, "relu", &relu);
  }

  OrtStatus* compute(OrtKernelContext* context) const {
    Tensor x, weights, bias, residual;
    if (auto* error = read(api, context, {&x, &weights, &bias, &residual})) return error;
    Problem p{};
    p.x = x.floats(), p.weights = weights.floats(), p.bias = bias.floats();
    p.residual = residual.floats();
    p.channels = x.dims[1], p.height = x.dims[2], p.width = x.dims[3];
    p.filters = weights.dims[0] * kRows;
    p.upsample = upsample != 0, p.relu = relu != 0;
    p.finish(x.dims[0]);
    int64_t scale = p.upsample ? 2 : 1;
    int64_t dims[4] = {x.dims[0], p.filters, scale * p.height, scale * p.width};
    if (x.rank != 4 || weights.rank != 4 || weights.dims[1] != p.elements ||
        weights.dims[2] != p.channels || weights.dims[3] != kRows ||
        (bias.data && (bias.rank != 1 || bias.dims[0] != p.filters)) ||
        (residual.data && (residual.rank != 4 || !std::equal(dims, dims + 4, residual.dims))))
      return api.CreateStatus(kInvalidArgument,
                              "WinogradConv wants x [N, C, H, W], weights [K/8, 16 (9 with"
                              " upsample), C, 8], bias [K], and what is added in the shape of the"
                              " output");
    if (auto* error = write(api, context, dims, 4, &p.y)) return error;
    return p.tiles ? convolve(api, context, p) : nullptr;
  }
};

}  // namespace

extern const OrtCustomOp kWinogradConv = describe<WinogradConv>();
