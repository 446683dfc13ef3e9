// How a token's experts are chosen, for decode and prefill alike: by logit, NaN above all and of equals the
// lowest expert, as torch.sort has them descending and stable.
#pragma once

#include <cmath>
#include <type_traits>

#include "kernels/cuda/primitives.cuh"
#include "kernels/moe/cuda.h"

namespace qwen::cuda {

// A logit, whose value is a bfloat16's, as its 16 bits in an order that unsigned integers have; both zeros
// are one.
__device__ __forceinline__ uint32_t ordered_logit(float logit) {
  const uint32_t bits = __float_as_uint(logit + 0.0F);
  const uint32_t negative = static_cast<uint32_t>(static_cast<int32_t>(bits) >> 31);
  const uint32_t ordered = (bits ^ (negative | 0x80000000U)) >> 16;
  return logit != logit ? 0xffffU : ordered;
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

// Batcher's odd-even merge sort.
template <int kPerLane>
__device__ __forceinline__ void sort_descending(uint32_t (&keys)[kPerLane]) {
#pragma unroll
  for (int size = 1; size < kPerLane; size *= 2) {
#pragma unroll
    for (int stride = size; stride > 0; stride /= 2) {
#pragma unroll
      for (int i = 0; i < kPerLane; ++i) {
        const int j = i + stride;
        if (i < stride % size || (i - stride % size) / stride % 2 != 0) continue;
        if (j >= kPerLane || i / (2 * size) != j / (2 * size)) continue;
        const uint32_t most = max(keys[i], keys[j]);
        keys[j] = min(keys[i], keys[j]);
        keys[i] = most;
      }
    }
  }
}

// As choose_experts, the `count` best of a row's logits [E], `count` at most E. Made for latency: the loads
// are on their way together, and lanes that have their keys in order find a choice by one reduction.
__device__ __forceinline__ uint32_t choose_experts(const float* logits, int experts, int count) {
  constexpr int kPerLane = 8;
  const int lane = static_cast<int>(threadIdx.x % 32);
  uint32_t own = 0;
  // kWhole: the first experts, of which there are enough to ask nothing about them.
  const auto look_at = [&](int first, auto is_whole) {
    constexpr bool kWhole = decltype(is_whole)::value;
    const int least = first + lane;
    const float* of_lane = logits + least;
    settle(of_lane);
    float values[kPerLane];
#pragma unroll
    for (int i = 0; i < kPerLane; ++i) {
      // Those past the last one are below it, whatever it has.
      values[i] = kWhole || least + i * 32 < experts ? __ldcg(of_lane + i * 32) : -INFINITY;
    }
    uint32_t keys[kPerLane];
#pragma unroll
    for (int i = 0; i < kPerLane; ++i) keys[i] = choice_key(values[i], least + i * 32);
    sort_descending(keys);
    uint32_t before = own;  // of the experts below `first`
#pragma unroll 4
    for (int choice = 0; choice < count; ++choice) {
      const uint32_t best = __reduce_max_sync(~0U, kWhole ? keys[0] : max(keys[0], before));
      if (!kWhole && before == best) before = 0;
      const bool is_mine = keys[0] == best;
#pragma unroll
      for (int i = 0; i < kPerLane; ++i) keys[i] = !is_mine ? keys[i] : i + 1 < kPerLane ? keys[i + 1] : 0;
      own = lane == choice ? best : own;
    }
  };
  int first = 0;
  if (experts >= 32 * kPerLane) {
    look_at(0, std::true_type());
    first = 32 * kPerLane;
  }
#pragma unroll 1
  for (; first < experts; first += 32 * kPerLane) look_at(first, std::false_type());
  return own;
}

// The weight of a lane's choice among the `top_k`: a softmax over all experts, normalized over the chosen,
// in which the sum over all cancels.
__device__ __forceinline__ float choice_weight(uint32_t own, int top_k) {
  const float logit = logit_of(own);
  const float most = __shfl_sync(~0U, logit, 0);
  const float share = static_cast<int>(threadIdx.x % 32) < top_k ? __expf(logit - most) : 0.0F;
  return round_bf16(__fdividef(share, warp_sum(share)));
}

// The weight of the shared expert.
__device__ __forceinline__ float shared_weight(float logit) {
  return round_bf16(__fdividef(1.0F, 1.0F + __expf(-logit)));
}

}  // namespace qwen::cuda
