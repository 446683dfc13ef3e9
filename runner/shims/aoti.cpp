// The device-independent part of the ABI that AOTInductor-compiled code calls: handles, their metadata,
// allocation.
//
// Getters return borrowed pointers; functions that return a handle give it to the caller, who deletes it.

#include <cstdio>
#include <cstring>
#include <memory>
#include <new>
#include <span>
#include <string>

#include "shims/tensor.h"

#ifdef QWEN_CUDA
#include "cuda_error.h"
#include "shims/cuda_scope.h"
#endif

using qwen::ErrorCode;
using qwen::ScalarType;
using qwen::Tensor;

namespace {

constexpr AOTITorchError kSuccess = 0;
constexpr AOTITorchError kFailure = 1;

AOTITorchError fail(const std::string& message, ErrorCode code = ErrorCode::kInternal) noexcept {
  try {
    qwen::set_shim_error({code, message});
  } catch (...) {  // NOLINT(bugprone-empty-catch): no memory for the message, the code alone must do
  }
  return kFailure;
}

// Why `body` of make() made none, where that is not for want of memory.
struct Failure {
  qwen::Error error;
};

// Runs `body`, which makes a tensor, and hands it out; no exception crosses the ABI.
template <typename Body>
AOTITorchError make(const char* what, AtenTensorHandle* out, Body&& body) noexcept {
  try {
    std::unique_ptr<Tensor> tensor = body();
    if (tensor == nullptr) return fail(std::string("out of memory in ") + what, ErrorCode::kOutOfMemory);
    *out = tensor.release()->handle();
    return kSuccess;
  } catch (const Failure& failure) {
    return fail(failure.error.message, failure.error.code);
  } catch (const std::bad_alloc&) {
    return fail("out of memory", ErrorCode::kOutOfMemory);
  } catch (...) {
    return fail("unexpected failure");
  }
}

// Copies a strided tensor element by element into `to`, which has the same sizes and strides of its own.
void copy_strided(const Tensor& from, const Tensor& to) {
  const size_t width = qwen::element_size(from.dtype);
  const int64_t count = from.numel();
  if (from.is_contiguous() && to.is_contiguous()) {
    std::memcpy(to.data(), from.data(), static_cast<size_t>(count) * width);
    return;
  }
  for (int64_t i = 0; i < count; ++i) {
    int64_t rest = i;
    int64_t source = 0;
    int64_t target = 0;
    for (int64_t d = from.dim - 1; d >= 0; --d) {
      const int64_t index = rest % from.sizes[d];
      rest /= from.sizes[d];
      source += index * from.strides[d];
      target += index * to.strides[d];
    }
    std::memcpy(to.as<std::byte>() + static_cast<size_t>(target) * width,
                from.as<std::byte>() + static_cast<size_t>(source) * width, width);
  }
}

std::span<const int64_t> dims(const int64_t* values, int64_t count) {
  return {values, static_cast<size_t>(count)};
}

}  // namespace

QWEN_SHIM int32_t qwen_aoti_torch_device_type_cpu() { return qwen::kDeviceCpu; }
QWEN_SHIM int32_t qwen_aoti_torch_device_type_cuda() { return qwen::kDeviceCuda; }
QWEN_SHIM int32_t qwen_aoti_torch_layout_strided() { return 0; }

#define QWEN_DTYPE(name, value) \
  QWEN_SHIM int32_t qwen_aoti_torch_dtype_##name() { return static_cast<int32_t>(ScalarType::value); }
QWEN_DTYPE(uint8, kUInt8)
QWEN_DTYPE(int8, kInt8)
QWEN_DTYPE(int16, kInt16)
QWEN_DTYPE(int32, kInt32)
QWEN_DTYPE(int64, kInt64)
QWEN_DTYPE(float16, kFloat16)
QWEN_DTYPE(float32, kFloat32)
QWEN_DTYPE(bool, kBool)
QWEN_DTYPE(bfloat16, kBFloat16)
#undef QWEN_DTYPE

// Compiled code switches gradients off and restores what it found; there are none here.
QWEN_SHIM bool qwen_aoti_torch_grad_mode_is_enabled() { return false; }
QWEN_SHIM void qwen_aoti_torch_grad_mode_set_enabled(bool) {}

QWEN_SHIM void qwen_aoti_torch_check(bool condition, const char*, const char*, uint32_t,
                                     const char* message) {
  // The ABI has no way to return a failure here. Compiled code calls it for index bounds, which our operators
  // and the session check before it can see them; container.cpp fails the step that left a message behind.
  if (!condition) fail(message != nullptr ? message : "a check in the compiled program failed");
}

QWEN_SHIM AOTITorchError qwen_aoti_torch_delete_tensor_object(AtenTensorHandle tensor) {
  delete Tensor::from(tensor);
  return kSuccess;
}

QWEN_SHIM AOTITorchError qwen_aoti_torch_get_data_ptr(AtenTensorHandle tensor, void** out) {
  *out = Tensor::from(tensor)->data();
  return kSuccess;
}

QWEN_SHIM AOTITorchError qwen_aoti_torch_get_storage_size(AtenTensorHandle tensor, int64_t* out) {
  *out = static_cast<int64_t>(Tensor::from(tensor)->storage->bytes);
  return kSuccess;
}

QWEN_SHIM AOTITorchError qwen_aoti_torch_get_dim(AtenTensorHandle tensor, int64_t* out) {
  *out = Tensor::from(tensor)->dim;
  return kSuccess;
}

