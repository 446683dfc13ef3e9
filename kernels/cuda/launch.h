// How a kernel is launched: in stream order, with programmatic dependent launch.
//
// A kernel launched so may begin while the one before it still runs. Every kernel calls
// wait_for_previous_kernel() in every thread, on every path, before its first write to global memory and
// before its first read of anything but weights; then all work enqueued before it is finished and visible. It
// may call let_next_kernel_start() as soon as it gains nothing more from having the machine to itself.
//
// A copy or fill in the stream is no part of this: what it wrote is there before the kernel after it begins,
// and so for all kernels after that. Two kernels read more than weights before they wait:
//   moe_down_decode the experts' ids: its predecessor, moe_gate_up_decode, lets it start only after its own
//     wait, when the router's results are visible. It must follow that kernel directly.
//   delta_step_decode (and delta_prefill, where it goes token by token) a slot's number, for a prefetch: no
//     kernel writes one, and a number that is no slot fetches nothing.
#pragma once

#include <cuda_runtime_api.h>

#include <cstddef>

#ifdef QWEN_CUDA_EMULATION
#include "kernels/cuda/emulation.h"
#endif

namespace qwen::cuda {

struct LaunchShape {
  dim3 grid;
  dim3 block;
  size_t shared_bytes = 0;  // dynamic
};

// Most dynamic shared memory of a block, on the current device; all devices are taken to be alike.
inline int max_shared_bytes() {
#ifdef QWEN_CUDA_EMULATION
  return static_cast<int>(emulated::kMaxSharedBytes);
#else
  static const int bytes = [] {
    int device = 0;
    int value = 48 * 1024;
    if (cudaGetDevice(&device) == cudaSuccess) {
      cudaDeviceGetAttribute(&value, cudaDevAttrMaxSharedMemoryPerBlockOptin, device);
    }
    return value;
  }();
  return bytes;
#endif
}

#ifdef QWEN_CUDA_EMULATION
template <typename... Parameters, typename... Arguments>
cudaError_t launch(void (*kernel)(Parameters...), const LaunchShape& shape, cudaStream_t stream,
                   Arguments... arguments) {
  return emulated::run(shape.grid, shape.block, shape.shared_bytes, stream,
                       [=] { kernel(static_cast<Parameters>(arguments)...); });
}
#else
template <typename... Parameters, typename... Arguments>
cudaError_t launch(void (*kernel)(Parameters...), const LaunchShape& shape, cudaStream_t stream,
                   Arguments... arguments) {
  // Unasked, a block gets 48 KiB, its static shared memory included; no kernel that has dynamic shared memory
  // has more than 16 KiB of that.
  if (shape.shared_bytes > 32 * 1024) {
    const cudaError_t raised = cudaFuncSetAttribute(reinterpret_cast<const void*>(kernel),
                                                    cudaFuncAttributeMaxDynamicSharedMemorySize,
                                                    static_cast<int>(shape.shared_bytes));
    if (raised != cudaSuccess) return raised;
  }
  // Sound only because the kernels wait: CMake never makes PTX of an architecture that has no such wait
  // (below 90), which a newer GPU would run.
  cudaLaunchAttribute attribute = {};
  attribute.id = cudaLaunchAttributeProgrammaticStreamSerialization;
  attribute.val.programmaticStreamSerializationAllowed = 1;
  cudaLaunchConfig_t config = {};
  config.gridDim = shape.grid;
  config.blockDim = shape.block;
  config.dynamicSmemBytes = shape.shared_bytes;
  config.stream = stream;
  config.attrs = &attribute;
  config.numAttrs = 1;
  return cudaLaunchKernelEx(&config, kernel, static_cast<Parameters>(arguments)...);
}
#endif

}  // namespace qwen::cuda

#define QWEN_RETURN_IF_CUDA_ERROR(call)               \
  do {                                                \
    const cudaError_t qwen_error = (call);            \
    if (qwen_error != cudaSuccess) return qwen_error; \
  } while (false)
