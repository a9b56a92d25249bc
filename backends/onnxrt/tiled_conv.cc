// A convolution of 1x1 or 3x3 with tiles (AMX), as an operator of onnxruntime.
//
//   x [N, C, H, W] FP32, weights [K/32, C/32, taps, 32 of K, 32 of C] FP16 (filled up with zeros),
//   bias [K] FP32, and what is added, in the shape of y -> y [N, K, H, W] FP32. `filters` is K.
//   Stride 1, the image's size kept, no dilation, no groups; `relu` makes what is negative zero.
//
// The arithmetic is Linear's: FP32, by exact products of BF16 numbers (linear.cc). An image stays in
// its layout: a tile holds the pixels of 32 channels, two to a word, and 16 places of a row; another
// tap is another address. So an image is cut once, not once for each tap.
#include "amx.h"
#include "kernel.h"

#include <algorithm>
#include <atomic>
#include <thread>
#include <utility>

namespace {

constexpr const char* kNoTiles = "TiledConv wants a CPU with AMX, and a kernel that lets it be used";

struct Problem {
  const float *x, *bias, *residual;
  const uint16_t* weights;
  float* y;
  int64_t images, channels, height, width, filters;
  int64_t taps, reach;       // 9 and 1, or 1 and 0
  int64_t groups, panels;    // of 32 channels, of 32 filters
  bool relu, rounded;        // to BF16
  int64_t rows, columns, down, across;  // of a block; blocks of an image
};

#ifdef ADDBENCH_AMX

constexpr int64_t kPlaces = 512;     // of a block: they share a panel of weights
constexpr int64_t kWide = 128;       // columns of a block, at most
constexpr int64_t kNear = 768 << 10;  // bytes of a cut block that stay in the second cache
// Bytes of the cut weights of 32 filters, 32 channels, one tap.
constexpr int64_t step_bytes(int parts) { return 2 * weight_parts(parts) * kTile; }
constexpr int64_t kSums = 32 * 32;

struct Block {
  int64_t image, top, left, rows, columns;
  int64_t across, tiles;  // tiles of a row, of the block
  int64_t pitch;          // words of a cut row of one pair of channels
};

Block block_of(const Problem& p, int64_t number) {
  Block b{};
  b.image = number / (p.down * p.across);
  b.top = number / p.across % p.down * p.rows, b.left = number % p.across * p.columns;
  b.rows = std::min(p.rows, p.height - b.top), b.columns = std::min(p.columns, p.width - b.left);
  b.across = (b.columns + 15) / 16, b.tiles = b.across * b.rows;
  b.pitch = (b.across * 16 + 2 * p.reach + 15) / 16 * 16;
  return b;
}

// Words of one part of 32 channels of a block: [row][16 pairs][pitch].
int64_t part_words(const Problem& p, const Block& b) {
  return (b.rows + 2 * p.reach) * 16 * b.pitch;
}

// 32 channels of a block with its border, cut in parts: out [part][row][pair][place] words.
template <int Parts>
void cut_channels(const Problem& p, const Block& b, int64_t first, uint32_t* out) {
  int64_t plane = p.height * p.width, part = part_words(p, b);
  for (int64_t r = 0; r < b.rows + 2 * p.reach; ++r) {
    int64_t row = b.top - p.reach + r;
    for (int64_t pair = 0; pair < 16; ++pair, out += b.pitch) {
      int64_t channel = first + 2 * pair;
      const float* from = p.x + (b.image * p.channels + channel) * plane + row * p.width;
      bool inside = row >= 0 && row < p.height;
      for (int64_t i = 0; i < b.pitch; i += 16) {
        int64_t column = b.left - p.reach + i;
        int64_t skip = std::clamp<int64_t>(-column, 0, 16);
        int64_t count = std::clamp<int64_t>(p.width - column, 0, 16);
        __mmask16 mask = inside ? ((1u << count) - 1) & ~((1u << skip) - 1) : 0;
        __mmask16 one = channel < p.channels ? mask : 0, two = channel + 1 < p.channels ? mask : 0;
        __m512 low = _mm512_maskz_loadu_ps(one, from + column);
        __m512 high = _mm512_maskz_loadu_ps(two, from + plane + column);
        if (Parts == 1) low = nearest(low), high = nearest(high);
        for (int k = 0; k < Parts; ++k) {
          __m512 low_part = leading(low), high_part = leading(high);
          _mm512_storeu_si512(out + k * part + i, pair_up(low_part, high_part));
          low -= low_part, high -= high_part;
        }
      }
    }
  }
}

// A panel of weights as it is cut, bit by bit, while the one before it is multiplied.
template <int Parts>
struct Cutting {
  const uint16_t* weights;
  char* out;  // [32 channels][tap][part][16 filters] tiles
  int64_t done, count, ahead;  // vectors of 32 weights; weights that are fetched early

