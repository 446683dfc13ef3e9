// The end of a step on the GPU: the token it sampled becomes the next step's input, and the host sees it
// without waiting for the stream. Conventions: cuda/types.h.
#pragma once

#include "kernels/cuda/types.h"

namespace qwen::cuda {

// Steps whose tokens the host can still read.
inline constexpr uint32_t kRingSteps = 64;

struct PublishArguments {
  const int64_t* next_token;  // [B]: what the step sampled
  int64_t* tokens;            // [B]: becomes next_token; null for no next step
  int64_t* position;          // [B]: goes up by one; null for no next step
  uint32_t* steps;            // [1]: how many were published; goes up by one
  // [kRingSteps, B], pinned memory of the host. Step number n (the first is 1, modulo 2^32) stores n in the
  // upper half and its token in the lower half of entry (n - 1) % kRingSteps: one store, so that who sees the
  // number sees the token.
  uint64_t* ring;
  int rows;  // B
};

cudaError_t publish(const PublishArguments& arguments, cudaStream_t stream);

}  // namespace qwen::cuda
