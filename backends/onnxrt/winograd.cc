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
// WinogradConvBF16 takes weights [K/8, 16 or 9, C/2 (rounded up), 8, 2] in BF16, rounds Bt d B to
// it, and sums the products in FP32 (AVX-512-BF16).
//
// What is infinite in x, or above some 1e37, spoils all of a tile, not only what it should reach:
// where products are above 1e18, or no numbers, their tile is computed again by the direct form.
//
// Tiles go in panels of two vectors. The products of one element of Bt d B, over all tiles, are a
// matrix product of their own: weights [K, C] with tiles [C, T].
#include "kernel.h"
#include "winograd_tiles.h"

#include <algorithm>
#include <atomic>

namespace {

using namespace winograd;

constexpr int kStep = kLanes == 8 ? 4 : 8;  // filters that meet two vectors in registers
constexpr int kGroup = 8;            // blocks of weights that a panel meets while it is near
constexpr int kAhead = 2;            // blocks of weights that are fetched early
constexpr int kDepth = 64;           // words of a panel that stay in the first cache
constexpr int64_t kUnits = 16;       // pieces of work, at least, for machines with many cores

// out [8, tiles] = weights [words, 8] of 8 filters with a panel [words, tiles]; or plus that, for
// `more`. `next` is fetched meanwhile: the weights that come soon, which large layers read from
// memory.
template <bool Rounded>
void multiply(const Word* weights, const Word* panel, int64_t words, bool more, const Word* next,
              float* out) {
  for (int first = 0; first < kRows; first += kStep) {
    Vec sum[kStep][2] = {};
    if (more) {
#pragma GCC unroll 8
      for (int i = 0; i < kStep; ++i) {
        sum[i][0] = *reinterpret_cast<const Vec*>(out + (first + i) * kTiles);
        sum[i][1] = *reinterpret_cast<const Vec*>(out + (first + i) * kTiles + kLanes);
      }
    }
    const Word *w = weights + first, *v = panel;
    for (int64_t k = 0; k < words; ++k, w += kRows, v += kTiles) {
      Vec left = *reinterpret_cast<const Vec*>(v);
      Vec right = *reinterpret_cast<const Vec*>(v + kLanes);
      if (next && k % 2 == 0) __builtin_prefetch(next + k * kRows);
#pragma GCC unroll 8
      for (int i = 0; i < kStep; ++i) {
        sum[i][0] = add_products<Rounded>(sum[i][0], w[i], left);
        sum[i][1] = add_products<Rounded>(sum[i][1], w[i], right);
      }
    }
#pragma GCC unroll 8
    for (int i = 0; i < kStep; ++i) {
      *reinterpret_cast<Vec*>(out + (first + i) * kTiles) = sum[i][0];
      *reinterpret_cast<Vec*>(out + (first + i) * kTiles + kLanes) = sum[i][1];
    }
  }
}

// Blocks [from, to) of 8 filters on `count` transformed panels, the first of which is `first`.
template <bool Rounded>
void filter_panels(const Problem& p, int64_t from, int64_t to, int64_t first, int count,
                   const Word* tiles, int64_t stride, float* products) {
  int64_t panel = p.words * kTiles, block = p.words * kRows;
  for (int64_t group = from; group < to; group += kGroup) {
    int64_t end = std::min(to, group + kGroup);
    for (int e = 0; e < p.elements; ++e)
      for (int64_t k = 0; k < p.words; k += kDepth)
        for (int64_t b = group; b < end; ++b) {
          const Word* weights = p.weights + (b * p.elements + e) * block + k * kRows;
          const Word* next = b + kAhead < end
                                 ? weights + kAhead * p.elements * block
                                 : weights + (kAhead - end + group) * p.elements * block +
                                       kDepth * kRows;
          for (int q = 0; q < count; ++q)
            multiply<Rounded>(weights, tiles + e * stride + q * panel + k * kTiles,
                              std::min<int64_t>(kDepth, p.words - k), k > 0,
                              q == 0 ? next : nullptr,
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
template <bool Rounded>
void work(void* data, size_t index) noexcept {
  auto& job = *static_cast<Job*>(data);
  const Problem& p = *job.problem;
  static thread_local Scratch tiles, products;
  static thread_local uint64_t held_call = 0;
  static thread_local int64_t held_first = -1;
  int64_t first = static_cast<int64_t>(index) / job.shares * p.span;
  int64_t share = static_cast<int64_t>(index) % job.shares;
  int count = static_cast<int>(std::min<int64_t>(p.span, p.panels - first));
  int64_t blocks = p.filters / kRows, stride = count * p.words * kTiles;
  try {
    Word* v = tiles.of<Word>(p.elements * stride);
    float* m = products.of<float>(size_t{kGroup} * kPanels * p.elements * kProduct);
    if (held_call != job.number || held_first != first) {
      transform_input<Rounded>(p, first, count, v);
      held_call = job.number, held_first = first;
    }
    filter_panels<Rounded>(p, blocks * share / job.shares, blocks * (share + 1) / job.shares, first,
                           count, v, stride, m);
  } catch (const std::bad_alloc&) {
    job.failed = true;
  }
}

template <bool Rounded>
OrtStatus* convolve(const Api& api, OrtKernelContext* context, const Problem& p) {
  static std::atomic<uint64_t> calls{0};
  int64_t blocks = (p.panels + p.span - 1) / p.span;
  int64_t most = std::max<int64_t>(1, p.filters / (kRows * kGroup));
  Job job{&p, ++calls, std::min(most, (kUnits + blocks - 1) / blocks)};
  if (auto* error = api.KernelContext_ParallelFor(context, work<Rounded>,
                                                  static_cast<size_t>(blocks * job.shares), 0,
                                                  &job))
    return error;
  if (job.failed)
    return api.CreateStatus(kFail, "bad_alloc: no memory for the tiles of a convolution");
  return nullptr;
}

template <bool Rounded>
struct WinogradConv {
  static constexpr const char* kName = Rounded ? "WinogradConvBF16" : "WinogradConv";
  static constexpr int kInputs[] = {kFloat, Rounded ? kBFloat16 : kFloat, kFloat, kFloat};
  static constexpr size_t kNeeded = 2;
  static constexpr int kOverwritten = 3;  // the sum in the memory of what is added

  Api api;
  int64_t upsample = 0, relu = 0;

  OrtStatus* configure(const OrtKernelInfo* info) {
    if (auto* error = check_bf16(api, Rounded)) return error;
    if (auto* error = api.KernelInfoGetAttribute_int64(info, "upsample", &upsample)) return error;
    return api.KernelInfoGetAttribute_int64(info, "relu", &relu);
  }

  OrtStatus* compute(OrtKernelContext* context) const {
    Tensor x, weights, bias, residual;
    if (auto* error = read(api, context, {&x, &weights, &bias, &residual})) return error;
    Problem p{};
    p.x = x.floats(), p.bias = bias.floats(), p.residual = residual.floats();
    p.weights = static_cast<const Word*>(weights.data);
    p.channels = x.dims[1], p.height = x.dims[2], p.width = x.dims[3];
    p.filters = weights.dims[0] * kRows;
    p.words = (p.channels + Rounded) / numbers_of(Rounded);
    p.upsample = upsample != 0, p.relu = relu != 0, p.rounded = Rounded;
    p.finish(x.dims[0]);
    int64_t scale = p.upsample ? 2 : 1;
    int64_t dims[4] = {x.dims[0], p.filters, scale * p.height, scale * p.width};
    if (x.rank != 4 || weights.rank != 4 + Rounded || weights.dims[1] != p.elements ||
        weights.dims[2] != p.words || weights.dims[3] != kRows ||
        (Rounded && weights.dims[4] != 2) ||
        (bias.data && (bias.rank != 1 || bias.dims[0] != p.filters)) ||
        (residual.data && (residual.rank != 4 || !std::equal(dims, dims + 4, residual.dims))))
      return api.CreateStatus(kInvalidArgument,
                              "WinogradConv wants x [N, C, H, W], weights [K/8, 16 (9 with"
                              " upsample), C, 8] (BF16: [.., C/2, 8, 2]), bias [K], and what is"
                              " added in the shape of the output");
    if (auto* error = write(api, context, dims, 4, &p.y)) return error;
    return p.tiles ? convolve<Rounded>(api, context, p) : nullptr;
  }
};

}  // namespace

extern const OrtCustomOp kWinogradConv = describe<WinogradConv<false>>();
extern const OrtCustomOp kWinogradConvBF16 = describe<WinogradConv<true>>();
