// What the operators ask of onnxruntime, and no more: a stand-in of it that the sanitizers see
// through (its own threads are theirs too), and that another CPU's emulator can run.
//
// Reads calls from stdin and writes what they give to stdout (tests/backends/test_bare.py). Each
// tensor has memory of its own of exactly its size, and none where it is empty.
#include "ort_abi.h"

#include <condition_variable>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <map>
#include <memory>
#include <mutex>
#include <string>
#include <thread>
#include <vector>

struct OrtStatus { std::string text; };
struct OrtTensorTypeAndShapeInfo { std::vector<int64_t> dims; };
struct OrtValue {
  int type = 0;
  std::vector<int64_t> dims;
  void* data = nullptr;
  bool own = true;
  size_t bytes() const {
    size_t count = type == kFloat ? 4 : type == kInt8 ? 1 : 2;
    for (int64_t dim : dims) count *= dim;
    return count;
  }
  void make() { data = bytes() ? std::malloc(bytes()) : nullptr; }
  ~OrtValue() { if (own) std::free(data); }
};
struct OrtSessionOptions {};
struct OrtCustomOpDomain { std::vector<const OrtCustomOp*> ops; };
struct OrtKernelInfo { std::map<std::string, double> attributes; };

// Threads that stay, as a session's do.
class Pool {
 public:
  explicit Pool(size_t count) {
    for (size_t i = 1; i < count; ++i) threads_.emplace_back([this] { serve(); });
  }
  ~Pool() {
    { std::lock_guard<std::mutex> lock(mutex_); over_ = true; }
    changed_.notify_all();
    for (auto& thread : threads_) thread.join();
  }
  void run(void (*fn)(void*, size_t), size_t total, void* data) {
    std::unique_lock<std::mutex> lock(mutex_);
    fn_ = fn, total_ = total, data_ = data, next_ = 0, busy_ = 0;
    changed_.notify_all();
    work(lock);
    changed_.wait(lock, [this] { return busy_ == 0; });
  }

 private:
  void work(std::unique_lock<std::mutex>& lock) {
    while (next_ < total_) {
      size_t index = next_++;
      ++busy_;
      auto fn = fn_;
      auto data = data_;
      lock.unlock();
      fn(data, index);
      lock.lock();
      --busy_;
      changed_.notify_all();
    }
  }
  void serve() {
    std::unique_lock<std::mutex> lock(mutex_);
    while (!over_) {
      work(lock);
      changed_.wait(lock, [this] { return over_ || next_ < total_; });
    }
  }
  std::mutex mutex_;
  std::condition_variable changed_;
  std::vector<std::thread> threads_;
  void (*fn_)(void*, size_t) = nullptr;
  void* data_ = nullptr;
  size_t total_ = 0, next_ = 0, busy_ = 0;
  bool over_ = false;
};

struct OrtKernelContext {
  std::vector<std::unique_ptr<OrtValue>> inputs;
  std::unique_ptr<OrtValue> output;
  int overwritten = -1;
  Pool* pool = nullptr;
};

