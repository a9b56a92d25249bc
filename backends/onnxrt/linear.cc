// Matrix products with weights that stay small, as operators of onnxruntime: y = x w + bias.
//
//   Linear       x [..., K] FP32, weights [N/32, K/2, 32, 2] FP16 (N and K filled up with zeros to
//                multiples of 32), bias [N] FP32, and what is added, in the shape of y
//                -> y [..., N] FP32. `features` is N.
//   LinearBytes  the same with weights [N/32, K, 32] of 8 bits and scales [N/32, K/block, 32] FP32,
//                where K is filled up to a multiple of block too.
//
// The arithmetic is that of FP32 weights: an FP16 number is one of FP32 and of BF16 pairs too, and
// one of 8 bits is multiplied with its scale in FP32 before it meets x.
//
// Where the CPU has tiles (AMX), x is cut into three BF16 numbers whose sum it is, a weight into
// two, and their products, which are exact, are summed in FP32: 15 times the arithmetic a second for
// 5 times the products. The sixth, of the last parts, is below half a unit in the last place of
// x w, and left out. Tiles sum 32 products before they round into the total, so that the
// result is nearer to the exact one than a chain of FP32's is. Henry, Tang and Heinecke, "Leveraging
// the bfloat16 Artificial Intelligence Datatype For Higher-Precision Computations" (2019).
//
// Elsewhere a block of weights is widened to FP32 in the second cache, and met by all rows of x,
// which are copied in the order in which they are read: that they follow each other in memory, and
// that the next weights are fetched meanwhile, makes 1.15 times the speed (AVX-512, 2 cores).
//
// With `bf16`, both are rounded to one BF16 number each, where the CPU multiplies those (AMX,
// AVX-512-BF16).
#include "amx.h"
#include "kernel.h"
#include "products.h"

#include <algorithm>
#include <atomic>
#include <cstring>
#include <thread>
#include <type_traits>

namespace {

constexpr int64_t kBlock = 256;       // rows of x that meet a block of weights while it is near
constexpr int64_t kFewRows = 8;       // up to these, tiles would stay empty
constexpr int64_t kGroup = 16;        // panels of a piece of work, at least, if cores allow it

struct Problem {
  const float *x, *bias, *residual;
  const Half* weights;
  const int8_t* numbers;  // in place of weights
  const float* scales;
  int shift;              // log2 of the depth that has one scale
  float* y;
  int64_t rows, inputs, features;  // of x; K; N
  int64_t depth, panels;           // K as it is filled up; of 32 columns
  bool rounded;                    // to BF16

  const Half* panel(int64_t number, int64_t k) const {
    return weights + (number * depth + k) * kPanel;
  }
  // Panel `number` from depth k on, of weights that Panel describes.
  template <class Panel>
  Panel from(int64_t number, int64_t k) const {
    if constexpr (std::is_same_v<Panel, Bytes>)
      return {numbers + (number * depth + k) * kPanel,
              scales + ((number * depth + k) >> shift) * kPanel, shift};
    else
      return panel(number, k);
  }
};

// The sums of some rows and one panel, finished: y = part + bias + residual.
void finish(const Problem& p, const float* part, int64_t row, int64_t rows, int64_t column) {
  int64_t columns = std::min<int64_t>(kPanel, p.features - column);
  float bias[kPanel] = {};
  if (p.bias) std::memcpy(bias, p.bias + column, 4 * columns);
  for (int64_t r = 0; r < rows; ++r, part += kPanel) {
    int64_t at = (row + r) * p.features + column;
    for (int64_t i = 0; i < columns; ++i) {
      float sum = part[i] + bias[i];
      p.y[at + i] = p.residual ? sum + p.residual[at + i] : sum;
    }
  }
}

#ifdef ADDBENCH_AMX

constexpr int64_t kNear = 1 << 20;  // bytes of cut rows that stay in the second cache
constexpr int64_t kShallow = 256;   // of the depth, at least, before sums are put away
constexpr int64_t kSums = 32 * kPanel;
// Bytes of 16 rows, and of 32 columns, for 32 of the depth, in so many parts.
constexpr int row_bytes(int parts) { return parts * kTile; }
constexpr int weight_bytes(int parts) { return 2 * weight_parts(parts) * kTile; }

// Rows [0, rows) of x, `depth` long: out [16 rows][32 of the depth][part] tiles.
template <int Parts>
void cut_rows(const float* x, int64_t stride, int64_t rows, int64_t depth, char* out) {
  int64_t steps = (depth + 31) / 32;
  for (int64_t r = 0; r < (rows + 15) / 16 * 16; ++r) {
    char* to = out + r / 16 * steps * row_bytes(Parts) + r % 16 * 64;
    const float* from = x + r * stride;
    for (int64_t s = 0; s < steps; ++s, to += row_bytes(Parts), from += 32) {
      int64_t left = r < rows ? depth - s * 32 : 0;
      cut<Parts>(load(from, left), load(from + 16, left - 16), to, kTile);
    }
  }
}

// A panel of weights as it is cut, bit by bit, while the one before it is multiplied.
template <int Parts>
struct Cutting {
  const Half* weights;
  char* out;  // [32 of the depth][part][16 columns] tiles
  int64_t done, count;  // vectors of 32 weights
  int64_t ahead;        // weights that are fetched early

