// The library's entry: what onnxruntime calls when it is registered with a session's options.
#include "ort_abi.h"

#include <mutex>

extern const OrtCustomOp kFusedAttention, kGroupNorm, kLinear, kLinearBytes, kTiledConv,
    kWinogradConv, kWinogradConvBF16;

extern "C" __attribute__((visibility("default"))) OrtStatus* RegisterCustomOps(
    OrtSessionOptions* options, const OrtApiBase* base) {
  Api api{base->GetApi(kApiVersion)};
  if (api.table == nullptr)  // an older one has no such table, and its first does for the word
    return Api{base->GetApi(1)}.CreateStatus(
        kFail, "the operators of addbench need onnxruntime 1.18 or newer");
  static std::mutex one_at_a_time;
  static OrtCustomOpDomain* domain = nullptr;  // lives as long as the library
  std::lock_guard<std::mutex> lock(one_at_a_time);
  if (domain == nullptr) {
    OrtCustomOpDomain* fresh = nullptr;
    if (auto* error = api.CreateCustomOpDomain("addbench", &fresh)) return error;
    for (const OrtCustomOp* op :
         {&kFusedAttention, &kGroupNorm, &kLinear, &kLinearBytes, &kTiledConv,
          &kWinogradConv, &kWinogradConvBF16})
      if (auto* error = api.CustomOpDomain_Add(fresh, op)) return error;
    domain = fresh;
  }
  return api.AddCustomOpDomain(options, domain);
}