  void some(int64_t more) {
    for (int64_t until = std::min(done + more, count); done < until; ++done) {
      const uint16_t* from = weights + done * 32;
      __builtin_prefetch(from + ahead);
      cut_halves<weight_parts(Parts)>(from, out + done / 32 * step_bytes(Parts) + done % 32 * 64,
                                      2 * kTile);
    }
  }
};

// Adds a panel of weights times two tiles of places, from `left` and `right` on, to the sums.
template <int Parts>
void multiply_tiles(const Problem& p, const Block& b, const uint32_t* left, const uint32_t* right,
                    const char* weights, int64_t groups, Cutting<Parts>& next, int64_t share) {
  int64_t part = part_words(p, b), side = 2 * p.reach + 1, stride = 4 * b.pitch;
  for (int64_t g = 0; g < groups; ++g, left += Parts * part, right += Parts * part)
    for (int64_t tap = 0; tap < p.taps; ++tap, weights += step_bytes(Parts)) {
      int64_t at = tap / side * 16 * b.pitch + tap % side;
#pragma GCC unroll 3
      for (int i = 0; i < Parts; ++i) {
        _tile_loadd(6, left + i * part + at, stride);
        _tile_loadd(7, right + i * part + at, stride);
#pragma GCC unroll 2
        for (int j = 0; j < weight_parts(Parts); ++j) {
          if (i + j == 3) break;  // the last parts of both
          _tile_loadd(4, weights + 2 * j * kTile, 64);
          _tile_dpbf16ps(0, 4, 6);
          _tile_dpbf16ps(1, 4, 7);
          _tile_loadd(5, weights + (2 * j + 1) * kTile, 64);
          _tile_dpbf16ps(2, 5, 6);
          _tile_dpbf16ps(3, 5, 7);
        }
        next.some(share);
      }
    }
}

// y = sums + bias + residual of one tile of places, 32 filters.
void finish(const Problem& p, const Block& b, const float* sums, int64_t panel, int64_t tile) {
  int64_t row = b.top + tile / b.across, column = b.left + tile % b.across * 16;
  int64_t filters = std::min<int64_t>(32, p.filters - panel * 32);
  __mmask16 mask = (1u << std::min<int64_t>(16, p.width - column)) - 1;
  for (int64_t f = 0; f < filters; ++f) {
    int64_t filter = panel * 32 + f;
    int64_t at = ((b.image * p.filters + filter) * p.height + row) * p.width + column;
    __m512 sum = _mm512_loadu_ps(sums + f * 32) + _mm512_set1_ps(p.bias ? p.bias[filter] : 0);
    if (p.residual) sum += _mm512_maskz_loadu_ps(mask, p.residual + at);
    if (p.relu) sum = _mm512_max_ps(_mm512_setzero_ps(), sum);  // NaN stays
    _mm512_mask_storeu_ps(p.y + at, mask, sum);
  }
}

// Panels [first, end) of filters on a block of places.
template <int Parts>
void convolve_block(const Problem& p, const Block& b, int64_t first, int64_t end) {
  static thread_local Scratch cut_memory, weights_memory, sums_memory;
  Tiles tiles;
  int64_t words = Parts * part_words(p, b), pairs = (b.tiles + 1) / 2;
  int64_t most = std::max<int64_t>(1, kNear / (4 * words)), pieces = (p.groups + most - 1) / most;
  int64_t piece = (p.groups + pieces - 1) / pieces;  // groups of channels that are cut at a time
  auto* cut = cut_memory.of<uint32_t>(piece * words);
  char* weights = weights_memory.of<char>(2 * piece * p.taps * step_bytes(Parts));
  char* other = weights + piece * p.taps * step_bytes(Parts);
  float* sums = sums_memory.of<float>((pieces > 1 ? (end - first) * pairs : 1) * kSums);
  int64_t panel_weights = p.groups * p.taps * kSums;
  for (int64_t g = 0; g < p.groups; g += piece) {
    int64_t groups = std::min(piece, p.groups - g), count = groups * p.taps * 32;
    bool last = g + groups == p.groups;
    for (int64_t i = 0; i < groups; ++i) cut_channels<Parts>(p, b, (g + i) * 32, cut + i * words);
    auto source = [&](int64_t panel) {
      return p.weights + panel * panel_weights + g * p.taps * kSums;
    };
    Cutting<Parts> now{source(first), weights, 0, count, 0};
    now.some(count);
    for (int64_t panel = first; panel < end; ++panel, std::swap(weights, other)) {
      Cutting<Parts> next{source(panel + 1), other, 0, panel + 1 < end ? count : 0,
                   panel + 2 < end ? panel_weights : 0};
      int64_t times = Parts * pairs * groups * p.taps, share = (count + times - 1) / times;
      for (int64_t pair = 0; pair < pairs; ++pair) {
        float* sum = sums + (pieces > 1 ? (panel - first) * pairs + pair : 0) * kSums;
        int64_t left = 2 * pair, right = std::min(left + 1, b.tiles - 1);
        auto place = [&](int64_t tile) {
          return cut + tile / b.across * 16 * b.pitch + tile % b.across * 16;
        };
        if (g == 0) clear_sums();
        else load_sums(sum, 128, true);
        multiply_tiles(p, b, place(left), place(right), weights, groups, next, share);
        store_sums(sum, 128, true);
        if (!last) continue;
        finish(p, b, sum, panel, left);
        if (right > left) finish(p, b, sum + 16, panel, right);
      }
      next.some(count);
    }
  }
}

struct Job {
  const Problem* problem;
  int64_t shares;  // of the panels
  std::atomic<bool> failed{false};
};

void work(void* data, size_t index) noexcept {
  auto& job = *static_cast<Job*>(data);
  const Problem& p = *job.problem;
  int64_t number = static_cast<int64_t>(index), share = number % job.shares;
  try {
    (p.rounded ? convolve_block<1> : convolve_block<3>)(
        p, block_of(p, number / job.shares), p.panels * share / job.shares,
        p.panels * (share + 1) / job.shares);
  } catch (const std::bad_alloc&) {
    job.failed = true;
  }
}

OrtStatus* convolve(const Api& api, OrtKernelContext* context, Problem& p) {
  if (!may_use_tiles()) return api.CreateStatus(kFail, kNoTiles);
  p.columns = std::min((p.width + 15) / 16 * 16, kWide);
  p.rows = std::min(p.height, kPlaces / p.columns);
  p.down = (p.height + p.rows - 1) / p.rows, p.across = (p.width + p.columns - 1) / p.columns;
  int64_t blocks = p.images * p.down * p.across;
  int64_t cores = std::max<int64_t>(1, std::thread::hardware_concurrency());
  Job job{&p, std::min(p.panels, (2 * cores + blocks - 1) / blocks)};
  if (auto* error = api.KernelContext_ParallelFor(
          context, work, static_cast<size_t>(blocks * job.shares), 0, &job))
    return error;
  return job.failed ? api.CreateStatus(kFail, "bad_alloc: no memory for a convolution's tiles")
                    : nullptr;
}

#else

OrtStatus* convolve(const Api& api, OrtKernelContext*, Problem&) {
  return api.CreateStatus(kFail, kNoTiles);
}

#endif

struct TiledConv {
  static constexpr const char* kName = "TiledConv";
  static constexpr int kInputs[] = {kFloat, kHalf, kFloat, kFloat};
  static constexpr size_t kNeeded = 2;
  static constexpr int kOverwritten = 3;  // the sum in the memory of what is added

