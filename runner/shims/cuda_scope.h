// CudaScope: where the operators of a cuda program launch their kernels while a compiled method runs.
//
// A cuda program's generated code believes its tensors to be on the CPU and never touches their data: what it
// passes to the operators is device memory, and what Tensor::allocate() gives them is too. Built only with
// CUDA.
#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>
#include <vector>

#include "kernels/cuda/types.h"

namespace qwen {

// Not thread-safe: it belongs to the thread that made it, as ArenaScope does, and scopes nest.
struct CudaScope {
  // The matrices that the blocks of a step begin with, in their order: empty before the first of its steps,
  // which fills it. Null where nobody asks.
  using FirstMatrices = std::vector<cuda::Int4Matrix>;

  CudaScope(cudaStream_t stream, uint32_t* counters, FirstMatrices* first_matrices);
  ~CudaScope();
  CudaScope(const CudaScope&) = delete;
  CudaScope& operator=(const CudaScope&) = delete;

  // The innermost scope of this thread; null outside of a compiled method's run.
  static CudaScope* current();

  // Called by each block, in the order they run, with the matrix it multiplies by first; {} for none.
  void begin_block(const cuda::Int4Matrix& first);
  // That of the next block; {} where it is not known yet.
  cuda::Int4Matrix next_block() const;

  cudaStream_t stream;
  uint32_t* counters;  // [qwen::cuda::kCounters] on the device, zero between launches

 private:
  FirstMatrices* first_matrices_;
  size_t begun_ = 0;
  CudaScope* previous_;
};

}  // namespace qwen
