// Prefill's routing: each token's best experts, and the choices sorted by expert.
#include <algorithm>

#include "kernels/moe/choice.cuh"
#include "kernels/moe/route_few.cuh"

namespace qwen::cuda {

namespace {

constexpr int kMaxPerLane = kMaxExperts / 32;

constexpr int kRouterWarps = 4;

// A warp a token.
template <int kPerLane>
__global__ void __launch_bounds__(32 * kRouterWarps)
    route(const float* logits, int32_t* ids, float* weights, int experts, int top_k, int tokens) {
  wait_for_previous_kernel();
  let_next_kernel_start();
  const int token = blockIdx.x * kRouterWarps + threadIdx.x / 32;
  const int lane = threadIdx.x % 32;
  if (token >= tokens) return;
  uint32_t keys[kPerLane];
#pragma unroll
  for (int i = 0; i < kPerLane; ++i) {
    const int expert = lane + 32 * i;
    keys[i] = 0;
    if (expert >= experts) continue;
    const float logit = logits[static_cast<size_t>(token) * experts + expert];
    keys[i] = choice_key(logit, expert);
  }
  const uint32_t mine = choose_experts(keys, top_k);
  // The softmax's denominator cancels: the chosen weights sum to one.
  const uint32_t largest = __shfl_sync(~0U, mine, 0);
  const float weight = lane < top_k ? __expf(logit_of(mine) - logit_of(largest)) : 0;
  const float sum = warp_sum(weight);
  if (lane >= top_k) return;
  const size_t at = static_cast<size_t>(token) * top_k + lane;
  ids[at] = expert_of(mine);
  weights[at] = round_bf16(weight / sum);
}

// The sort counts: each block has a run of choices, counts its experts, then puts its choices behind those of
// the blocks before it. Within a block each warp has a run of its own, so that the order stays.
constexpr int kSortWarps = 8;
constexpr int kSortThreads = 32 * kSortWarps;
constexpr int kMaxSortBlocks = 128;

int choices_per_block(int64_t choices) {
  const int64_t even = (choices + kMaxSortBlocks - 1) / kMaxSortBlocks;
  return static_cast<int>(std::max<int64_t>(512, (even + kSortThreads - 1) / kSortThreads * kSortThreads));
}

__global__ void __launch_bounds__(kSortThreads)
    count_experts(const int32_t* ids, int32_t* counts, int experts, int choices, int per_block) {
  __shared__ int32_t mine[kMaxExperts];
  for (int e = threadIdx.x; e < experts; e += kSortThreads) mine[e] = 0;
  __syncthreads();
  wait_for_previous_kernel();
  let_next_kernel_start();
  const int begin = blockIdx.x * per_block;
  const int end = min(choices, begin + per_block);
  for (int i = begin + static_cast<int>(threadIdx.x); i < end; i += kSortThreads) atomicAdd(&mine[ids[i]], 1);
  __syncthreads();
  for (int e = threadIdx.x; e < experts; e += kSortThreads) counts[blockIdx.x * experts + e] = mine[e];
}

__global__ void __launch_bounds__(kSortThreads)
    scatter_choices(const int32_t* ids, const int32_t* counts, int32_t* order, int32_t* offsets, int experts,
                    int choices, int per_block) {
  __shared__ int32_t next[kSortWarps][kMaxExperts];  // first counts, then where a warp's next choice goes
  __shared__ int32_t warp_totals[kSortWarps];
  const int lane = threadIdx.x % 32;
  const int warp = threadIdx.x / 32;
  for (int e = lane; e < experts; e += 32) next[warp][e] = 0;
  __syncwarp();
  wait_for_previous_kernel();
  let_next_kernel_start();

  const int per_warp = per_block / kSortWarps;
  const int begin = blockIdx.x * per_block + warp * per_warp;
  const int end = min(choices, begin + per_warp);
  for (int i = begin + lane; i < end; i += 32) atomicAdd(&next[warp][ids[i]], 1);

  // Where each expert begins. Thread t has the experts from t per_thread on.
  const int per_thread = (experts + kSortThreads - 1) / kSortThreads;
  constexpr int kMaxPerThread = kMaxExperts / kSortThreads;
  int32_t total[kMaxPerThread];
  int32_t before[kMaxPerThread];  // of the choices of earlier blocks
  int32_t all = 0;
#pragma unroll
  for (int j = 0; j < kMaxPerThread; ++j) {
    const int e = threadIdx.x * per_thread + j;
    total[j] = 0;
    before[j] = 0;
    if (j >= per_thread || e >= experts) continue;
    for (int b = 0; b < static_cast<int>(gridDim.x); ++b) {
      const int32_t count = counts[b * experts + e];
      total[j] += count;
      if (b < static_cast<int>(blockIdx.x)) before[j] += count;
    }
    all += total[j];
  }
  int32_t sum = all;
#pragma unroll
  for (int offset = 1; offset < 32; offset *= 2) {
    const int32_t other = __shfl_up_sync(~0U, sum, offset);
    if (lane >= offset) sum += other;
  }
  if (lane == 31) warp_totals[warp] = sum;
  __syncthreads();
  int32_t start = sum - all;
  for (int i = 0; i < warp; ++i) start += warp_totals[i];
#pragma unroll
  for (int j = 0; j < kMaxPerThread; ++j) {
    const int e = threadIdx.x * per_thread + j;
    if (j >= per_thread || e >= experts) continue;
    if (blockIdx.x == 0) offsets[e] = start;
    int32_t at = start + before[j];
    for (int i = 0; i < kSortWarps; ++i) {
      const int32_t count = next[i][e];
      next[i][e] = at;
      at += count;
    }
    start += total[j];
  }
  if (blockIdx.x == 0 && threadIdx.x == 0) offsets[experts] = choices;
  __syncthreads();

  for (int first = begin; first < end; first += 32) {
    const int i = first + lane;
    const int32_t id = i < end ? ids[i] : -1;
    unsigned same = 0;
#pragma unroll
    for (int other = 0; other < 32; ++other) {
      if (__shfl_sync(~0U, id, other) == id) same |= 1U << other;
    }
    const int rank = __popc(same & ((1U << lane) - 1));
    if (i < end) order[next[warp][id] + rank] = i;
    __syncwarp();
    if (i < end && rank == 0) next[warp][id] += __popc(same);
    __syncwarp();
  }
}

bool has_valid_choices(const MoeShape& shape) {
  return shape.experts >= 1 && shape.experts <= kMaxExperts && shape.top_k >= 1 &&
         shape.top_k <= std::min(kMaxChoices, shape.experts);
}

// Choices have 32-bit indices.
bool has_valid_size(const MoeShape& shape, int64_t tokens) {
  return tokens >= 0 && tokens * shape.top_k < int64_t{1} << 31;
}

}  // namespace

cudaError_t router_prefill(const float* logits, int32_t* ids, float* weights, MoeShape shape, int64_t tokens,
                           cudaStream_t stream) {
  if (tokens == 0) return cudaSuccess;
  if (!has_valid_choices(shape) || !has_valid_size(shape, tokens)) return cudaErrorInvalidValue;
  const dim3 grid(static_cast<unsigned>((tokens + kRouterWarps - 1) / kRouterWarps));
  const auto kernel = shape.experts <= 32 ? route<1> : shape.experts <= 256 ? route<8> : route<kMaxPerLane>;
  return launch(kernel, {grid, dim3(32 * kRouterWarps)}, stream, logits, ids, weights, shape.experts,
                shape.top_k, static_cast<int>(tokens));
}

cudaError_t moe_sort(const int32_t* ids, int32_t* order, int32_t* offsets, void* scratch, MoeShape shape,
                     int64_t tokens, cudaStream_t stream) {
  const int64_t choices = tokens * shape.top_k;
  if (tokens < 1 || !has_valid_choices(shape) || !has_valid_size(shape, tokens)) return cudaErrorInvalidValue;
  const int per_block = choices_per_block(choices);
  const dim3 grid(static_cast<unsigned>((choices + per_block - 1) / per_block));
  int32_t* const counts = static_cast<int32_t*>(scratch);
  const int total = static_cast<int>(choices);
  QWEN_RETURN_IF_CUDA_ERROR(launch(count_experts, {grid, dim3(kSortThreads)}, stream, ids, counts,
                                   shape.experts, total, per_block));
  return launch(scatter_choices, {grid, dim3(kSortThreads)}, stream, ids, counts, order, offsets,
                shape.experts, total, per_block);
}

cudaError_t moe_route(const float* logits, int32_t* ids, float* weights, int32_t* order, int32_t* offsets,
                      void* scratch, MoeShape shape, int64_t tokens, cudaStream_t stream) {
  if (tokens < 1 || !has_valid_choices(shape) || !has_valid_size(shape, tokens)) return cudaErrorInvalidValue;
  const int blocks = max_cluster_blocks();
  if (tokens > int64_t{blocks} * kFewWarps) {
    QWEN_RETURN_IF_CUDA_ERROR(router_prefill(logits, ids, weights, shape, tokens, stream));
    return moe_sort(ids, order, offsets, scratch, shape, tokens, stream);
  }
  const int count = static_cast<int>(tokens);
  const FewRoutes routes = {
      logits, ids, weights, order, offsets, shape.experts, shape.top_k, count, (count + blocks - 1) / blocks};
  const size_t bytes = static_cast<size_t>(FewRoutesLayout(blocks, shape.experts).bytes);
  const unsigned cluster = static_cast<unsigned>(blocks);
  return launch(route_few, {dim3(cluster), dim3(kFewThreads), bytes, cluster}, stream, routes);
}

size_t moe_sort_scratch(MoeShape shape, int64_t tokens) {
  const int64_t choices = tokens * shape.top_k;
  const int64_t per_block = choices_per_block(choices);
  const int64_t blocks = (choices + per_block - 1) / per_block;
  return static_cast<size_t>(blocks) * static_cast<size_t>(shape.experts) * sizeof(int32_t);
}

}  // namespace qwen::cuda
