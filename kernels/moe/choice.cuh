// How a token's experts are chosen, for decode and prefill alike: by logit, NaN above all and of equals the
// lowest expert, as torch.sort has them descending and stable.
#pragma once

#include "kernels/cuda/activation.cuh"
#include "kernels/moe/cuda.h"

namespace qwen::cuda {

// A logit, whose value is a bfloat16's, as its 16 bits in an order that unsigned integers have; both zeros
// are one.
__device__ __forceinline__ uint32_t ordered_logit(float logit) {
  if (logit != logit) return 0xffffU;
  const uint32_t bits = __float_as_uint(logit + 0.0F) >> 16;
  return (bits & 0x8000U) != 0 ? ~bits & 0xffffU : bits | 0x8000U;
}

// A logit above its expert's index reversed: the largest key is the best choice. No two are equal, none is 0.
__device__ __forceinline__ uint32_t choice_key(float logit, int expert) {
  return ordered_logit(logit) << 16 | (0xffffU - expert);
}
__device__ __forceinline__ int32_t expert_of(uint32_t key) {
  return static_cast<int32_t>(0xffffU - (key & 0xffffU));
}
__device__ __forceinline__ float logit_of(uint32_t key) {
  const uint32_t ordered = key >> 16;
  return __uint_as_float(((ordered & 0x8000U) != 0 ? ordered & 0x7fffU : ~ordered & 0xffffU) << 16);
}

// The `top_k` largest of a warp's keys, largest first, one a lane; 0 in other lanes. Clears them in `keys`.
template <int kPerLane>
__device__ __forceinline__ uint32_t choose_experts(uint32_t (&keys)[kPerLane], int top_k) {
  uint32_t own = 0;
#pragma unroll 1
  for (int choice = 0; choice < top_k; ++choice) {
    uint32_t best = keys[0];
#pragma unroll
    for (int i = 1; i < kPerLane; ++i) best = max(best, keys[i]);
    best = __reduce_max_sync(~0U, best);
#pragma unroll
    for (int i = 0; i < kPerLane; ++i) keys[i] = keys[i] == best ? 0 : keys[i];
    if (static_cast<int>(threadIdx.x) % 32 == choice) own = best;
  }
  return own;
}

// The weight of the shared expert.
__device__ __forceinline__ float shared_weight(float logit) { return round_bf16(sigmoid(logit)); }

}  // namespace qwen::cuda
