// The built library where the system refuses memory or threads: every exported function is called with each of its
// allocations failing in turn. Nothing may escape: a custom call returns an error or, where it can do without, the
// right result. Usage: no_memory <_cpu.so>. Prints how many calls failed; exit code 0 where all was as it should be.

#include <dlfcn.h>
#include <pthread.h>

#include <atomic>
#include <cerrno>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <new>
#include <string>
#include <string_view>
#include <vector>

#include "xla/ffi/api/c_api.h"

constexpr int64_t kNever = int64_t{1} << 40;
std::atomic<int64_t> left{kNever};       // allocations until one fails
std::atomic<bool> all_fail{false};       // every later one too
std::atomic<int64_t> threads_left{kNever};

void* allocate(std::size_t size, std::size_t alignment) {
  const int64_t before = left.fetch_sub(1);
  if (before == 0 || (before < 0 && all_fail)) throw std::bad_alloc();
  void* data = std::aligned_alloc(alignment, (size + alignment - 1) / alignment * alignment + alignment);
  if (data == nullptr) throw std::bad_alloc();
  return data;
}

// The library binds to these because the program exports them (-rdynamic).
void* operator new(std::size_t size) { return allocate(size, 16); }
void* operator new[](std::size_t size) { return allocate(size, 16); }
void* operator new(std::size_t size, std::align_val_t a) { return allocate(size, static_cast<std::size_t>(a)); }
void* operator new[](std::size_t size, std::align_val_t a) { return allocate(size, static_cast<std::size_t>(a)); }
void operator delete(void* data) noexcept { std::free(data); }
void operator delete[](void* data) noexcept { std::free(data); }
void operator delete(void* data, std::size_t) noexcept { std::free(data); }
void operator delete[](void* data, std::size_t) noexcept { std::free(data); }
void operator delete(void* data, std::align_val_t) noexcept { std::free(data); }
void operator delete[](void* data, std::align_val_t) noexcept { std::free(data); }
void operator delete(void* data, std::size_t, std::align_val_t) noexcept { std::free(data); }
void operator delete[](void* data, std::size_t, std::align_val_t) noexcept { std::free(data); }

extern "C" int pthread_create(pthread_t* thread, const pthread_attr_t* attributes, void* (*start)(void*), void* data) {
  using Create = int (*)(pthread_t*, const pthread_attr_t*, void* (*)(void*), void*);
  static const auto create = reinterpret_cast<Create>(dlsym(RTLD_NEXT, "pthread_create"));
  return threads_left.fetch_sub(1) <= 0 ? EAGAIN : create(thread, attributes, start, data);
}

struct XLA_FFI_Error {
  XLA_FFI_Error_Code code;
  char message[256];
};
XLA_FFI_Error last_error;

XLA_FFI_Error* create_error(XLA_FFI_Error_Create_Args* args) {
  last_error.code = args->errc;
  std::snprintf(last_error.message, sizeof(last_error.message), "%s", args->message);
  return &last_error;
}

// A custom call with its operands.
class Call {
 public:
  explicit Call(const char* name) : name(name) {}
  Call(const Call&) = delete;

  template <typename T>
  void operand(XLA_FFI_DataType type, std::vector<int64_t> shape, T value) {
    inputs_.push_back(buffer(type, shape, value));
  }
  template <typename T>
  void result(XLA_FFI_DataType type, std::vector<int64_t> shape) {
    outputs_.push_back(buffer(type, shape, T{}));
  }
  // In the order of their names, as XLA passes them.
  template <typename T>
  void attribute(const char* attribute, XLA_FFI_DataType type, T value) {
    T* kept = new T(value);
    add_attribute(attribute, XLA_FFI_AttrType_SCALAR, new XLA_FFI_Scalar{type, kept});
  }
  void attribute(const char* attribute, std::string_view text) {
    add_attribute(attribute, XLA_FFI_AttrType_STRING, new XLA_FFI_ByteSpan{text.data(), text.size()});
  }
  void formats(std::vector<int64_t> formats) {
    auto* kept = new std::vector<int64_t>(formats);
    add_attribute("formats", XLA_FFI_AttrType_ARRAY, new XLA_FFI_Array{XLA_FFI_DataType_S64, kept->size(), kept->data()});
  }

