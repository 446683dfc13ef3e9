// CPU kernel of qwen::sample: penalties, temperature, top-k, top-p, min-p and the seeded draw. Thread-safe
// for distinct slots.
//
// B sessions, T tokens of the call, S slots, V vocabulary.
#pragma once

#include <cstdint>

#include "kernels/cpu_types.h"

namespace qwen::cpu {

struct SampleShape {
  int64_t sessions = 0;    // B
  int64_t tokens = 0;      // T, equal to B unless B is 1
  int64_t num_slots = 0;   // S
  int64_t vocabulary = 0;  // V
};

struct SampleInputs {
  const float* logits = nullptr;              // [B, V]; a NaN counts as minus infinity
  const int64_t* tokens = nullptr;            // [T] the model's input tokens of this call
  const int64_t* position = nullptr;          // [B] of each session's first token in this call
  const int64_t* slot = nullptr;              // [B]
  const float* temperature = nullptr;         // [B] 0 takes the largest logit, the lowest id of equals
  const int64_t* top_k = nullptr;             // [B] 0 is off
  const float* top_p = nullptr;               // [B] 1 is off
  const float* min_p = nullptr;               // [B] 0 is off
  const float* presence_penalty = nullptr;    // [B] 0 is off
  const float* repetition_penalty = nullptr;  // [B] > 0; 1 is off
  const int64_t* seed = nullptr;              // [B]
  const int64_t* generated_from = nullptr;    // [B] first position whose input token counts as generated
};

// Marks the input tokens in seen u8 [S, V] (bit 0 prompt, bit 1 generated), then writes the tokens to come,
// next [B]. Returns kOutOfRange unless every slot is in [0, S), every token in [0, V) and every position >=
// 0.
int sample(const SampleInputs& inputs, uint8_t* seen, int64_t* next, const SampleShape& shape);

}  // namespace qwen::cpu