  void some(int64_t more) {
    for (int64_t until = std::min(done + more, count); done < until; ++done) {
      const Half* from = weights + done * 32;
      __builtin_prefetch(from + ahead);
      char* to = out + done / 32 * weight_bytes(Parts) + done % 2 * kTile + done % 32 / 2 * 64;
      cut_halves<weight_parts(Parts)>(from, to, 2 * kTile);
    }
  }
};

// Adds 16 or, if Two, 32 rows times 32 columns to the sums in tiles 0 to 3.
template <int Parts, bool Two>
inline void multiply_tiles(const char* rows, int64_t stride, const char* weights, int64_t steps,
                           Cutting<Parts>& next, int64_t share) {
  for (int64_t s = 0; s < steps;
       ++s, rows += row_bytes(Parts), weights += weight_bytes(Parts)) {
#pragma GCC unroll 2
    for (int part = 0; part < weight_parts(Parts); ++part) {
      _tile_loadd(6, weights + 2 * part * kTile, 64);
      _tile_loadd(7, weights + (2 * part + 1) * kTile, 64);
#pragma GCC unroll 3
      for (int i = 0; i < Parts - part; ++i) {
        _tile_loadd(4, rows + i * kTile, 64);
        _tile_dpbf16ps(0, 4, 6);
        _tile_dpbf16ps(1, 4, 7);
        if (Two) {
          _tile_loadd(5, rows + stride + i * kTile, 64);
          _tile_dpbf16ps(2, 5, 6);
          _tile_dpbf16ps(3, 5, 7);
        }
      }
      next.some(share / weight_parts(Parts));
    }
  }
}

// Rows [from, to) times panels [first, end).
template <int Parts>
void multiply_with_tiles(const Problem& p, int64_t from, int64_t to, int64_t first, int64_t end) {
  static thread_local Scratch rows_memory, weights_memory, sums_memory;
  Tiles tiles;
  int64_t blocks = (to - from + 15) / 16, pairs = (blocks + 1) / 2;
  int64_t most = std::max(kShallow, kNear / (blocks * row_bytes(Parts)) * 32);
  int64_t pieces = (p.depth + most - 1) / most, piece = ((p.depth + pieces - 1) / pieces + 31) / 32;
  char* rows = rows_memory.of<char>(blocks * piece * row_bytes(Parts));
  char* weights = weights_memory.of<char>(2 * piece * weight_bytes(Parts));
  char* other = weights + piece * weight_bytes(Parts);
  float* sums = sums_memory.of<float>((pieces > 1 ? (end - first) * pairs : 1) * kSums);
  for (int64_t k = 0; k < p.depth; k += piece * 32) {
    int64_t steps = std::min(piece, (p.depth - k) / 32), ahead = p.depth * kPanel;
    cut_rows<Parts>(p.x + from * p.inputs + k, p.inputs, to - from,
                    std::min(p.inputs - k, piece * 32), rows);
    Cutting<Parts> now{p.panel(first, k), weights, 0, steps * 32, ahead};
    now.some(now.count);
    for (int64_t panel = first; panel < end; ++panel, std::swap(weights, other)) {
      int64_t count = panel + 1 < end ? steps * 32 : 0;
      Cutting<Parts> next{p.panel(panel + 1, k), other, 0, count, panel + 2 < end ? ahead : 0};
      int64_t share = (64 + blocks - 1) / blocks + 1;
      for (int64_t b = 0; b < blocks; b += 2) {
        bool two = b + 1 < blocks;
        float* sum = sums + (pieces > 1 ? (panel - first) * pairs + b / 2 : 0) * kSums;
        const char* cut = rows + b * steps * row_bytes(Parts);
        if (k > 0) load_sums(sum, 4 * kPanel, two);
        else clear_sums();
        auto* multiply = two ? multiply_tiles<Parts, true> : multiply_tiles<Parts, false>;
        multiply(cut, steps * row_bytes(Parts), weights, steps, next, share);
        store_sums(sum, 4 * kPanel, two);
        int64_t row = from + b * 16;
        if (steps * 32 == p.depth - k)
          finish(p, sum, row, std::min<int64_t>(to - row, 32), panel * kPanel);
      }
      next.some(count);
    }
  }
}

#endif

constexpr int64_t kPiece = 256;                 // words of the depth whose panel is near
// Part `index` of `count` equal ones of the next panel, on its way into the second cache.
template <class Number>
void fetch(const Number* panel, int64_t numbers, int64_t index, int64_t count) {
  constexpr int64_t kLine = 64 / sizeof(Number);
  for (int64_t at = numbers * index / count; at < numbers * (index + 1) / count; at += kLine)
    __builtin_prefetch(panel + at, 0, 2);
}
void fetch(const Bytes& panel, int64_t numbers, int64_t index, int64_t count) {
  fetch(panel.numbers, numbers, index, count);
}

// Rows [from, to) times panels [first, end).
template <bool Rounded, class Panel>
void multiply_with_vectors(const Problem& p, int64_t from, int64_t to, int64_t first,
                           int64_t end) {
  constexpr int64_t kNumbers = kPiece * numbers_of(Rounded);
  static thread_local Scratch rows_memory, weights_memory, sums_memory;
  bool pieces = p.depth > kNumbers;
  int64_t count = to - from, blocks = (count + kRows - 1) / kRows;
  Word* rows = rows_memory.of<Word>(count * kPiece + 16);
  float* weights = weights_memory.of<float>(kPiece * kPanel);
  float* sums = sums_memory.of<float>((pieces ? end - first : 1) * count * kPanel);
  for (int64_t k = 0; k < p.depth; k += kNumbers) {
    int64_t deep = std::min(kNumbers, p.depth - k), words = deep / numbers_of(Rounded);
    auto rows_of = [&](int64_t block) { return std::min<int64_t>(kRows, count - block * kRows); };
    for (int64_t b = 0; b < blocks; ++b)
      pack_rows<Rounded>(p.x + (from + b * kRows) * p.inputs + k, p.inputs, rows_of(b), p.inputs - k,
                         words, rows_of(b), rows + b * kRows * words);
    for (int64_t panel = first; panel < end; ++panel) {
      Panel fresh = p.from<Panel>(panel, k);
      if (!kMeanwhile) widen_some<Rounded>(fresh, 0, words, weights);
      float* part = sums + (pieces ? (panel - first) * count * kPanel : 0);
      for (int64_t b = 0; b < blocks; ++b, part += kRows * kPanel) {
        if (panel + 1 < end) fetch(p.from<Panel>(panel + 1, k), deep * kPanel, b, blocks);
        for (int half = 0; half < kHalves; ++half)
          multiply_some<Rounded, kRows>(rows_of(b), rows + b * kRows * words,
                                        kMeanwhile && b == 0 ? fresh : Panel{},
                                        weights + half * words * 2 * kLanes, words, k > 0,
                                        part + half * 2 * kLanes);
        if (k + deep == p.depth)
          finish(p, part, from + b * kRows, rows_of(b), panel * kPanel);
      }
    }
  }
}

struct Job {
  const Problem* problem;
  int64_t blocks, groups;  // of rows, of panels
  std::atomic<bool> failed{false};
};

void work(void* data, size_t index) noexcept {
  auto& job = *static_cast<Job*>(data);
  const Problem& p = *job.problem;
  int64_t block = static_cast<int64_t>(index) / job.groups;
  int64_t group = static_cast<int64_t>(index) % job.groups;
  int64_t from = block * kBlock, to = std::min(p.rows, from + kBlock);
  int64_t first = p.panels * group / job.groups, end = p.panels * (group + 1) / job.groups;
  try {
    if (p.numbers) return multiply_with_vectors<false, Bytes>(p, from, to, first, end);
#ifdef ADDBENCH_AMX
    if (p.rows > kFewRows && may_use_tiles())
      return (p.rounded ? multiply_with_tiles<1> : multiply_with_tiles<3>)(p, from, to, first, end);
#endif
    (p.rounded ? multiply_with_vectors<true, const Half*>
               : multiply_with_vectors<false, const Half*>)(p, from, to, first, end);
  } catch (const std::bad_alloc&) {
    job.failed = true;
  }
}

// y = x w + bias + residual. What p says of the weights is there; `fits` whether that is right.
OrtStatus* multiply(const Api& api, OrtKernelContext* context, Problem& p, const Tensor& x,
                    const Tensor& bias, const Tensor& residual, bool fits, const char* wanted) {
  int64_t dims[Tensor::kMost];
  std::copy(x.dims, x.dims + Tensor::kMost, dims);
  if (fits) dims[x.rank - 1] = p.features;
  if (!fits || p.panels != (p.features + kPanel - 1) / kPanel ||
      (bias.data && (bias.rank != 1 || bias.dims[0] != p.features)) ||
      (residual.data &&
       (residual.rank != x.rank || !std::equal(dims, dims + x.rank, residual.dims))))
    return api.CreateStatus(kInvalidArgument, wanted);
  p.rows = 1;
  for (size_t i = 0; i + 1 < x.rank; ++i) p.rows *= x.dims[i];
  p.x = x.floats(), p.bias = bias.floats(), p.residual = residual.floats();
  if (auto* error = write(api, context, dims, x.rank, &p.y)) return error;
  if (p.rows == 0) return nullptr;
  // Rows are cut again in each group: few groups, but work for all cores.
  int64_t cores = std::max<int64_t>(1, std::thread::hardware_concurrency());
  int64_t blocks = (p.rows + kBlock - 1) / kBlock;
  int64_t wanted_groups = std::clamp(p.panels / kGroup, cores, 2 * cores);
  Job job{&p, blocks, std::min(p.panels, (wanted_groups + blocks - 1) / blocks)};
  if (auto* error = api.KernelContext_ParallelFor(
          context, work, static_cast<size_t>(job.blocks * job.groups), 0, &job))
    return error;
  return job.failed ? api.CreateStatus(kFail, "bad_alloc: no memory for the rows of a product")
                    : nullptr;
}

// A multiple of `step`.
int64_t filled_up(int64_t count, int64_t step) { return (count + step - 1) / step * step; }

struct Linear {
  static constexpr const char* kName = "Linear";
  static constexpr int kInputs[] = {kFloat, kHalf, kFloat, kFloat};
  static constexpr size_t kNeeded = 2;
  static constexpr int kOverwritten = -1;

