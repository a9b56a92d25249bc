// The part of onnxruntime's C API that a custom operator needs.
//
// Its wheels come without headers. The API is a table of functions that only ever grows at its end
// ("the ordering of these fields must not change after that version has shipped", onnxruntime,
// core/session/onnxruntime_c_api.cc), so that positions hold for every later release. Names,
// signatures and order are those of include/onnxruntime/core/session/onnxruntime_c_api.h at API
// version 18 (onnxruntime 1.18, https://github.com/microsoft/onnxruntime).
#pragma once

#include <cstddef>
#include <cstdint>

constexpr uint32_t kApiVersion = 18;

struct OrtStatus;
struct OrtValue;
struct OrtTensorTypeAndShapeInfo;
struct OrtSessionOptions;
struct OrtCustomOpDomain;
struct OrtKernelInfo;
struct OrtKernelContext;
struct OrtShapeInferContext;
struct OrtCustomOp;

using OrtApi = void* const;  // a table: OrtApi* is its first entry

struct OrtApiBase {
  OrtApi* (*GetApi)(uint32_t version) noexcept;
  const char* (*GetVersionString)() noexcept;
};

enum : int { kFloat = 1, kInt8 = 3, kHalf = 10, kBFloat16 = 16 };  // ONNXTensorElementDataType
enum : int { kRequired = 0, kOptional = 1 };   // OrtCustomOpInputOutputCharacteristic
enum : int { kFail = 1, kInvalidArgument = 2 };  // OrtErrorCode
enum : int { kDefaultMemory = 0 };             // OrtMemType

struct OrtCustomOp {
  uint32_t version;
  void* (*CreateKernel)(const OrtCustomOp*, OrtApi*, const OrtKernelInfo*);
  const char* (*GetName)(const OrtCustomOp*);
  const char* (*GetExecutionProviderType)(const OrtCustomOp*);
  int (*GetInputType)(const OrtCustomOp*, size_t);
  size_t (*GetInputTypeCount)(const OrtCustomOp*);
  int (*GetOutputType)(const OrtCustomOp*, size_t);
  size_t (*GetOutputTypeCount)(const OrtCustomOp*);
  void (*KernelCompute)(void*, OrtKernelContext*);
  void (*KernelDestroy)(void*);
  int (*GetInputCharacteristic)(const OrtCustomOp*, size_t);
  int (*GetOutputCharacteristic)(const OrtCustomOp*, size_t);
  int (*GetInputMemoryType)(const OrtCustomOp*, size_t);
  int (*GetVariadicInputMinArity)(const OrtCustomOp*);
  int (*GetVariadicInputHomogeneity)(const OrtCustomOp*);
  int (*GetVariadicOutputMinArity)(const OrtCustomOp*);
  int (*GetVariadicOutputHomogeneity)(const OrtCustomOp*);
  OrtStatus* (*CreateKernelV2)(const OrtCustomOp*, OrtApi*, const OrtKernelInfo*, void**);
  OrtStatus* (*KernelComputeV2)(void*, OrtKernelContext*);
  OrtStatus* (*InferOutputShapeFn)(const OrtCustomOp*, OrtShapeInferContext*);
  int (*GetStartVersion)(const OrtCustomOp*);
  int (*GetEndVersion)(const OrtCustomOp*);
  size_t (*GetMayInplace)(int** inputs, int** outputs);  // since version 18, as what follows
  void (*ReleaseMayInplace)(int*, int*);
  size_t (*GetAliasMap)(int** inputs, int** outputs);
  void (*ReleaseAliasMap)(int*, int*);
};

// Entry Position of the table, as a function of the type that it has.
template <size_t Position, typename Function>
Function* entry(OrtApi* api) {
  return reinterpret_cast<Function*>(api[Position]);
}

struct Api {
  OrtApi* table;

  OrtStatus* CreateStatus(int code, const char* text) const {
    return entry<0, OrtStatus*(int, const char*) noexcept>(table)(code, text);
  }
  OrtStatus* CreateCustomOpDomain(const char* name, OrtCustomOpDomain** out) const {
    return entry<26, OrtStatus*(const char*, OrtCustomOpDomain**) noexcept>(table)(name, out);
  }
  OrtStatus* CustomOpDomain_Add(OrtCustomOpDomain* domain, const OrtCustomOp* op) const {
    return entry<27, OrtStatus*(OrtCustomOpDomain*, const OrtCustomOp*) noexcept>(table)(domain,
                                                                                        op);
  }
  OrtStatus* AddCustomOpDomain(OrtSessionOptions* options, OrtCustomOpDomain* domain) const {
    return entry<28, OrtStatus*(OrtSessionOptions*, OrtCustomOpDomain*) noexcept>(table)(options,
                                                                                        domain);
  }
  OrtStatus* GetTensorMutableData(OrtValue* value, void** out) const {
    return entry<51, OrtStatus*(OrtValue*, void**) noexcept>(table)(value, out);
  }
  OrtStatus* GetDimensionsCount(const OrtTensorTypeAndShapeInfo* info, size_t* out) const {
    return entry<61, OrtStatus*(const OrtTensorTypeAndShapeInfo*, size_t*) noexcept>(table)(info,
                                                                                           out);
  }
  OrtStatus* GetDimensions(const OrtTensorTypeAndShapeInfo* info, int64_t* dims,
                           size_t count) const {
    return entry<62, OrtStatus*(const OrtTensorTypeAndShapeInfo*, int64_t*, size_t) noexcept>(
        table)(info, dims, count);
  }
  OrtStatus* GetTensorTypeAndShape(const OrtValue* value, OrtTensorTypeAndShapeInfo** out) const {
    return entry<65, OrtStatus*(const OrtValue*, OrtTensorTypeAndShapeInfo**) noexcept>(table)(
        value, out);
  }
  OrtStatus* KernelInfoGetAttribute_float(const OrtKernelInfo* info, const char* name,
                                          float* out) const {
    return entry<85, OrtStatus*(const OrtKernelInfo*, const char*, float*) noexcept>(table)(
        info, name, out);
  }
  OrtStatus* KernelInfoGetAttribute_int64(const OrtKernelInfo* info, const char* name,
                                          int64_t* out) const {
    return entry<86, OrtStatus*(const OrtKernelInfo*, const char*, int64_t*) noexcept>(table)(
        info, name, out);
  }
  OrtStatus* KernelContext_GetInput(const OrtKernelContext* context, size_t index,
                                    const OrtValue** out) const {
    return entry<90, OrtStatus*(const OrtKernelContext*, size_t, const OrtValue**) noexcept>(
        table)(context, index, out);
  }
  OrtStatus* KernelContext_GetOutput(OrtKernelContext* context, size_t index, const int64_t* dims,
                                     size_t count, OrtValue** out) const {
    return entry<91, OrtStatus*(OrtKernelContext*, size_t, const int64_t*, size_t, OrtValue**)
                         noexcept>(table)(context, index, dims, count, out);
  }
  void ReleaseTensorTypeAndShapeInfo(OrtTensorTypeAndShapeInfo* info) const {
    entry<99, void(OrtTensorTypeAndShapeInfo*) noexcept>(table)(info);
  }
  OrtStatus* KernelContext_ParallelFor(const OrtKernelContext* context, void (*fn)(void*, size_t),
                                       size_t total, size_t batches, void* data) const {
    return entry<274, OrtStatus*(const OrtKernelContext*, void (*)(void*, size_t), size_t, size_t,
                                 void*) noexcept>(table)(context, fn, total, batches, data);
  }
};
