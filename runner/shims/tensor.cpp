#include "shims/tensor.h"

#include <algorithm>
#include <bit>
#include <cstdlib>
#include <new>
#include <utility>

namespace qwen {
namespace {

constexpr size_t kAlignment = 64;

thread_local Arena* current_arena = nullptr;
thread_local std::optional<Error> shim_error;

// Size classes are powers of two from kAlignment up: few lists, and odd chunk lengths reuse each other's
// blocks.
size_t class_of(size_t bytes) {
  return static_cast<size_t>(std::bit_width((bytes == 0 ? 0 : bytes - 1) / kAlignment));
}

}  // namespace

size_t element_size(int32_t dtype) { return element_size(static_cast<ScalarType>(dtype)); }

size_t element_size(ScalarType dtype) {
  switch (dtype) {
    case ScalarType::kUInt8:
    case ScalarType::kInt8:
    case ScalarType::kBool:
      return 1;
    case ScalarType::kInt16:
    case ScalarType::kFloat16:
    case ScalarType::kBFloat16:
      return 2;
    case ScalarType::kInt32:
    case ScalarType::kFloat32:
      return 4;
    case ScalarType::kInt64:
    case ScalarType::kFloat64:
      return 8;
  }
  return 0;
}

const char* to_string(ScalarType dtype) {
  switch (dtype) {
    case ScalarType::kUInt8:
      return "uint8";
    case ScalarType::kInt8:
      return "int8";
    case ScalarType::kInt16:
      return "int16";
    case ScalarType::kInt32:
      return "int32";
    case ScalarType::kInt64:
      return "int64";
    case ScalarType::kFloat16:
      return "float16";
    case ScalarType::kFloat32:
      return "float32";
    case ScalarType::kFloat64:
      return "float64";
    case ScalarType::kBool:
      return "bool";
    case ScalarType::kBFloat16:
      return "bfloat16";
  }
  return "unknown";
}

HostArena::~HostArena() {
  for (void* block : blocks_) std::free(block);
}

void* HostArena::allocate(size_t bytes) {
  const size_t index = class_of(bytes);
  if (index >= kClasses) return nullptr;
  std::vector<void*>& list = free_[index];
  if (!list.empty()) {
    void* block = list.back();
    list.pop_back();
    return block;
  }
  const size_t rounded = kAlignment << index;
  void* block = std::aligned_alloc(kAlignment, rounded);
  if (block == nullptr) return nullptr;
  try {
    blocks_.push_back(block);
    list.reserve(blocks_.size());  // so that release() cannot fail
  } catch (const std::bad_alloc&) {
    if (!blocks_.empty() && blocks_.back() == block) blocks_.pop_back();
    std::free(block);
    return nullptr;
  }
  return block;
}

void HostArena::release(void* data, size_t bytes) { free_[class_of(bytes)].push_back(data); }

ArenaScope::ArenaScope(Arena* arena) : previous_(current_arena) { current_arena = arena; }
ArenaScope::~ArenaScope() { current_arena = previous_; }

std::unique_ptr<Tensor> Tensor::borrow(void* data, std::span<const int64_t> sizes, ScalarType dtype) {
  if (static_cast<int64_t>(sizes.size()) > kMaxDim) return nullptr;
  auto tensor = std::make_unique<Tensor>();
  tensor->dim = static_cast<int64_t>(sizes.size());
  tensor->dtype = dtype;
  int64_t stride = 1;
  for (int64_t i = tensor->dim - 1; i >= 0; --i) {
    tensor->sizes[i] = sizes[i];
    tensor->strides[i] = stride;
    if (sizes[i] < 0 || __builtin_mul_overflow(stride, sizes[i], &stride)) return nullptr;
  }
  tensor->storage =
      std::make_shared<Storage>(data, static_cast<size_t>(stride) * element_size(dtype), nullptr);
  return tensor;
}

std::unique_ptr<Tensor> Tensor::allocate(std::span<const int64_t> sizes, std::span<const int64_t> strides,
                                         ScalarType dtype, int32_t device_type) {
  if (current_arena == nullptr || static_cast<int64_t>(sizes.size()) > kMaxDim ||
      strides.size() != sizes.size()) {
    return nullptr;
  }
  auto tensor = std::make_unique<Tensor>();
  tensor->dim = static_cast<int64_t>(sizes.size());
  tensor->dtype = dtype;
  tensor->device_type = device_type;
  int64_t last = 0;
  bool empty = false;
  for (int64_t i = 0; i < tensor->dim; ++i) {
    if (sizes[i] < 0 || strides[i] < 0) return nullptr;
    tensor->sizes[i] = sizes[i];
    tensor->strides[i] = strides[i];
    empty = empty || sizes[i] == 0;
    last += (sizes[i] - 1) * strides[i];
  }
  const size_t bytes = empty ? 0 : static_cast<size_t>(last + 1) * element_size(dtype);
  void* data = current_arena->allocate(bytes);
  if (data == nullptr) return nullptr;
  tensor->storage = std::make_shared<Storage>(data, bytes, current_arena);
  return tensor;
}

std::unique_ptr<Tensor> Tensor::allocate(std::span<const int64_t> sizes, ScalarType dtype) {
  if (static_cast<int64_t>(sizes.size()) > kMaxDim) return nullptr;
  std::array<int64_t, kMaxDim> strides{};
  int64_t stride = 1;
  for (auto i = static_cast<int64_t>(sizes.size()) - 1; i >= 0; --i) {
    strides[i] = stride;
    stride *= sizes[i];
  }
  return allocate(sizes, std::span<const int64_t>(strides).first(sizes.size()), dtype, kDeviceCpu);
}

int64_t Tensor::numel() const {
  int64_t count = 1;
  for (int64_t i = 0; i < dim; ++i) count *= sizes[i];
  return count;
}

bool Tensor::is_contiguous() const {
  int64_t stride = 1;
  for (int64_t i = dim - 1; i >= 0; --i) {
    if (sizes[i] != 1 && strides[i] != stride) return false;
    stride *= sizes[i];
  }
  return true;
}

std::string Tensor::shape() const {
  std::string text = "[";
  for (int64_t i = 0; i < dim; ++i) text += (i == 0 ? "" : ", ") + std::to_string(sizes[i]);
  return text + "] " + to_string(dtype);
}

void set_shim_error(Error error) { shim_error = std::move(error); }
std::optional<Error> take_shim_error() { return std::exchange(shim_error, std::nullopt); }

}  // namespace qwen
