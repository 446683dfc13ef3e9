// The last block of several that work on one thing combines their results.
#pragma once

#include "kernels/cuda/primitives.cuh"

namespace qwen::cuda {

// Whether this block is the last of `blocks` to get here; it then sees what the others wrote before, if it
// reads past L1 (__ldcg). Called by all threads of the block. `counter` is zero before the first and after
// the last.
__device__ __forceinline__ bool is_last_block(uint32_t* counter, uint32_t blocks) {
  __shared__ bool last;
  __threadfence();
  __syncthreads();
  if (threadIdx.x == 0) {
    last = atomicInc(counter, blocks - 1) == blocks - 1;  // wraps to zero
    __threadfence();
  }
  __syncthreads();
  return last;
}

}  // namespace qwen::cuda
