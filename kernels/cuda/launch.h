// How a kernel is launched: in stream order, with programmatic dependent launch.
//
// A kernel launched so may begin while the one before it still runs. Every kernel calls
// wait_for_previous_kernel() in every thread, on every path, before its first write to global memory and
// before its first read of anything but weights; then all work enqueued before it is finished and visible. It
// may call let_next_kernel_start() as soon as it gains nothing more from having the machine to itself.
//
// A copy or fill in the stream is no part of this: what it wrote is there before the kernel after it begins,
// and so for all kernels after that. Six kernels read more than weights before they wait:
//   moe_down_decode the router's logits and the residual: its predecessor, moe_gate_up_decode, lets it start
//     only after its own wait, when they are visible. It must follow that kernel directly.
//   moe_down_prefill, of few tokens an expert, the routing: its predecessor, moe_gate_up_prefill, lets it
//     start only after its own wait, when that is visible. It must follow that kernel directly.
//   sample slots and the sessions' options: no kernel writes these.
//   delta_step_decode (and delta_prefill, where it goes token by token) slots and their states, of which
//     holds what follows.
//   scan_chunks slots and their states: prepare_chunks, before it, lets it start only after its own wait.
//   attention_decode positions and slots, and of these slots the keys and values before the position. What
//     wrote them must be over when it begins: a step's last kernel, publish, lets its successor start only
//     after its own wait and its writes, so what a step wrote is there before the next one begins.
#pragma once

#include <cuda_runtime_api.h>

#include <cstddef>

#ifdef QWEN_CUDA_EMULATION
#include "kernels/cuda/emulation.h"
#endif

#define QWEN_RETURN_IF_CUDA_ERROR(call)               \
  do {                                                \
    const cudaError_t qwen_error = (call);            \
    if (qwen_error != cudaSuccess) return qwen_error; \
  } while (false)

namespace qwen::cuda {

struct LaunchShape {
  dim3 grid;
  dim3 block;
  size_t shared_bytes = 0;   // dynamic
  unsigned int cluster = 1;  // blocks along x that run at once (cluster.cuh), at most max_cluster_blocks()
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

// Multiprocessors of the current device; all devices are taken to be alike.
inline int multiprocessors() {
#ifdef QWEN_CUDA_EMULATION
  return emulated::multiprocessors();
#else
  static const int count = [] {
    int device = 0;
    int value = 1;
    if (cudaGetDevice(&device) == cudaSuccess) {
      cudaDeviceGetAttribute(&value, cudaDevAttrMultiProcessorCount, device);
    }
    return value;
  }();
  return count;
#endif
}

// 1 on a device that has no clusters, else 8, which any that has them takes.
inline int max_cluster_blocks() {
#ifdef QWEN_CUDA_EMULATION
  return emulated::max_cluster_blocks();
#else
  static const int count = [] {
    int device = 0;
    int has = 0;
    if (cudaGetDevice(&device) == cudaSuccess) {
      cudaDeviceGetAttribute(&has, cudaDevAttrClusterLaunch, device);
    }
    return has != 0 ? 8 : 1;
  }();
  return count;
#endif
}

#ifdef QWEN_CUDA_EMULATION
template <typename... Parameters, typename... Arguments>
cudaError_t launch(void (*kernel)(Parameters...), const LaunchShape& shape, cudaStream_t stream,
                   Arguments... arguments) {
  return emulated::run_clusters(shape.grid, shape.block, shape.shared_bytes, shape.cluster, stream,
                                [=] { kernel(static_cast<Parameters>(arguments)...); });
}
#else
// Unasked, a block gets 48 KiB, its static shared memory included; no kernel that has dynamic shared memory
// has more than 16 KiB of that. All kernels ask for the same division of a multiprocessor's memory, the most
// that can be shared: to change it a multiprocessor must be empty, so that a kernel that wants another one
// starts when its predecessor has ended, and one that fits beside it not at all.
inline cudaError_t set_shared_memory(const void* kernel, size_t bytes) {
  const cudaError_t divided = cudaFuncSetAttribute(kernel, cudaFuncAttributePreferredSharedMemoryCarveout,
                                                   cudaSharedmemCarveoutMaxShared);
  if (divided != cudaSuccess || bytes <= 32 * 1024) return divided;
  return cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, static_cast<int>(bytes));
}

template <typename... Parameters, typename... Arguments>
cudaError_t launch(void (*kernel)(Parameters...), const LaunchShape& shape, cudaStream_t stream,
                   Arguments... arguments) {
  QWEN_RETURN_IF_CUDA_ERROR(set_shared_memory(reinterpret_cast<const void*>(kernel), shape.shared_bytes));
  // Sound only because the kernels wait: CMake never makes PTX of an architecture that has no such wait
  // (below 90), which a newer GPU would run.
  cudaLaunchAttribute attributes[2] = {};
  attributes[0].id = cudaLaunchAttributeProgrammaticStreamSerialization;
  attributes[0].val.programmaticStreamSerializationAllowed = 1;
  attributes[1].id = cudaLaunchAttributeClusterDimension;
  attributes[1].val.clusterDim = {shape.cluster, 1, 1};
  cudaLaunchConfig_t config = {};
  config.gridDim = shape.grid;
  config.blockDim = shape.block;
  config.dynamicSmemBytes = shape.shared_bytes;
  config.stream = stream;
  config.attrs = attributes;
  config.numAttrs = shape.cluster > 1 ? 2 : 1;
  return cudaLaunchKernelEx(&config, kernel, static_cast<Parameters>(arguments)...);
}
#endif

}  // namespace qwen::cuda
