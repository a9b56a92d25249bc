// What the project's operators share: their inputs, their memory, their description.
#pragma once

#include "bf16.h"
#include "ort_abi.h"

#include <cstdlib>
#include <iterator>
#include <new>

// Memory that a thread keeps for its next call: fresh pages would cost more than the work.
class Scratch {
 public:
  template <typename T>
  T* of(size_t count) {
    size_t bytes = (count * sizeof(T) + 63) / 64 * 64;
    if (bytes > size_) {
      std::free(data_);
      size_ = 0;
      data_ = std::aligned_alloc(64, bytes);
      if (data_ == nullptr) throw std::bad_alloc();
      size_ = bytes;
    }
    return static_cast<T*>(data_);
  }
  ~Scratch() { std::free(data_); }

 private:
  void* data_ = nullptr;
  size_t size_ = 0;
};

// An input; without data, one that is left out.
struct Tensor {
  static constexpr size_t kMost = 6;  // dimensions
  void* data = nullptr;
  int64_t dims[kMost] = {};
  size_t rank = 0;

  const float* floats() const { return static_cast<const float*>(data); }
};

inline OrtStatus* read(const Api& api, OrtKernelContext* context, size_t index, Tensor* out) {
  const OrtValue* value = nullptr;
  if (auto* error = api.KernelContext_GetInput(context, index, &value)) return error;
  if (value == nullptr) return nullptr;
  OrtTensorTypeAndShapeInfo* info = nullptr;
  if (auto* error = api.GetTensorTypeAndShape(value, &info)) return error;
  OrtStatus* error = api.GetDimensionsCount(info, &out->rank);
  if (!error && out->rank <= Tensor::kMost) error = api.GetDimensions(info, out->dims, out->rank);
  api.ReleaseTensorTypeAndShapeInfo(info);
  if (!error) error = api.GetTensorMutableData(const_cast<OrtValue*>(value), &out->data);
  return error;
}

// All inputs, in order.
template <size_t Count>
OrtStatus* read(const Api& api, OrtKernelContext* context, Tensor* const (&inputs)[Count]) {
  for (size_t i = 0; i < Count; ++i)
    if (auto* error = read(api, context, i, inputs[i])) return error;
  return nullptr;
}

// The output, of the given shape.
inline OrtStatus* write(const Api& api, OrtKernelContext* context, const int64_t* dims, size_t rank,
                        float** out) {
  OrtValue* value = nullptr;
  if (auto* error = api.KernelContext_GetOutput(context, 0, dims, rank, &value)) return error;
  void* data = nullptr;
  if (auto* error = api.GetTensorMutableData(value, &data)) return error;
  *out = static_cast<float*>(data);
  return nullptr;
}

// Refuses what is to be rounded to BF16 where this build cannot multiply it.
inline OrtStatus* check_bf16(const Api& api, bool rounded) {
#ifdef ADDBENCH_BF16
  rounded = false;
#endif
  return rounded ? api.CreateStatus(kFail, "products of BF16 want a CPU with AVX-512-BF16") : nullptr;
}

// onnxruntime's description of an operator. Op has a name, the types of its inputs, how many of
// those are needed, the one whose memory may become the output's (or -1), a constructor from Api,
// `configure` for its attributes, and `compute`.
template <typename Op>
OrtCustomOp describe() {
  OrtCustomOp op{};
  op.version = kApiVersion;
  op.GetName = [](const OrtCustomOp*) { return Op::kName; };
  op.GetExecutionProviderType = [](const OrtCustomOp*) { return "CPUExecutionProvider"; };
  op.GetInputType = [](const OrtCustomOp*, size_t index) { return Op::kInputs[index]; };
  op.GetInputTypeCount = [](const OrtCustomOp*) { return std::size(Op::kInputs); };
  op.GetOutputType = [](const OrtCustomOp*, size_t) { return int{kFloat}; };
  op.GetOutputTypeCount = [](const OrtCustomOp*) { return size_t{1}; };
  op.GetInputCharacteristic = [](const OrtCustomOp*, size_t index) {
    return index >= Op::kNeeded ? int{kOptional} : int{kRequired};
  };
  op.GetOutputCharacteristic = [](const OrtCustomOp*, size_t) { return int{kRequired}; };
  op.GetInputMemoryType = [](const OrtCustomOp*, size_t) { return int{kDefaultMemory}; };
  op.GetMayInplace = [](int** input, int** output) {
    static int overwritten = Op::kOverwritten, result = 0;
    *input = &overwritten, *output = &result;
    return size_t{Op::kOverwritten >= 0};
  };
  op.ReleaseMayInplace = [](int*, int*) {};
  op.CreateKernelV2 = [](const OrtCustomOp*, OrtApi* table, const OrtKernelInfo* info,
                         void** out) -> OrtStatus* {
    auto* kernel = new (std::nothrow) Op{Api{table}};
    if (kernel == nullptr) return Api{table}.CreateStatus(kFail, "bad_alloc");
    *out = kernel;
    return kernel->configure(info);
  };
  op.KernelComputeV2 = [](void* kernel, OrtKernelContext* context) {
    return static_cast<Op*>(kernel)->compute(context);
  };
  op.KernelDestroy = [](void* kernel) { delete static_cast<Op*>(kernel); };
  return op;
}
