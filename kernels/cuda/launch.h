// How a kernel is launched: in stream order, with programmatic dependent launch.
//
// A kernel launched so may begin while the one before it still runs. Every kernel calls
// wait_for_previous_kernel() in every thread, on every path, before its first write to global memory and
// before its first read of anything but weights; then all work enqueued before it is finished and visible. It
// may call let_next_kernel_start() as soon as it gains nothing more from having the machine to itself.
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
  if (shape.shared_bytes > 48 * 1024) {
    const cudaError_t raised = cudaFuncSetAttribute(reinterpret_cast<const void*>(kernel),
                                                    cudaFuncAttributeMaxDynamicSharedMemorySize,
                                                    static_cast<int>(shape.shared_bytes));
    if (raised != cudaSuccess) return raised;
  }
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