  void prepare(void* library) {
    handler_ = reinterpret_cast<XLA_FFI_Handler*>(dlsym(library, name));
    if (handler_ == nullptr) std::printf("%s is not exported\n", name), std::exit(1);
    api_.struct_size = XLA_FFI_Api_STRUCT_SIZE;
    api_.XLA_FFI_Error_Create = create_error;
    for (XLA_FFI_Buffer* b : inputs_) arguments_.push_back(b), argument_types_.push_back(XLA_FFI_ArgType_BUFFER);
    for (XLA_FFI_Buffer* b : outputs_) results_.push_back(b), result_types_.push_back(XLA_FFI_RetType_BUFFER);
    frame_.struct_size = XLA_FFI_CallFrame_STRUCT_SIZE;
    frame_.api = &api_;
    frame_.stage = XLA_FFI_ExecutionStage_EXECUTE;
    frame_.args = {XLA_FFI_Args_STRUCT_SIZE, nullptr, static_cast<int64_t>(arguments_.size()), argument_types_.data(),
                   arguments_.data()};
    frame_.rets = {XLA_FFI_Rets_STRUCT_SIZE, nullptr, static_cast<int64_t>(results_.size()), result_types_.data(),
                   results_.data()};
    frame_.attrs = {XLA_FFI_Attrs_STRUCT_SIZE, nullptr, static_cast<int64_t>(attributes_.size()), attribute_types_.data(),
                    attribute_names_.data(), attributes_.data()};
  }
  XLA_FFI_Error* operator()() { return handler_(&frame_); }
  void drop_operands() { frame_.args.size = 0; }

  std::vector<uint8_t> bytes() const {
    std::vector<uint8_t> all;
    for (const XLA_FFI_Buffer* b : outputs_) {
      const auto* data = static_cast<const uint8_t*>(b->data);
      int64_t size = b->dtype == XLA_FFI_DataType_S8 ? 1 : 4;
      for (int64_t i = 0; i < b->rank; ++i) size *= b->dims[i];
      all.insert(all.end(), data, data + size);
    }
    return all;
  }
  void clear() {
    for (XLA_FFI_Buffer* b : outputs_) {
      int64_t size = 4;
      for (int64_t i = 0; i < b->rank; ++i) size *= b->dims[i];
      std::memset(b->data, 0xee, size);
    }
  }

  const char* const name;

 private:
  template <typename T>
  static XLA_FFI_Buffer* buffer(XLA_FFI_DataType type, const std::vector<int64_t>& shape, T value) {
    int64_t size = 1;
    for (int64_t dim : shape) size *= dim;
    auto* data = new std::vector<T>(size + 16, value);
    auto* dims = new std::vector<int64_t>(shape);
    return new XLA_FFI_Buffer{XLA_FFI_Buffer_STRUCT_SIZE, nullptr, type, data->data(),
                              static_cast<int64_t>(shape.size()), dims->data()};
  }
  void add_attribute(const char* attribute, XLA_FFI_AttrType type, void* value) {
    attribute_names_.push_back(new XLA_FFI_ByteSpan{attribute, std::strlen(attribute)});
    attribute_types_.push_back(type);
    attributes_.push_back(value);
  }

  XLA_FFI_Handler* handler_ = nullptr;
  XLA_FFI_Api api_ = {};
  XLA_FFI_CallFrame frame_ = {};
  std::vector<XLA_FFI_Buffer*> inputs_, outputs_;
  std::vector<void*> arguments_, results_, attributes_;
  std::vector<XLA_FFI_ArgType> argument_types_;
  std::vector<XLA_FFI_RetType> result_types_;
  std::vector<XLA_FFI_AttrType> attribute_types_;
  std::vector<XLA_FFI_ByteSpan*> attribute_names_;
};