  Api api;
  int64_t features = 0, bf16 = 0;

  OrtStatus* configure(const OrtKernelInfo* info) {
    if (auto* error = api.KernelInfoGetAttribute_int64(info, "bf16", &bf16)) return error;
    if (auto* error = check_bf16(api, bf16)) return error;
    return api.KernelInfoGetAttribute_int64(info, "features", &features);
  }

  OrtStatus* compute(OrtKernelContext* context) const {
    Tensor x, weights, bias, residual;
    if (auto* error = read(api, context, {&x, &weights, &bias, &residual})) return error;
    bool fits = x.rank >= 1 && x.rank <= Tensor::kMost && weights.rank == 4;
    Problem p{};
    p.inputs = fits ? x.dims[x.rank - 1] : 0, p.features = features;
    p.rounded = bf16 != 0;
    p.depth = 2 * weights.dims[1], p.panels = weights.dims[0];
    p.weights = static_cast<const Half*>(weights.data);
    fits = fits && p.depth == filled_up(p.inputs, kPanel) && weights.dims[2] == kPanel &&
           weights.dims[3] == 2;
    return multiply(api, context, p, x, bias, residual, fits,
                    "Linear wants x [..., K], weights [N/32, K/2, 32, 2], bias [N], and what is"
                    " added in the shape of the output");
  }
};

struct LinearBytes {
  static constexpr const char* kName = "LinearBytes";
  static constexpr int kInputs[] = {kFloat, kInt8, kFloat, kFloat, kFloat};
  static constexpr size_t kNeeded = 3;
  static constexpr int kOverwritten = -1;

