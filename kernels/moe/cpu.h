// CPU kernels of qwen::router, float_moe and int4_moe. Thread-safe.
//
// T tokens, D hidden size, E experts, I intermediate size of one expert, A experts a token. Accumulates in
// float32.
#pragma once

#include <cstdint>

#include "kernels/cpu_types.h"

namespace qwen::cpu {

struct RouterShape {
  int64_t tokens = 0;   // T
  int64_t hidden = 0;   // D
  int64_t experts = 0;  // E
  int64_t top_k = 0;    // A
};

// x [T, D], weight [E, D] -> ids [T, A] and their normalized weights [T, A], by descending logit, the lowest
// expert first of equals. Logits and weights are rounded to x.dtype. Returns kBadShape unless 0 < A <= E.
int router(const Array& x, const Array& weight, int64_t* ids, float* weights, const RouterShape& shape);

struct MoeShape {
  int64_t tokens = 0;        // T
  int64_t hidden = 0;        // D
  int64_t experts = 0;       // E
  int64_t intermediate = 0;  // I
  int64_t top_k = 0;         // A
};

// out [T, D] in x.dtype = sum over a < A, in this order, of weights[t, a] * down_e(silu(gate_e(x)) * up_e(x))
// with e = ids[t, a]. x [T, D], ids [T, A], weights [T, A], gate_up [E, 2I, D] (gate rows, then up rows),
// down [E, D, I]. Returns kOutOfRange unless every id is in [0, E).
int float_moe(const Array& x, const int64_t* ids, const float* weights, const Array& gate_up,
              const Array& down, void* out, const MoeShape& shape);

// The experts of int4_moe: codes as in int4_linear, scales bfloat16 bits.
struct Int4Experts {
  const uint8_t* gate_up_qweight = nullptr;  // [E, 2I, D/2]
  const uint16_t* gate_up_scales = nullptr;  // [E, 2I, gate_up_groups]
  const uint8_t* down_qweight = nullptr;     // [E, D, I/2]
  const uint16_t* down_scales = nullptr;     // [E, D, down_groups]
  int64_t gate_up_groups = 0;                // D / G
  int64_t down_groups = 0;                   // I / G
};

// As float_moe. Returns kBadShape if D or I is odd or not divided by its groups.
int int4_moe(const Array& x, const int64_t* ids, const float* weights, const Int4Experts& experts, void* out,
             const MoeShape& shape);

}  // namespace qwen::cpu
