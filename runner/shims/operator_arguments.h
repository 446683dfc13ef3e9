// What the operators' C shims share: reading and checking handles, allocating results, and turning a refusal
// into a message and a code, since no exception crosses the ABI.
#pragma once

#include <initializer_list>
#include <memory>
#include <new>
#include <span>
#include <string>

#include "shims/tensor.h"

namespace qwen {

// Why an operator refuses; caught before the ABI.
struct Refusal {
  std::string reason;
  ErrorCode code = ErrorCode::kInternal;
};

inline const Tensor& get(AtenTensorHandle handle) { return *Tensor::from(handle); }

inline void require(bool condition, const char* what) {
  if (!condition) throw Refusal{what};
}

// A dense tensor of `dim` dimensions and one of the given types.
inline const Tensor& dense(AtenTensorHandle handle, int64_t dim, std::initializer_list<ScalarType> dtypes,
                           const char* name) {
  const Tensor& tensor = get(handle);
  bool type_fits = false;
  for (const ScalarType dtype : dtypes) type_fits = type_fits || tensor.dtype == dtype;
  if (tensor.dim != dim || !type_fits || !tensor.is_contiguous()) {
    throw Refusal{std::string("unexpected ") + name + " of shape " + tensor.shape()};
  }
  return tensor;
}

inline constexpr std::initializer_list<ScalarType> kFloating = {ScalarType::kFloat32, ScalarType::kBFloat16};
inline constexpr std::initializer_list<ScalarType> kFloat = {ScalarType::kFloat32};
inline constexpr std::initializer_list<ScalarType> kBFloat = {ScalarType::kBFloat16};
inline constexpr std::initializer_list<ScalarType> kIndex = {ScalarType::kInt64};
inline constexpr std::initializer_list<ScalarType> kByte = {ScalarType::kUInt8};
inline constexpr std::initializer_list<ScalarType> kSignedByte = {ScalarType::kInt8};

inline std::unique_ptr<Tensor> allocate(std::initializer_list<int64_t> sizes, ScalarType dtype) {
  auto tensor = Tensor::allocate(std::span<const int64_t>(sizes.begin(), sizes.size()), dtype);
  if (tensor == nullptr) throw Refusal{"out of memory", ErrorCode::kOutOfMemory};
  return tensor;
}

// Runs an operator's body; its failure becomes a message and a code.
template <typename Body>
AOTITorchError guarded(const char* op, Body&& body) noexcept {
  try {
    body();
    return 0;
  } catch (const Refusal& refusal) {
    set_shim_error({refusal.code, std::string("qwen::") + op + ": " + refusal.reason});
  } catch (const std::bad_alloc&) {
    set_shim_error({ErrorCode::kOutOfMemory, "out of memory"});
  }
  return 1;
}

// One value a session.
template <typename T>
const T* per_session(AtenTensorHandle handle, std::initializer_list<ScalarType> dtypes, int64_t sessions,
                     const char* name) {
  const Tensor& tensor = dense(handle, 1, dtypes, name);
  require(tensor.sizes[0] == sessions, name);
  return tensor.as<T>();
}

}  // namespace qwen
