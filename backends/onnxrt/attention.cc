// Attention, as an operator of onnxruntime.
//
//   q [N, L, heads * D], k and v [N, M, heads * D] FP32 -> softmax(q k' scale) v, [N, L, heads * D].
//   `causal`: a query sees no key behind its own place. D is at most 256.
//
// The arithmetic is Linear's; on tiles with three parts on both sides and the six products of them
// that matter; with `bf16`, one (tiled_attention.h). Without tiles, the rows of a few queries meet
// the keys of a head, and what is made of the scores meets its values, as in Linear (products.h).
#include "kernel.h"
#include "products.h"
#include "tiled_attention.h"

#include <algorithm>
#include <atomic>
#include <cmath>
#include <thread>

namespace {

using namespace attention;

constexpr int64_t kWidest = 256;  // of a head
constexpr int64_t kShare = 256;   // queries of a piece of work, at least
constexpr int64_t kSide = 2 * kLanes;                    // columns that meet rows in registers
constexpr int64_t kTurned = std::min<int64_t>(16, kSide);  // rows that become columns at a time

// The keys and values of one head, as columns, and room for a block of queries.
template <bool Rounded>
struct Columns {
  int64_t keys, size, deep, reach;  // filled up to whole panels: M and D, in numbers and in words
  Word *k, *v;                      // [keys/32][half][deep][2 vectors], [size/32][half][reach][..]
  Word *q, *weights;                // [deep][query], [reach][query]
  float *scores, *sums;             // [keys/32][query][32], [size/32][query][32]

  Columns(const Problem& p, Scratch& memory)
      : keys(up(p.keys, kPanel)), size(up(p.size, kPanel)), deep(size / numbers_of(Rounded)),
        reach(keys / numbers_of(Rounded)) {
    k = memory.of<Word>(keys * deep + size * reach + (deep + reach) * kRows + 2 * 16 +
                        (keys + size) * kRows);
    v = k + keys * deep;
    q = v + size * reach;
    weights = q + deep * kRows + 16;  // vectors write beyond their rows
    scores = reinterpret_cast<float*>(weights + reach * kRows + 16);
    sums = scores + keys * kRows;
  }
};

// Where number `column` of a panel's columns lies, whose words are so many.
inline int64_t place(int64_t column, int64_t words) {
  return column / kPanel * words * kPanel + column % kPanel / kSide * words * kSide + column % kSide;
}

template <bool Rounded>
void lay_out(const Problem& p, int64_t image, int64_t head, const Columns<Rounded>& c) {
  int64_t stride = p.heads * p.size, first = image * p.keys * stride + head * p.size;
  for (int64_t key = 0; key < c.keys; key += kTurned)
    pack_rows<Rounded>(p.k + first + key * stride, stride,
                       std::clamp<int64_t>(p.keys - key, 0, kTurned), p.size, c.deep, kSide,
                       c.k + place(key, c.deep));
  for (int64_t d = 0; d < c.size; d += kLanes) {
    int64_t count = std::clamp<int64_t>(p.size - d, 0, kLanes);
    auto value = [&](int64_t key) {
      const float* from = p.v + first + key * stride + d;
      if (key >= p.keys || count == 0) return Vec{};
      return count == kLanes ? load(from) : load_some(from, count, 0);
    };
    Word* out = c.v + place(d, c.reach);
    for (int64_t w = 0; w < c.reach; ++w, out += kSide) {
#ifdef ADDBENCH_BF16
      if (Rounded) {
        _mm512_storeu_si512(out, pair_up(nearest(value(2 * w)), nearest(value(2 * w + 1))));
        continue;
      }
#endif
      store(reinterpret_cast<float*>(out), value(w));
    }
  }
}

// Some rows times all panels of some columns: out [panel][row][32].
template <bool Rounded>
void multiply_panels(int64_t rows, const Word* x, Word* columns, int64_t panels, int64_t words,
                     float* out) {
  auto* from = reinterpret_cast<float*>(columns);
  for (int64_t panel = 0; panel < panels; ++panel, out += kRows * kPanel)
    for (int half = 0; half < kHalves; ++half, from += words * kSide)
      multiply_some<Rounded, kRows>(rows, x, kWidened, from, words, false, out + half * kSide);
}

// The scores of one query to weights, of which it sees so many; 1 / their sum.
inline float soften(float* scores, int64_t keys, int64_t seen, float scale) {
  constexpr int64_t kNext = kRows * kPanel;  // from one panel to the next
  Vec most = Vec{} - INFINITY, sum = {};
  for (int64_t key = 0; key < keys; key += kLanes) {
    float* at = scores + key / kPanel * kNext + key % kPanel;
    Vec score = load(at) * scale;
    if (seen - key < kLanes) {
      store(at, score);
      score = load_some(at, std::max<int64_t>(0, seen - key), -INFINITY);
    }
    store(at, score);
    most = score > most ? score : most;
  }
  float highest = most[0];
  for (int i = 1; i < kLanes; ++i) highest = std::max(highest, most[i]);
  for (int64_t key = 0; key < keys; key += kLanes) {
    float* at = scores + key / kPanel * kNext + key % kPanel;
    Vec gap = load(at) - highest, weight = exponential(gap);
    weight = gap < -87.0f ? Vec{} : weight;  // NaN stays
    store(at, weight);
    sum += weight;
  }
  float total = 0;
  for (int i = 0; i < kLanes; ++i) total += sum[i];
  return 1 / total;
}

// Queries [from, to) of a head.
template <bool Rounded>
void attend_with_vectors(const Problem& p, int64_t image, int64_t head, int64_t from, int64_t to) {
  constexpr int64_t kWords = kPanel / numbers_of(Rounded);
  static thread_local Scratch memory;
  Columns<Rounded> c(p, memory);
  lay_out(p, image, head, c);
  int64_t stride = p.heads * p.size, base = image * p.queries * stride + head * p.size;
  for (int64_t first = from; first < to; first += kRows) {
    int64_t rows = std::min<int64_t>(kRows, to - first);
    float inverse[kRows];
    pack_rows<Rounded>(p.q + base + first * stride, stride, rows, p.size, c.deep, rows, c.q);
    multiply_panels<Rounded>(rows, c.q, c.k, c.keys / kPanel, c.deep, c.scores);
    for (int64_t r = 0; r < rows; ++r)
      inverse[r] = soften(c.scores + r * kPanel, c.keys,
                          p.causal ? std::min(p.keys, first + r + 1) : p.keys, p.scale);
    for (int64_t panel = 0; panel < c.keys / kPanel; ++panel)
      pack_rows<Rounded>(c.scores + panel * kRows * kPanel, kPanel, rows, kPanel, kWords, rows,
                         c.weights + panel * kWords * rows);
    multiply_panels<Rounded>(rows, c.weights, c.v, c.size / kPanel, c.reach, c.sums);
    for (int64_t r = 0; r < rows; ++r)
      for (int64_t d = 0; d < p.size; d += kLanes) {
        Vec mean = load(c.sums + (d / kPanel * kRows + r) * kPanel + d % kPanel) * inverse[r];
        float* out = p.y + base + (first + r) * stride + d;
        if (p.size - d >= kLanes) store(out, mean);
        else store_some(out, p.size - d, mean);
      }
  }
}

struct Job {
  const Problem* problem;
  int64_t shares, share;  // of the queries of a head: how many, how large
  std::atomic<bool> failed{false};
};

void work(void* data, size_t index) noexcept {
  auto& job = *static_cast<Job*>(data);
  const Problem& p = *job.problem;
  int64_t number = static_cast<int64_t>(index), pair = number / job.shares;
  int64_t from = number % job.shares * job.share, to = std::min(p.queries, from + job.share);
  auto* attend = p.rounded ? attend_with_vectors<true> : attend_with_vectors<false>;
#ifdef ADDBENCH_AMX
  if (may_use_tiles()) attend = p.rounded ? attend_with_tiles<1> : attend_with_tiles<3>;
#endif
  try {
    attend(p, pair / p.heads, pair % p.heads, from, to);
  } catch (const std::bad_alloc&) {
    job.failed = true;
  }
}

OrtStatus* attend(const Api& api, OrtKernelContext* context, const Problem& p) {
  // Keys and values are laid out again in each share of the queries: no more of them than cores
  // need.
  constexpr int64_t kBlock = std::max(32, kRows);
  int64_t cores = std::max<int64_t>(1, std::thread::hardware_concurrency());
  int64_t heads = p.images * p.heads;
  int64_t wanted = std::min((2 * cores + heads - 1) / heads, (p.queries + kShare - 1) / kShare);
  int64_t share = up((p.queries + wanted - 1) / wanted, kBlock);
  Job job{&p, (p.queries + share - 1) / share, share};
  if (auto* error = api.KernelContext_ParallelFor(
          context, work, static_cast<size_t>(heads * job.shares), 0, &job))
    return error;
  return job.failed ? api.CreateStatus(kFail, "bad_alloc: no memory for the scores of attention")
                    : nullptr;
}

struct FusedAttention {
  static constexpr const char* kName = "FusedAttention";
  static constexpr int kInputs[] = {kFloat, kFloat, kFloat};
  static constexpr size_t kNeeded = 3;
  static constexpr int kOverwritten = -1;

