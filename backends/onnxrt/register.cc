// The library's entry: what onnxruntime calls when it is registered with a session's options.
#include "ort_abi.h"

#include <mutex>

extern const OrtCustomOp kFusedAttention, kGroupNorm, kLinear, kTiledConv, kWinogradConv,
    kWinogradConvBF16;

extern "C" __attribute__((visibility("default"))) OrtStatus* RegisterCustomOps(
    OrtSessionOptions* options, const OrtApiBase* base) {
  Api api{base->GetApi(kApiVersion)};
  static std::mutex one_at_a_time;
  static OrtCustomOpDomain* domain = nullptr;  // lives as long as the library
  std::lock_guard<std::mutex> lock(one_at_a_time);
  if (domain == nullptr) {
    OrtCustomOpDomain* fresh = nullptr;
    if (auto* error = api.CreateCustomOpDomain("addbench", &fresh)) return error;
    for (const OrtCustomOp* op :
         {&kFusedAttention, &kGroupNorm, &kLinear, &kTiledConv, &kWinogradConv,
          &kWinogradConvBF16})
      if (auto* error = api.CustomOpDomain_Add(fresh, op)) return error;
    domain = fresh;
  }
  return api.AddCustomOpDomain(options, domain);
}
