// The next token on the GPU. Conventions: cuda/types.h; the meaning of everything: reference.py.
#pragma once

#include "kernels/cuda/types.h"

namespace qwen::cuda {

struct SampleArguments {
  const float* logits;              // [B, V]
  const int64_t* tokens;            // [T]: the call's input tokens; T == B unless B is 1
  const int64_t* position;          // [B]: of each session's first token
  const int64_t* slot;              // [B], distinct
  uint8_t* seen;                    // [S, V], mutated; in words of four bytes, also the last
  const float* temperature;         // [B]
  const int64_t* top_k;             // [B]
  const float* top_p;               // [B]
  const float* min_p;               // [B]
  const float* presence_penalty;    // [B]
  const float* repetition_penalty;  // [B]
  const int64_t* seed;              // [B]
  const int64_t* generated_from;    // [B]
  int64_t* next_token;              // [B]
  int sessions;                     // B
  int64_t tokens_count;             // T
  int vocabulary;                   // V
};

// scratch: sample_scratch(vocabulary, sessions) bytes. Slots and options are read before the previous kernel
// has ended: see cuda/launch.h.
cudaError_t sample(const SampleArguments& arguments, void* scratch, uint32_t* counters, cudaStream_t stream);
size_t sample_scratch(int vocabulary, int sessions);

}  // namespace qwen::cuda