namespace {

OrtCustomOpDomain domain;
void* table[300];

template <typename Function>
void set(size_t position, Function* function) {
  table[position] = reinterpret_cast<void*>(function);
}

void fill_table() {
  set(0, +[](int, const char* text) noexcept { return new OrtStatus{text}; });
  set(26, +[](const char*, OrtCustomOpDomain** out) noexcept -> OrtStatus* {
    *out = &domain;
    return nullptr;
  });
  set(27, +[](OrtCustomOpDomain* to, const OrtCustomOp* op) noexcept -> OrtStatus* {
    to->ops.push_back(op);
    return nullptr;
  });
  set(28, +[](OrtSessionOptions*, OrtCustomOpDomain*) noexcept -> OrtStatus* { return nullptr; });
  set(51, +[](OrtValue* value, void** out) noexcept -> OrtStatus* {
    *out = value->data;
    return nullptr;
  });
  set(61, +[](const OrtTensorTypeAndShapeInfo* info, size_t* out) noexcept -> OrtStatus* {
    *out = info->dims.size();
    return nullptr;
  });
  set(62, +[](const OrtTensorTypeAndShapeInfo* info, int64_t* out, size_t count) noexcept
          -> OrtStatus* {
    std::copy(info->dims.begin(), info->dims.begin() + count, out);
    return nullptr;
  });
  set(65, +[](const OrtValue* value, OrtTensorTypeAndShapeInfo** out) noexcept -> OrtStatus* {
    *out = new OrtTensorTypeAndShapeInfo{value->dims};
    return nullptr;
  });
  set(85, +[](const OrtKernelInfo* info, const char* name, float* out) noexcept -> OrtStatus* {
    *out = static_cast<float>(info->attributes.at(name));
    return nullptr;
  });
  set(86, +[](const OrtKernelInfo* info, const char* name, int64_t* out) noexcept -> OrtStatus* {
    *out = static_cast<int64_t>(info->attributes.at(name));
    return nullptr;
  });
  set(90, +[](const OrtKernelContext* context, size_t index, const OrtValue** out) noexcept
          -> OrtStatus* {
    *out = index < context->inputs.size() ? context->inputs[index].get() : nullptr;
    return nullptr;
  });
  set(91, +[](OrtKernelContext* context, size_t, const int64_t* dims, size_t count,
              OrtValue** out) noexcept -> OrtStatus* {
    context->output = std::make_unique<OrtValue>();
    *out = context->output.get();
    (*out)->type = kFloat, (*out)->dims.assign(dims, dims + count);
    if (context->overwritten >= 0) {
      (*out)->data = context->inputs[context->overwritten]->data, (*out)->own = false;
    } else {
      (*out)->make();
    }
    return nullptr;
  });
  set(99, +[](OrtTensorTypeAndShapeInfo* info) noexcept { delete info; });
  set(274, +[](const OrtKernelContext* context, void (*fn)(void*, size_t), size_t total, size_t,
               void* data) noexcept -> OrtStatus* {
    context->pool->run(fn, total, data);
    return nullptr;
  });
}

void need(void* to, size_t bytes) {
  if (bytes && std::fread(to, 1, bytes, stdin) != bytes) std::exit(3);
}
template <typename T>
T number() {
  T value;
  need(&value, sizeof value);
  return value;
}
std::string text() {
  std::string out(number<uint32_t>(), 0);
  need(out.data(), out.size());
  return out;
}
void put(const void* from, size_t bytes) { if (bytes) std::fwrite(from, 1, bytes, stdout); }
void put_number(uint32_t value) { put(&value, sizeof value); }

void answer(OrtStatus* status, const OrtKernelContext& context) {
  std::string words = status ? status->text : "";
  delete status;
  put_number(words.size());
  put(words.data(), words.size());
  if (words.empty()) {
    const OrtValue& y = *context.output;
    put_number(y.dims.size());
    put(y.dims.data(), 8 * y.dims.size());
    put(y.data, y.bytes());
  }
  std::fflush(stdout);
}

}  // namespace

extern "C" OrtStatus* RegisterCustomOps(OrtSessionOptions*, const OrtApiBase*);

int main(int, char** arguments) {
  fill_table();
  OrtApiBase base{+[](uint32_t) noexcept -> OrtApi* { return table; }, nullptr};
  OrtSessionOptions options;
  if (RegisterCustomOps(&options, &base)) return 2;
  Pool pool(std::strtoul(arguments[1], nullptr, 10));
  for (uint32_t length; std::fread(&length, 4, 1, stdin) == 1;) {
    std::string name(length, 0);
    need(name.data(), length);
    OrtKernelInfo info;
    for (uint32_t left = number<uint32_t>(); left > 0; --left) {
      std::string key = text();
      info.attributes[key] = number<double>();
    }
    OrtKernelContext context;
    context.pool = &pool;
    context.overwritten = number<int32_t>();
    for (uint32_t left = number<uint32_t>(); left > 0; --left) {
      auto value = std::make_unique<OrtValue>();
      value->type = number<int32_t>();
      if (value->type == 0) {
        context.inputs.push_back(nullptr);
        continue;
      }
      value->dims.resize(number<uint32_t>());
      need(value->dims.data(), 8 * value->dims.size());
      value->make();
      need(value->data, value->bytes());
      context.inputs.push_back(std::move(value));
    }
    const OrtCustomOp* op = nullptr;
    for (const OrtCustomOp* each : domain.ops)
      if (each->GetName(each) == name) op = each;
    if (op == nullptr) return 4;
    void* kernel = nullptr;
    OrtStatus* status = op->CreateKernelV2(op, table, &info, &kernel);
    if (status == nullptr) status = op->KernelComputeV2(kernel, &context);
    if (kernel) op->KernelDestroy(kernel);
    answer(status, context);
  }
}