QWEN_SHIM AOTITorchError qwen_aoti_torch_get_numel(AtenTensorHandle tensor, int64_t* out) {
  *out = Tensor::from(tensor)->numel();
  return kSuccess;
}

QWEN_SHIM AOTITorchError qwen_aoti_torch_get_sizes(AtenTensorHandle tensor, int64_t** out) {
  *out = Tensor::from(tensor)->sizes.data();
  return kSuccess;
}

QWEN_SHIM AOTITorchError qwen_aoti_torch_get_strides(AtenTensorHandle tensor, int64_t** out) {
  *out = Tensor::from(tensor)->strides.data();
  return kSuccess;
}

QWEN_SHIM AOTITorchError qwen_aoti_torch_get_dtype(AtenTensorHandle tensor, int32_t* out) {
  *out = static_cast<int32_t>(Tensor::from(tensor)->dtype);
  return kSuccess;
}

QWEN_SHIM AOTITorchError qwen_aoti_torch_get_device_type(AtenTensorHandle tensor, int32_t* out) {
  *out = Tensor::from(tensor)->device_type;
  return kSuccess;
}

QWEN_SHIM AOTITorchError qwen_aoti_torch_get_storage_offset(AtenTensorHandle tensor, int64_t* out) {
  *out = Tensor::from(tensor)->offset;
  return kSuccess;
}

QWEN_SHIM AOTITorchError qwen_aoti_torch_empty_strided(int64_t ndim, const int64_t* sizes,
                                                       const int64_t* strides, int32_t dtype,
                                                       int32_t device_type, int32_t, AtenTensorHandle* out) {
  if (qwen::element_size(dtype) == 0) return fail("unsupported dtype code " + std::to_string(dtype));
  return make("a temporary", out, [&] {
    return Tensor::allocate(dims(sizes, ndim), dims(strides, ndim), static_cast<ScalarType>(dtype),
                            device_type);
  });
}

QWEN_SHIM AOTITorchError qwen_aoti_torch_create_tensor_from_blob(void* data, int64_t ndim,
                                                                 const int64_t* sizes, const int64_t* strides,
                                                                 int64_t offset, int32_t dtype,
                                                                 int32_t device_type, int32_t,
                                                                 AtenTensorHandle* out) {
  if (qwen::element_size(dtype) == 0) return fail("unsupported dtype code " + std::to_string(dtype));
  return make("a view", out, [&]() -> std::unique_ptr<Tensor> {
    auto tensor = Tensor::borrow(data, dims(sizes, ndim), static_cast<ScalarType>(dtype));
    if (tensor == nullptr) return nullptr;
    for (int64_t i = 0; i < ndim; ++i) tensor->strides[i] = strides[i];
    tensor->offset = offset;
    tensor->device_type = device_type;
    return tensor;
  });
}

QWEN_SHIM AOTITorchError qwen_aoti_torch_create_tensor_from_blob_v2(
    void* data, int64_t ndim, const int64_t* sizes, const int64_t* strides, int64_t offset, int32_t dtype,
    int32_t device_type, int32_t device_index, AtenTensorHandle* out, int32_t, const uint8_t*, int64_t) {
  return qwen_aoti_torch_create_tensor_from_blob(data, ndim, sizes, strides, offset, dtype, device_type,
                                                 device_index, out);
}

QWEN_SHIM AOTITorchError qwen_aoti_torch_new_tensor_handle(AtenTensorHandle tensor, AtenTensorHandle* out) {
  return make("a handle", out, [&] { return std::make_unique<Tensor>(*Tensor::from(tensor)); });
}

QWEN_SHIM AOTITorchError qwen_aoti_torch__reinterpret_tensor(AtenTensorHandle tensor, int64_t ndim,
                                                             const int64_t* sizes, const int64_t* strides,
                                                             int64_t offset_increment,
                                                             AtenTensorHandle* out) {
  if (ndim > Tensor::kMaxDim) return fail("a view has more than 8 dimensions");
  return make("a view", out, [&] {
    auto view = std::make_unique<Tensor>(*Tensor::from(tensor));
    view->dim = ndim;
    for (int64_t i = 0; i < ndim; ++i) {
      view->sizes[i] = sizes[i];
      view->strides[i] = strides[i];
    }
    view->offset += offset_increment;
    return view;
  });
}

QWEN_SHIM AOTITorchError qwen_aoti_torch_clone(AtenTensorHandle tensor, AtenTensorHandle* out) {
  return make("a copy", out, [&] {
    const Tensor& from = *Tensor::from(tensor);
    auto copy = Tensor::allocate(dims(from.sizes.data(), from.dim), dims(from.strides.data(), from.dim),
                                 from.dtype, from.device_type);
    if (copy == nullptr) return copy;
#ifdef QWEN_CUDA
    if (const qwen::CudaScope* gpu = qwen::CudaScope::current(); gpu != nullptr) {
      // All that its strides reach, gaps included: the copy has the same.
      const cudaError_t code = cudaMemcpyAsync(copy->data(), from.data(), copy->storage->bytes,
                                               cudaMemcpyDeviceToDevice, gpu->stream);
      if (code != cudaSuccess) throw Failure{qwen::cuda_failure(code, "cudaMemcpyAsync")};
      return copy;
    }
#endif
    copy_strided(from, *copy);
    return copy;
  });
}
