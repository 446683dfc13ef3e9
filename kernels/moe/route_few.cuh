// Prefill's routing of few tokens by one kernel: what routing.cu does by three, of which each would take
// longer to start than to run.
//
// The blocks of a cluster share out the tokens, a warp one, and tell each other how many chose what. A token
// chooses an expert once at most. So what a block's tokens chose is a bit a token for each expert, and a
// choice's place among its block's is how many bits are set below its own.
#pragma once

#include "kernels/cuda/cluster.cuh"
#include "kernels/moe/choice.cuh"

namespace qwen::cuda {

inline constexpr int kFewWarps = 16;
inline constexpr int kFewThreads = 32 * kFewWarps;
inline constexpr int kPlacingWarps = 8;  // that say where experts begin
inline constexpr int kMaxPlaced = kMaxExperts / (32 * kPlacingWarps);

struct FewRoutes {
  const float* logits;  // [T, E]
  int32_t* ids;         // [T, A]
  float* weights;       // [T, A]
  int32_t* order;       // [T A]
  int32_t* offsets;     // [E + 1]
  int experts;
  int top_k;
  int tokens;
  int block_tokens;  // at most kFewWarps
};

// Shared memory, as offsets.
struct FewRoutesLayout {
  int counts;  // int32 [blocks][E], of all blocks
  int bits;    // uint32 [E]
  int starts;  // int32 [E], where the block's choices begin
  int totals;  // int32 [kPlacingWarps]
  int bytes;

  __host__ __device__ FewRoutesLayout(int blocks, int experts)
      : counts(0),
        bits(blocks * experts * 4),
        starts(bits + experts * 4),
        totals(starts + experts * 4),
        bytes(totals + kPlacingWarps * 4) {}
};

static __global__ void __launch_bounds__(kFewThreads) route_few(FewRoutes r) {
  QWEN_DYNAMIC_SHARED(shared);
  const int blocks = static_cast<int>(gridDim.x);
  const int rank = static_cast<int>(blockIdx.x);
  const FewRoutesLayout layout(blocks, r.experts);
  int32_t* const all_counts = reinterpret_cast<int32_t*>(shared + layout.counts);
  uint32_t* const bits = reinterpret_cast<uint32_t*>(shared + layout.bits);
  int32_t* const starts = reinterpret_cast<int32_t*>(shared + layout.starts);
  int32_t* const totals = reinterpret_cast<int32_t*>(shared + layout.totals);
  const int thread = threadIdx.x;
  const int lane = thread % 32;
  const int warp = thread / 32;
  cluster_begin();
  for (int e = thread; e < r.experts; e += kFewThreads) bits[e] = 0;
  __syncthreads();
  wait_for_previous_kernel();
  let_next_kernel_start();

  const int token = rank * r.block_tokens + warp;
  const bool has_token = warp < r.block_tokens && token < r.tokens;
  int expert = -1;
  if (has_token) {
    const uint32_t own =
        choose_experts(r.logits + static_cast<size_t>(token) * r.experts, r.experts, r.top_k);
    const float weight = choice_weight(own, r.top_k);
    if (lane < r.top_k) {
      expert = expert_of(own);
      atomicOr(&bits[expert], 1U << warp);
      r.ids[token * r.top_k + lane] = expert;
      r.weights[token * r.top_k + lane] = weight;
    }
  }
  __syncthreads();
  cluster_wait();
  for (int i = thread; i < blocks * r.experts; i += kFewThreads) {
    const int e = i % r.experts;
    const BlockMemory memory(all_counts, i / r.experts);
    memory.store((rank * r.experts + e) * 4, __int_as_float(__popc(bits[e])));
  }
  cluster_arrive();
  cluster_wait();

  // A thread places one expert where there are few, else kMaxPlaced next to each other.
  const int placed = r.experts <= 32 * kPlacingWarps ? 1 : kMaxPlaced;
  const int begin = thread * placed;
  const int end = warp < kPlacingWarps ? min(r.experts, begin + placed) : begin;
  int total[kMaxPlaced] = {};
  int before[kMaxPlaced] = {};  // of the blocks before
  int all = 0;
#pragma unroll
  for (int j = 0; j < kMaxPlaced; ++j) {
    if (begin + j >= end) continue;
    for (int b = 0; b < blocks; ++b) {
      const int count = all_counts[b * r.experts + begin + j];
      total[j] += count;
      before[j] += b < rank ? count : 0;
    }
    all += total[j];
  }
  int sum = all;
  if (warp < kPlacingWarps) {
#pragma unroll
    for (int offset = 1; offset < 32; offset *= 2) {
      const int other = __shfl_up_sync(~0U, sum, offset);
      if (lane >= offset) sum += other;
    }
    if (lane == 31) totals[warp] = sum;
  }
  __syncthreads();
  int start = sum - all;
  for (int i = 0; i < min(warp, kPlacingWarps); ++i) start += totals[i];
#pragma unroll
  for (int j = 0; j < kMaxPlaced; ++j) {
    if (begin + j >= end) continue;
    starts[begin + j] = start + before[j];
    if (rank == 0) r.offsets[begin + j] = start;
    start += total[j];
  }
  if (rank == 0 && thread == 0) r.offsets[r.experts] = r.tokens * r.top_k;
  __syncthreads();
  if (expert < 0) return;
  r.order[starts[expert] + __popc(bits[expert] & ((1U << warp) - 1))] = token * r.top_k + lane;
}

}  // namespace qwen::cuda
