// What a block of kThreads threads does together: scans and reductions. Every function is called by all
// threads of the block.
#pragma once

#include "kernels/cuda/last_block.cuh"
#include "kernels/cuda/primitives.cuh"

namespace qwen::cuda::sampling {

inline constexpr int kThreads = 512;
inline constexpr int kWarps = kThreads / 32;

// The sum of the values of this thread and those before it.
template <typename T>
__device__ T inclusive_scan(T value) {
  __shared__ T warps[kWarps];
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  for (int offset = 1; offset < 32; offset *= 2) {
    const T before = __shfl_up_sync(~0U, value, offset);
    if (lane >= offset) value += before;
  }
  if (lane == 31) warps[warp] = value;
  __syncthreads();
  for (int w = 0; w < warp; ++w) value += warps[w];
  __syncthreads();
  return value;
}

// The largest value of a warp's lanes.
__device__ inline int warp_largest(int value) { return __reduce_max_sync(~0U, value); }
__device__ inline uint32_t warp_largest(uint32_t value) { return __reduce_max_sync(~0U, value); }
__device__ inline uint64_t warp_largest(uint64_t value) {
  const uint32_t high = warp_largest(static_cast<uint32_t>(value >> 32));
  const uint32_t low = static_cast<uint32_t>(value >> 32) == high ? static_cast<uint32_t>(value) : 0;
  return static_cast<uint64_t>(high) << 32 | warp_largest(low);
}

// The largest value, in every thread.
template <typename T>
__device__ T block_max(T value) {
  __shared__ T warps[kWarps];
  value = warp_largest(value);
  if (threadIdx.x % 32 == 0) warps[threadIdx.x / 32] = value;
  __syncthreads();
  value = warp_largest(warps[threadIdx.x % kWarps]);
  __syncthreads();
  return value;
}

template <typename T>
__device__ T block_sum(T value) {
  __shared__ T warps[kWarps];
  for (int offset = 16; offset > 0; offset /= 2) value += __shfl_xor_sync(~0U, value, offset);
  if (threadIdx.x % 32 == 0) warps[threadIdx.x / 32] = value;
  __syncthreads();
  value = 0;
  for (int w = 0; w < kWarps; ++w) value += warps[w];
  __syncthreads();
  return value;
}

}  // namespace qwen::cuda::sampling