int64_t failures = 0;

bool refused(const Call& call, const XLA_FFI_Error* error) {
  ++failures;
  if (error->code == XLA_FFI_Error_Code_RESOURCE_EXHAUSTED && std::strstr(error->message, "out of memory")) return true;
  return std::printf("%s: code %d, %s\n", call.name, error->code, error->message), false;
}

// Each allocation fails once, by itself or with all later ones; afterwards the call gives its result again.
bool survives(Call& call, bool succeeds) {
  for (bool later_too : {false, true}) {
    for (int64_t allowed = 0;; ++allowed) {
      if (allowed == 1000) return std::printf("%s: allocates without end\n", call.name), false;
      all_fail = later_too;
      left = allowed;
      const XLA_FFI_Error* error = call();
      const bool failed = left < 0;
      left = kNever;
      if (!failed) break;
      if (error != nullptr && error->code != XLA_FFI_Error_Code_INVALID_ARGUMENT && !refused(call, error)) return false;
    }
  }
  call.clear();
  if ((call() == nullptr) != succeeds) return std::printf("%s: %s\n", call.name, last_error.message), false;
  return true;
}

int main(int, char** arguments) {
  constexpr auto F32 = XLA_FFI_DataType_F32, BF16 = XLA_FFI_DataType_BF16, S8 = XLA_FFI_DataType_S8,
                 U8 = XLA_FFI_DataType_U8, S32 = XLA_FFI_DataType_S32, S64 = XLA_FFI_DataType_S64,
                 PRED = XLA_FFI_DataType_PRED;
  void* library = dlopen(arguments[1], RTLD_NOW);
  if (library == nullptr) return std::puts(dlerror()), 1;
  const auto symbol = [&](const char* name) { return dlsym(library, name); };
  const auto set_thread_count = reinterpret_cast<void (*)(int64_t)>(symbol("bitnet_kernels_set_thread_count"));
  const auto available_isas = reinterpret_cast<const char* (*)()>(symbol("bitnet_kernels_available_isas"));
  const auto known_isas = reinterpret_cast<const char* (*)()>(symbol("bitnet_kernels_known_isas"));
  const auto read = reinterpret_cast<uint64_t (*)(const uint8_t*, int64_t)>(symbol("bitnet_kernels_read"));
  const auto fork_join = reinterpret_cast<void (*)(int64_t)>(symbol("bitnet_kernels_fork_join"));
  const auto dot_peak = reinterpret_cast<int64_t (*)(const char*, int64_t)>(symbol("bitnet_kernels_dot_peak"));
  const auto api_minor = reinterpret_cast<int (*)()>(symbol("bitnet_kernels_ffi_api_minor"));
  std::vector<uint8_t> memory(std::size_t{4} << 20, 0);
  memory[12345] = 7;

  // The plain functions first, with no memory at all: no helper can start, and all answers are right.
  left = 0, all_fail = true;
  set_thread_count(4);
  const bool named = std::strncmp(available_isas(), "scalar", 6) == 0 && std::strncmp(known_isas(), "scalar", 6) == 0;
  const bool right = read(memory.data(), static_cast<int64_t>(memory.size())) != 0 && dot_peak("scalar", 1) == 0;
  fork_join(3);
  left = kNever;
  if (!named || !right || api_minor() < 1) return std::puts("a plain function is wrong without memory"), 1;

  Call integer("bitnet_kernels_integer_matmul"), scaled("bitnet_kernels_scaled_matmul"),
      signs("bitnet_kernels_scaled_matmul"), attention("bitnet_kernels_attention"),
      logits("bitnet_kernels_bfloat16_logits"), exact("bitnet_kernels_exact_top_logits"), lookup("bitnet_kernels_lookup");
  const int64_t m = 20, n = 1600, k = 1021, blocks = 32, panels = 100, top = 3;
  integer.operand<int8_t>(S8, {m, k}, 1);
  integer.operand<uint8_t>(U8, {panels, blocks, 64}, 0x5a);
  integer.result<int32_t>(S32, {1, m, n});
  integer.attribute<int64_t>("format", S64, 0);
  integer.attribute("isa", "scalar");
  scaled.operand<float>(F32, {m, k}, 0.5f);
  scaled.operand<uint8_t>(U8, {panels, blocks, 64}, 0x5a);
  scaled.operand<float>(F32, {n, 1}, 0.5f);
  scaled.result<float>(F32, {m, n});
  scaled.attribute<int64_t>("activation_bits", S64, 8);
  scaled.formats({0});
  scaled.attribute("isa", "scalar");
  signs.operand<int8_t>(S8, {m, k}, 1);
  signs.operand<uint8_t>(U8, {panels, blocks, 64}, 0x5a);
  signs.operand<float>(F32, {n, 1}, 0.5f);
  signs.result<float>(F32, {m, n});
  signs.attribute<int64_t>("activation_bits", S64, 1);
  signs.formats({0});
  signs.attribute("isa", "scalar");
  attention.operand<float>(F32, {1, 1, 4, 64}, 0.5f);
  attention.operand<float>(F32, {1, 700, 2, 64}, 0.25f);
  attention.operand<float>(F32, {1, 700, 2, 64}, 0.25f);
  attention.operand<float>(F32, {1, 0, 2}, 0.0f);
  attention.operand<float>(F32, {1, 0, 2}, 0.0f);
  attention.operand<uint8_t>(PRED, {1, 1, 700}, 1);
  attention.operand<int32_t>(S32, {}, 700);
  attention.result<float>(F32, {1, 1, 4, 64});
  attention.attribute("isa", "scalar");
  attention.attribute<float>("scale", F32, 0.125f);
  logits.operand<float>(F32, {m, 64}, 0.5f);
  logits.operand<uint16_t>(BF16, {n, 64}, 0x3f80);
  logits.result<float>(F32, {m, n});
  logits.attribute("isa", "scalar");
  exact.operand<float>(F32, {m, 64}, 0.5f);
  exact.operand<uint16_t>(BF16, {n, 64}, 0x3f80);
  exact.operand<int8_t>(S8, {2 * m, 64}, 1);
  exact.operand<float>(F32, {m}, 0.5f);
  exact.operand<int32_t>(S32, {2 * m, n}, 64);
  exact.operand<float>(F32, {n}, 1.0f);
  exact.operand<float>(F32, {2, n}, 1.0f);
  exact.result<float>(F32, {m, n});
  exact.result<int32_t>(S32, {m});
  exact.attribute("isa", "scalar");
  exact.attribute<int64_t>("top", S64, top);
  lookup.operand<uint16_t>(BF16, {n, 64}, 0x3f80);
  lookup.operand<int32_t>(S32, {m}, 5);
  lookup.result<float>(F32, {m, 64});

  Call* const calls[] = {&integer, &scaled, &signs, &attention, &logits, &exact, &lookup};
  for (Call* call : calls) call->prepare(library);
  for (Call* call : calls) {
    set_thread_count(4);  // new helpers for each: whoever fails first, they or the caller
    if (!survives(*call, true)) return 1;
    const std::vector<uint8_t> expected = call->bytes();
    for (int64_t startable : {0, 1, 2}) {  // the same result with fewer threads
      threads_left = startable;
      set_thread_count(4);
      call->clear();
      if ((*call)() != nullptr || call->bytes() != expected) return std::printf("%s: other threads\n", call->name), 1;
    }
    threads_left = kNever;
    call->drop_operands();  // an error whose message needs memory
    if (!survives(*call, false)) return 1;
  }
  std::printf("%lld calls refused\n", static_cast<long long>(failures));
}