  Api api;
  int64_t filters = 0, relu = 0, bf16 = 0;

  OrtStatus* configure(const OrtKernelInfo* info) {
    if (auto* error = api.KernelInfoGetAttribute_int64(info, "filters", &filters)) return error;
    if (auto* error = api.KernelInfoGetAttribute_int64(info, "bf16", &bf16)) return error;
    return api.KernelInfoGetAttribute_int64(info, "relu", &relu);
  }

  OrtStatus* compute(OrtKernelContext* context) const {
    Tensor x, weights, bias, residual;
    if (auto* error = read(api, context, {&x, &weights, &bias, &residual})) return error;
    Problem p{};
    p.x = x.floats(), p.bias = bias.floats(), p.residual = residual.floats();
    p.weights = static_cast<const uint16_t*>(weights.data);
    p.images = x.dims[0], p.channels = x.dims[1], p.height = x.dims[2], p.width = x.dims[3];
    p.filters = filters, p.relu = relu != 0, p.rounded = bf16 != 0;
    p.panels = weights.dims[0], p.groups = weights.dims[1], p.taps = weights.dims[2];
    p.reach = p.taps == 9 ? 1 : 0;
    int64_t dims[4] = {p.images, p.filters, p.height, p.width};
    if (x.rank != 4 || weights.rank != 5 || weights.dims[3] != 32 || weights.dims[4] != 32 ||
        (p.taps != 9 && p.taps != 1) || p.groups != (p.channels + 31) / 32 ||
        p.panels != (p.filters + 31) / 32 ||
        (bias.data && (bias.rank != 1 || bias.dims[0] != p.filters)) ||
        (residual.data && (residual.rank != 4 || !std::equal(dims, dims + 4, residual.dims))))
      return api.CreateStatus(kInvalidArgument,
                              "TiledConv wants x [N, C, H, W], weights [K/32, C/32, 9 or 1, 32,"
                              " 32], bias [K], and what is added in the shape of the output");
    if (auto* error = write(api, context, dims, 4, &p.y)) return error;
    bool empty = p.images == 0 || p.height == 0 || p.width == 0;
    return empty ? nullptr : convolve(api, context, p);
  }
};

}  // namespace

extern const OrtCustomOp kTiledConv = describe<TiledConv>();