  Api api;
  int64_t features = 0, block = 0;

  OrtStatus* configure(const OrtKernelInfo* info) {
    if (auto* error = api.KernelInfoGetAttribute_int64(info, "block", &block)) return error;
    if (block < kFresh || block > kPiece || (block & (block - 1)))
      return api.CreateStatus(kInvalidArgument, "LinearBytes wants a block of 4, 8, ... 256");
    return api.KernelInfoGetAttribute_int64(info, "features", &features);
  }

  OrtStatus* compute(OrtKernelContext* context) const {
    Tensor x, numbers, scales, bias, residual;
    if (auto* error = read(api, context, {&x, &numbers, &scales, &bias, &residual})) return error;
    bool fits = x.rank >= 1 && x.rank <= Tensor::kMost && numbers.rank == 3 && scales.rank == 3;
    Problem p{};
    p.inputs = fits ? x.dims[x.rank - 1] : 0, p.features = features;
    p.depth = numbers.dims[1], p.panels = numbers.dims[0];
    p.numbers = static_cast<const int8_t*>(numbers.data), p.scales = scales.floats();
    while (int64_t{1} << p.shift < block) ++p.shift;
    fits = fits && p.depth == filled_up(p.inputs, std::max<int64_t>(kPanel, block)) &&
           numbers.dims[2] == kPanel && scales.dims[0] == p.panels &&
           scales.dims[1] == p.depth / block && scales.dims[2] == kPanel;
    return multiply(api, context, p, x, bias, residual, fits,
                    "LinearBytes wants x [..., K], numbers [N/32, K, 32], scales"
                    " [N/32, K/block, 32], bias [N], and what is added in the shape of the output");
  }
};

}  // namespace

extern const OrtCustomOp kLinear = describe<Linear>();
extern const OrtCustomOp kLinearBytes = describe<LinearBytes>();
