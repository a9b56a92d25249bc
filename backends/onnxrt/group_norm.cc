// Group normalization, and the SiLU behind it, as an operator of onnxruntime.
//
//   x [N, C, ...] FP32, scale [C], bias [C] -> y in the shape of x. Each of `groups` runs of
//   C/groups channels takes mean 0 and variance 1 (+ `epsilon`), then each channel its scale and
//   bias; with `silu`, y / (1 + exp(-y)) of that.
//
// onnxruntime has no such kernel on a CPU. What it is spelled out in reads and writes the image five
// times; here it is read for its statistics, then read and written once.
//
// A group lies together in memory. Its statistics are summed block by block: the mean first, then
// deviations from it, while the block is in the first cache. Blocks meet by the formula of Chan,
// Golub and LeVeque, "Updating Formulae and a Pairwise Algorithm for Computing Sample Variances"
// (1979), so that a mean far from zero costs the variance no digits.
#include "kernel.h"
#include "vectors.h"

#include <algorithm>
#include <cmath>

namespace {

constexpr int64_t kBlock = 4096;  // numbers that are read twice while they are near
constexpr int kSums = 4;          // vectors of sums, so that an addition need not wait for another
constexpr float kLowest = -88;    // below it SiLU is as good as zero, of however large a number

struct Problem {
  const float *x, *scale, *bias;
  float* y;
  int64_t groups, channels, inner;  // channels of a group; numbers of a channel
  float epsilon;
  bool silu;
};

// Calls use(k, vector) for all of x, with k < kSums; what the last vector lacks is `fill`.
template <typename Use>
inline void each_vector(const float* x, int64_t count, float fill, Use use) {
  int64_t i = 0;
  for (; i + kSums * kLanes <= count; i += kSums * kLanes)
#pragma GCC unroll 4
    for (int k = 0; k < kSums; ++k) use(k, load(x + i + k * kLanes));
  for (; i + kLanes <= count; i += kLanes) use(0, load(x + i));
  if (i < count) use(0, load_some(x + i, count - i, fill));
}

inline double total(const Vec (&sums)[kSums]) {
  Vec sum = (sums[0] + sums[1]) + (sums[2] + sums[3]);
  double all = 0;
  for (int i = 0; i < kLanes; ++i) all += sum[i];
  return all;
}

struct Moments {
  double count = 0, mean = 0, squares = 0;  // of deviations from the mean

  void add(const Moments& other) {
    double both = count + other.count, apart = other.mean - mean;
    squares += other.squares + apart * apart * (count * other.count / both);
    mean += apart * (other.count / both);
    count = both;
  }
};

// Of a block. Its mean in FP32 is rounded, which the deviations from it tell.
Moments moments_of(const float* x, int64_t count) {
  Vec sums[kSums] = {}, squares[kSums] = {};
  each_vector(x, count, 0, [&](int k, Vec v) { sums[k] += v; });
  float mean = static_cast<float>(total(sums) / count);
  for (int k = 0; k < kSums; ++k) sums[k] = Vec{};
  each_vector(x, count, mean, [&](int k, Vec v) {
    Vec deviation = v - mean;
    sums[k] += deviation;
    squares[k] += deviation * deviation;
  });
  double rest = total(sums);
  return {double(count), mean + rest / count, std::max(0.0, total(squares) - rest * rest / count)};
}

template <bool Silu>
inline Vec apply(Vec x, float mean, float factor, float offset) {
  Vec y = (x - mean) * factor + offset;
  if (!Silu) return y;
  y = y < kLowest ? Vec{} + kLowest : y;
  return y / (exponential(-y) + 1.0f);
}

// One channel; y may be x.
template <bool Silu>
void write_channel(const float* x, float* y, int64_t count, float mean, float factor,
                   float offset) {
  int64_t i = 0;
  for (; i + kLanes <= count; i += kLanes)
    store(y + i, apply<Silu>(load(x + i), mean, factor, offset));
  if (i < count) {
    Vec last = load_some(x + i, count - i, mean);
    store_some(y + i, count - i, apply<Silu>(last, mean, factor, offset));
  }
}

// Thread work: a group of an image. All of it is read before any of it is written.
void work(void* data, size_t index) noexcept {
  const Problem& p = *static_cast<const Problem*>(data);
  int64_t size = p.channels * p.inner, at = static_cast<int64_t>(index) * size;
  Moments all;
  for (int64_t i = 0; i < size; i += kBlock)
    all.add(moments_of(p.x + at + i, std::min(kBlock, size - i)));
  double inverse = 1 / std::sqrt(all.squares / all.count + p.epsilon);
  float mean = static_cast<float>(all.mean);
  int64_t first = static_cast<int64_t>(index) % p.groups * p.channels;
  for (int64_t c = p.channels - 1; c >= 0; --c) {  // the last that was read may still be near
    float factor = static_cast<float>(p.scale[first + c] * inverse);
    float offset = static_cast<float>(p.bias[first + c] + (mean - all.mean) * factor);
    int64_t channel = at + c * p.inner;
    (p.silu ? write_channel<true> : write_channel<false>)(p.x + channel, p.y + channel, p.inner,
                                                         mean, factor, offset);
  }
}

struct GroupNorm {
  static constexpr const char* kName = "GroupNorm";
  static constexpr int kInputs[] = {kFloat, kFloat, kFloat};
  static constexpr size_t kNeeded = 3;
  static constexpr int kOverwritten = 0;

  Api api;
  int64_t groups = 0, silu = 0;
  float epsilon = 0;

  OrtStatus* configure(const OrtKernelInfo* info) {
    if (auto* error = api.KernelInfoGetAttribute_int64(info, "groups", &groups)) return error;
    if (auto* error = api.KernelInfoGetAttribute_int64(info, "silu", &silu)) return error;
    return api.KernelInfoGetAttribute_float(info, "epsilon", &epsilon);
  }

  OrtStatus* compute(OrtKernelContext* context) const {
    Tensor x, scale, bias;
    if (auto* error = read(api, context, {&x, &scale, &bias})) return error;
    int64_t channels = x.dims[1];
    if (x.rank < 2 || x.rank > Tensor::kMost || groups < 1 || channels % groups != 0 ||
        scale.rank != 1 || scale.dims[0] != channels || bias.rank != 1 || bias.dims[0] != channels)
      return api.CreateStatus(kInvalidArgument,
                              "GroupNorm wants x [N, C, ...] with C a multiple of the groups,"
                              " scale [C], and bias [C]");
    Problem p{x.floats(), scale.floats(), bias.floats(), nullptr, groups, channels / groups, 1,
              epsilon, silu != 0};
    for (size_t i = 2; i < x.rank; ++i) p.inner *= x.dims[i];
    if (auto* error = write(api, context, x.dims, x.rank, &p.y)) return error;
    if (x.dims[0] * channels * p.inner == 0) return nullptr;
    return api.KernelContext_ParallelFor(context, work, static_cast<size_t>(x.dims[0] * groups), 0,
                                         &p);
  }
};

}  // namespace

extern const OrtCustomOp kGroupNorm = describe<GroupNorm>();
