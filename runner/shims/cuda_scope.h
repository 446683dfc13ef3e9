// CudaScope: where the operators of a cuda program launch their kernels while a compiled method runs.
//
// A cuda program's generated code believes its tensors to be on the CPU and never touches their data: what it
// passes to the operators is device memory, and what Tensor::allocate() gives them is too. Built only with
// CUDA.
#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>

#include "kernels/moe/cuda.h"

namespace qwen {

// Not thread-safe: it belongs to the thread that made it, as ArenaScope does, and scopes nest.
struct CudaScope {
  CudaScope(cudaStream_t stream, uint32_t* counters, cuda::ExpertActivations expert_activations);
  ~CudaScope();
  CudaScope(const CudaScope&) = delete;
  CudaScope& operator=(const CudaScope&) = delete;

  // The innermost scope of this thread; null outside of a compiled method's run.
  static CudaScope* current();

  cudaStream_t stream;
  uint32_t* counters;                          // [qwen::cuda::kCounters] on the device, zero between launches
  cuda::ExpertActivations expert_activations;  // of prefills

 private:
  CudaScope* previous_;
};

}  // namespace qwen
