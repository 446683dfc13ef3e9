// The first kernel: marks the input tokens, applies the penalties and finds the largest logit of each block.
#pragma once

#include "kernels/sample/session.cuh"

namespace qwen::cuda::sampling {

// Sets bits of a byte of `bytes`, whose alignment is a word's.
__device__ inline void set_bits(uint8_t* bytes, int64_t i, uint32_t bits) {
  atomicOr(reinterpret_cast<uint32_t*>(bytes) + i / 4, bits << (8 * (i % 4)));
}

// Orders by logit, then by descending id.
__device__ inline uint64_t best_key(float logit, int id) {
  const uint32_t bits = __float_as_uint(logit);
  const uint32_t ordered = (bits >> 31) != 0 ? ~bits : bits | 0x80000000U;
  return static_cast<uint64_t>(ordered) << 32 | ~static_cast<uint32_t>(id);
}

__global__ void __launch_bounds__(kThreads) find_best(SampleArguments in, void* scratch) {
  let_next_kernel_start();
  const int session = blockIdx.y, begin = blockIdx.x * kChunk, v = begin + 4 * threadIdx.x;
  const int end = min(begin + kChunk, in.vocabulary);
  const Scratch s = session_scratch(scratch, session, in.vocabulary);
  const Penalties penalties = session_penalties(in, session);
  const bool filters = session_mode(in, session) == Mode::kFilter;
  const int64_t seen = __ldcg(in.slot + session) * in.vocabulary;
  const int64_t generated_from = __ldcg(in.generated_from + session);
  const int64_t rows = rows_of(in);
  const auto load_token = [&](int64_t row) {
    return row < rows ? __ldcg(in.tokens + session * rows + row) : int64_t{-1};
  };
  wait_for_previous_kernel();
  // One trip to memory.
  const float4 raw = load_logits(in.logits + session * static_cast<int64_t>(in.vocabulary), v, in.vocabulary);
  int64_t token = load_token(threadIdx.x);
  const int64_t first_generated = generated_from - __ldcg(in.position + session);
  if (filters) {
    for (int bin = blockIdx.x * kThreads + threadIdx.x; bin < kBins; bin += gridDim.x * kThreads) {
      s.counts[bin] = 0;
      s.masses[bin] = 0;
    }
  }
  // Atomic: a token may be given twice, once in the prompt and once generated, and a word has four.
#pragma unroll 1
  for (int64_t row = threadIdx.x; row < rows; row += kThreads) {
    if (token >= begin && token < end)
      set_bits(in.seen, seen + token, row >= first_generated ? kGeneratedBit : kPromptBit);
    token = load_token(row + kThreads);
  }
  if (!penalties.neutral()) __syncthreads();  // for the marks
  const float4 logits = penalize(raw, in.seen + seen, v, in.vocabulary, penalties);
  // What is past the end has a larger id than all tokens.
  const uint64_t best = block_max(max(max(best_key(logits.x, v), best_key(logits.y, v + 1)),
                                      max(best_key(logits.z, v + 2), best_key(logits.w, v + 3))));
  if (threadIdx.x == 0) s.bests[blockIdx.x] = best;
}

struct Best {
  float logit;
  int id;
};

// Of all blocks, in every thread; called in later kernels by all threads of the block.
__device__ inline Best session_best(const Scratch& s, int blocks) {
  uint64_t best = 0;
  for (int block = threadIdx.x; block < blocks; block += kThreads) best = max(best, __ldcg(s.bests + block));
  best = block_max(best);
  const uint32_t ordered = static_cast<uint32_t>(best >> 32);
  return {__uint_as_float((ordered >> 31) != 0 ? ordered & 0x7fffffffU : ~ordered),
          static_cast<int>(~static_cast<uint32_t>(best))};
}

}  // namespace qwen::cuda::sampling