  Api api;
  int64_t heads = 0, causal = 0, bf16 = 0;
  float scale = 0;

  OrtStatus* configure(const OrtKernelInfo* info) {
    if (auto* error = api.KernelInfoGetAttribute_int64(info, "heads", &heads)) return error;
    if (auto* error = api.KernelInfoGetAttribute_int64(info, "causal", &causal)) return error;
    if (auto* error = api.KernelInfoGetAttribute_int64(info, "bf16", &bf16)) return error;
    if (auto* error = check_bf16(api, bf16)) return error;
    return api.KernelInfoGetAttribute_float(info, "scale", &scale);
  }

  OrtStatus* compute(OrtKernelContext* context) const {
    Tensor q, k, v;
    if (auto* error = read(api, context, {&q, &k, &v})) return error;
    Problem p{};
    p.q = q.floats(), p.k = k.floats(), p.v = v.floats();
    p.images = q.dims[0], p.queries = q.dims[1], p.keys = k.dims[1], p.heads = heads;
    p.size = heads > 0 ? q.dims[2] / heads : 0;
    p.scale = scale, p.causal = causal != 0, p.rounded = bf16 != 0;
    if (q.rank != 3 || k.rank != 3 || v.rank != 3 || p.size < 1 || p.size > kWidest ||
        q.dims[2] != p.size * heads || !std::equal(k.dims, k.dims + 3, v.dims) ||
        k.dims[0] != p.images || k.dims[2] != q.dims[2] || p.keys < 1)
      return api.CreateStatus(kInvalidArgument,
                              "FusedAttention wants q [N, L, heads * D], k and v [N, M, heads * D],"
                              " D at most 256");
    if (auto* error = write(api, context, q.dims, 3, &p.y)) return error;
    return p.images * p.queries > 0 ? attend(api, context, p) : nullptr;
  }
};

}  // namespace

extern const OrtCustomOp kFusedAttention = describe<FusedAttention>();
