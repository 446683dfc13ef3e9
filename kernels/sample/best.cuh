// The first kernel: marks the input tokens, applies the penalties and finds the largest logit. A greedy
// session is done after it.
#pragma once

#include "kernels/sample/session.cuh"

namespace qwen::cuda::sampling {

// Marks those input tokens of the session that are in [begin, begin + kChunk). All who store to a byte
// between two barriers store the same: a token may be given twice, once in the prompt and once generated.
__device__ inline void mark_tokens(const SampleArguments& in, int session, int begin) {
  const int64_t rows = in.tokens_count / in.sessions;
  const int64_t end = min(begin + kChunk, in.vocabulary);
  const int64_t first_generated = in.generated_from[session] - in.position[session];
  uint8_t* const seen = in.seen + in.slot[session] * in.vocabulary;
  for (const bool generated : {false, true}) {
    for (int64_t row = threadIdx.x; row < rows; row += kThreads) {
      const int64_t token = in.tokens[session * rows + row];
      if (token < begin || token >= end || (row >= first_generated) != generated) continue;
      seen[token] |= generated ? kGeneratedBit : kPromptBit;
    }
    __syncthreads();
  }
}

// Orders by logit, then by descending id.
__device__ inline uint64_t best_key(float logit, int id) {
  const uint32_t bits = __float_as_uint(logit);
  const uint32_t ordered = (bits >> 31) != 0 ? ~bits : bits | 0x80000000U;
  return static_cast<uint64_t>(ordered) << 32 | ~static_cast<uint32_t>(id);
}
__device__ inline float best_logit(uint64_t key) {
  const uint32_t ordered = static_cast<uint32_t>(key >> 32);
  return __uint_as_float((ordered >> 31) != 0 ? ordered & 0x7fffffffU : ~ordered);
}
__device__ inline int best_id(uint64_t key) { return static_cast<int>(~static_cast<uint32_t>(key)); }

__global__ void __launch_bounds__(kThreads) find_best(SampleArguments in, void* scratch, uint32_t* counters) {
  let_next_kernel_start();
  wait_for_previous_kernel();
  const int session = blockIdx.y, begin = blockIdx.x * kChunk, v = begin + 4 * threadIdx.x;
  const Scratch s = session_scratch(scratch, session, in.vocabulary);
  const float4 raw = load_logits(in.logits + session * static_cast<int64_t>(in.vocabulary), v, in.vocabulary);
  const float temperature = in.temperature[session], top_p = in.top_p[session];
  const int64_t top_k = in.top_k[session];

  mark_tokens(in, session, begin);
  for (int bin = blockIdx.x * kThreads + threadIdx.x; bin < kBins; bin += gridDim.x * kThreads) {
    s.counts[bin] = 0;
    s.masses[bin] = 0;
  }
  const float4 logits = penalize(raw, in.seen + in.slot[session] * static_cast<int64_t>(in.vocabulary), v,
                                 in.vocabulary, session_penalties(in, session));
  // What is past the end has a larger id than all tokens.
  uint64_t best = max(max(best_key(logits.x, v), best_key(logits.y, v + 1)),
                      max(best_key(logits.z, v + 2), best_key(logits.w, v + 3)));
  best = block_max(best);
  if (threadIdx.x == 0) s.bests[blockIdx.x] = best;
  if (!is_last_block(counters + session, gridDim.x)) return;

  best = 0;
  for (unsigned block = threadIdx.x; block < gridDim.x; block += kThreads)
    best = max(best, __ldcg(s.bests + block));
  best = block_max(best);
  if (threadIdx.x != 0) return;
  State state = {};
  state.largest = best_logit(best);
  state.first_bin = kBins;
  state.rank_bin = kBins;
  if (!(temperature > 0.0F) || !isfinite(state.largest)) {
    state.mode = Mode::kChosen;
    in.next_token[session] = best_id(best);
  } else {
    state.mode = (top_k > 0 && top_k < in.vocabulary) || top_p < 1.0F ? Mode::kFilter : Mode::kDraw;
  }
  *s.state = state;
}

}  // namespace qwen::cuda::sampling
