// CPU kernel of qwen::gated_delta: short convolution, SiLU and the gated delta rule. Thread-safe for distinct
// slots.
//
// T rows, S slots, Hk key heads, Hv value heads, Dk and Dv their dimensions, C = 2*Hk*Dk + Hv*Dv channels, W
// taps.
#pragma once

#include <cstdint>

#include "kernels/cpu_types.h"

namespace qwen::cpu {

struct GatedDeltaShape {
  int64_t rows = 0;       // T
  int64_t slot_ids = 0;   // 1: the rows are consecutive tokens of one slot; T: row i is one token of slot[i]
  int64_t num_slots = 0;  // S
  int64_t key_heads = 0;  // Hk
  int64_t value_heads = 0;  // Hv, a multiple of Hk; value head h reads key head h / (Hv / Hk)
  int64_t key_dim = 0;      // Dk
  int64_t value_dim = 0;    // Dv
  int64_t taps = 0;         // W
};

struct GatedDeltaInputs {
  const void* mixed_qkv = nullptr;  // [T, C] in dtype: q, k, v side by side
  const void* a = nullptr;          // [T, Hv] in dtype
  const void* b = nullptr;          // [T, Hv] in dtype
  DType dtype = DType::kFloat32;
  Array conv_weight;              // [C, W], the last tap is the current token
  Array a_log;                    // [Hv]
  Array dt_bias;                  // [Hv]
  const int64_t* slot = nullptr;  // [slot_ids]
};

// Advances the states of the slots in place and writes out [T, Hv*Dv] in inputs.dtype. conv_state [S, C, W-1]
// is in inputs.dtype, recurrent_state f32 [S, Hv, Dk, Dv]. Rows that name the same slot follow each other.
// Returns kOutOfRange unless every slot is in [0, S), kBadShape if the sizes contradict each other.
int gated_delta(const GatedDeltaInputs& inputs, void* conv_state, float* recurrent_state, void* out,
                const GatedDeltaShape& shape);

}  // namespace qwen::cpu
