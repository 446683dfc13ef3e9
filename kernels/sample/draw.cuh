// The third kernel: scores of the tokens that may be kept, the exact cut among the candidates, and the best
// score.
#pragma once

#include "kernels/sample/best.cuh"
#include "kernels/sample/philox.h"
#include "kernels/sample/select.cuh"

namespace qwen::cuda::sampling {

// The noise of a token: a hash of (seed, position, id).
__device__ inline double gumbel(int id, int64_t position, int64_t seed) {
  const auto low = [](int64_t v) { return static_cast<uint32_t>(static_cast<uint64_t>(v)); };
  const auto high = [](int64_t v) { return static_cast<uint32_t>(static_cast<uint64_t>(v) >> 32); };
  const uint32_t word =
      cpu::philox({static_cast<uint32_t>(id), low(position), high(position), 0}, {low(seed), high(seed)})[0];
  return -log(-log((static_cast<double>(word) + 0.5) * 0x1p-32));
}

__device__ inline bool is_better(Score a, Score b) {
  return a.value > b.value || (a.value == b.value && a.id < b.id);
}

// The best of the block's, in every thread.
__device__ inline Score block_best(Score best) {
  __shared__ Score warps[kWarps];
  for (int offset = 16; offset > 0; offset /= 2) {
    const Score other = {__shfl_xor_sync(~0U, best.value, offset), __shfl_xor_sync(~0U, best.id, offset)};
    if (is_better(other, best)) best = other;
  }
  if (threadIdx.x % 32 == 0) warps[threadIdx.x / 32] = best;
  __syncthreads();
  for (int w = 0; w < kWarps; ++w) {
    if (is_better(warps[w], best)) best = warps[w];
  }
  __syncthreads();
  return best;
}

__global__ void __launch_bounds__(kThreads, 2)
    draw_token(SampleArguments in, void* scratch, uint32_t* counters) {
  __shared__ SelectMemory memory;
  __shared__ uint32_t reserved;
  let_next_kernel_start();
  const int session = blockIdx.y, v = blockIdx.x * kChunk + 4 * threadIdx.x;
  const Scratch s = session_scratch(scratch, session, in.vocabulary);
  const Mode mode = session_mode(in, session);
  wait_for_previous_kernel();
  if (mode == Mode::kGreedy) return;

  const float4 logits = load_penalized(in, session, v);
  const Bins bins = mode == Mode::kFilter ? s.state->bins : Bins{};
  const Best largest = session_best(s, gridDim.x);
  if (!isfinite(largest.logit)) {
    if (blockIdx.x == 0 && threadIdx.x == 0) in.next_token[session] = largest.id;
    return;
  }

  const double none = -static_cast<double>(__uint_as_float(kInfinity));
  const int64_t rows = rows_of(in);
  const int64_t position = in.position[session] + rows - 1, seed = in.seed[session];
  const float min_p = in.min_p[session], least = min_p > 0.0F ? fminf(min_p, 1.0F) : 0.0F;
  const uint4 four = distances_of(logits, largest.logit, in.temperature[session]);
  const uint32_t distances[4] = {four.x, four.y, four.z, four.w};
  double scores[4];
  bool is_candidate[4];
  Score best = {none, in.vocabulary};
  uint32_t candidates = 0;
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    is_candidate[i] = false;
    if (distances[i] >= kInfinity) continue;
    const uint32_t bin = bin_of(distances[i]);
    const bool kept = bin < bins.first;
    is_candidate[i] = !kept && (bin <= bins.last || bin == bins.rank);
    if (!kept && !is_candidate[i]) continue;
    const double logit = -static_cast<double>(__uint_as_float(distances[i]));
    // min_p concerns the draw alone: the other filters come first.
    const bool likely = least == 0.0F || static_cast<float>(exp(logit)) >= least;
    scores[i] = likely ? logit + gumbel(v + i, position, seed) : none;
    if (is_candidate[i]) {
      ++candidates;
    } else if (const Score score = {scores[i], v + i}; is_better(score, best)) {
      best = score;
    }
  }
  const uint32_t up_to_here = inclusive_scan(candidates);
  if (threadIdx.x == kThreads - 1)
    reserved = up_to_here == 0 ? 0 : atomicAdd(&s.state->candidates, up_to_here);
  best = block_best(best);  // and a barrier
  uint32_t place = reserved + up_to_here - candidates;
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    if (!is_candidate[i]) continue;
    s.keys[place] = token_key(distances[i], v + i);
    s.draws[place++] = scores[i];
  }
  if (threadIdx.x == 0) s.scores[blockIdx.x] = best;
  if (!is_last_block(counters + session, gridDim.x)) return;

  for (unsigned block = threadIdx.x; block < gridDim.x; block += kThreads) {
    const Score score = {__ldcg(&s.scores[block].value), __ldcg(&s.scores[block].id)};
    if (is_better(score, best)) best = score;
  }
  const uint32_t listed = mode == Mode::kFilter ? __ldcg(&s.state->candidates) : 0;
  if (listed > 0) {
    const uint64_t last = last_kept_key(s.keys, listed, *s.state, in.top_k[session], in.top_p[session],
                                        mass_unit(in.vocabulary), memory);
    for (uint32_t i = threadIdx.x; i < listed; i += kThreads) {
      const uint64_t key = __ldcg(s.keys + i);
      const Score score = {__ldcg(s.draws + i), static_cast<int64_t>(key & 0xffffffffU)};
      if (key <= last && is_better(score, best)) best = score;
    }
  }
  best = block_best(best);
  if (threadIdx.x == 0) in.next_token[session] = best.id;
}

}  // namespace qwen::cuda::sampling
