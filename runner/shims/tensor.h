// Tensor: what an AtenTensorHandle points at. A strided view of a reference-counted storage that is either
// borrowed (weights, state, inputs) or comes from an arena (everything a compiled method makes while it
// runs).
//
// Not thread-safe: a compiled method creates and deletes tensors from the thread that runs it.
#pragma once

#include <array>
#include <cstddef>
#include <cstdint>
#include <memory>
#include <optional>
#include <span>
#include <string>
#include <vector>

#include "result.h"
#include "shims/abi.h"

namespace qwen {

// PyTorch's ScalarType codes, for those types that a program may hold.
enum class ScalarType : int32_t {
  kUInt8 = 0,
  kInt8 = 1,
  kInt16 = 2,
  kInt32 = 3,
  kInt64 = 4,
  kFloat16 = 5,
  kFloat32 = 6,
  kFloat64 = 7,
  kBool = 11,
  kBFloat16 = 15,
};

// Bytes of one element; 0 for a code that is not in ScalarType.
size_t element_size(int32_t dtype);
size_t element_size(ScalarType dtype);
const char* to_string(ScalarType dtype);

inline constexpr int32_t kDeviceCpu = 0;
inline constexpr int32_t kDeviceCuda = 1;

// Memory of one compiled method's runs, kept between them.
class Arena {
 public:
  Arena() = default;
  virtual ~Arena() = default;
  Arena(const Arena&) = delete;
  Arena& operator=(const Arena&) = delete;

  // Null when there is no memory left.
  virtual void* allocate(size_t bytes) = 0;
  // Does not fail. REQUIRES: `data` came from allocate(bytes) of this arena.
  virtual void release(void* data, size_t bytes) = 0;
};

// This process's memory. Blocks are kept and handed out again, so that after the first run no run asks the
// system for memory. Blocks are 64-byte aligned.
class HostArena final : public Arena {
 public:
  HostArena() = default;
  ~HostArena() override;

  void* allocate(size_t bytes) override;
  void release(void* data, size_t bytes) override;

 private:
  static constexpr size_t kClasses = 48;
  std::array<std::vector<void*>, kClasses> free_;
  std::vector<void*> blocks_;
};

// While it lives, tensors made on this thread come from `arena`.
class ArenaScope {
 public:
  explicit ArenaScope(Arena* arena);
  ~ArenaScope();
  ArenaScope(const ArenaScope&) = delete;
  ArenaScope& operator=(const ArenaScope&) = delete;

 private:
  Arena* previous_;
};

struct Storage {
  Storage(void* data, size_t bytes, Arena* arena) : data(data), bytes(bytes), arena(arena) {}
  ~Storage() {
    if (arena != nullptr) arena->release(data, bytes);
  }
  Storage(const Storage&) = delete;
  Storage& operator=(const Storage&) = delete;

  void* data;
  size_t bytes;
  Arena* arena;  // null: borrowed
};

struct Tensor {
  static constexpr int64_t kMaxDim = 8;

  std::shared_ptr<Storage> storage;
  std::array<int64_t, kMaxDim> sizes{};
  std::array<int64_t, kMaxDim> strides{};
  int64_t dim = 0;
  int64_t offset = 0;  // in elements
  ScalarType dtype = ScalarType::kFloat32;
  int32_t device_type = kDeviceCpu;

  // A contiguous tensor over memory that must outlive it; null when `sizes` has too many dimensions or too
  // large a product.
  static std::unique_ptr<Tensor> borrow(void* data, std::span<const int64_t> sizes, ScalarType dtype);
  // An uninitialized tensor from this thread's arena (ArenaScope); null when there is no memory or arena.
  static std::unique_ptr<Tensor> allocate(std::span<const int64_t> sizes, std::span<const int64_t> strides,
                                          ScalarType dtype, int32_t device_type);
  // The same, contiguous.
  static std::unique_ptr<Tensor> allocate(std::span<const int64_t> sizes, ScalarType dtype);

  void* data() const {
    return static_cast<std::byte*>(storage->data) + static_cast<size_t>(offset) * element_size(dtype);
  }
  template <typename T>
  T* as() const {
    return static_cast<T*>(data());
  }
  int64_t numel() const;
  bool is_contiguous() const;
  std::string shape() const;  // "[2, 3] float32", for messages

  AtenTensorHandle handle() { return reinterpret_cast<AtenTensorHandle>(this); }
  static Tensor* from(AtenTensorHandle handle) { return reinterpret_cast<Tensor*>(handle); }
};

// The last failure of a shim on this thread, for the error of the step that failed. Taking it clears it.
void set_shim_error(Error error);
std::optional<Error> take_shim_error();

}  // namespace qwen
