// CPU kernel of qwen::attention: causal grouped-query attention over a slot's cache. Thread-safe for distinct
// slots.
//
// T rows, S slots, L cache length, Hq query heads, Hkv key-value heads, Dh head dimension. The cost of a row
// grows with its position, not with L.
#pragma once

#include <cstdint>

#include "kernels/cpu_types.h"

namespace qwen::cpu {

struct AttentionShape {
  int64_t rows = 0;  // T
  int64_t slot_ids =
      0;  // 1: rows are consecutive tokens from position[0]; T: row i is at position[i] of slot[i]
  int64_t num_slots = 0;     // S
  int64_t cache_length = 0;  // L
  int64_t query_heads = 0;   // Hq, a multiple of Hkv; query head h reads key-value head h / (Hq / Hkv)
  int64_t key_heads = 0;     // Hkv
  int64_t head_dim = 0;      // Dh
};

struct AttentionInputs {
  const void* q = nullptr;  // [T, Hq, Dh] in dtype, normalized and rotated
  const void* k = nullptr;  // [T, Hkv, Dh] in dtype, normalized and rotated
  const void* v = nullptr;  // [T, Hkv, Dh] in dtype
  DType dtype = DType::kFloat32;
  const int64_t* position = nullptr;  // [slot_ids]
  const int64_t* slot = nullptr;      // [slot_ids]
};

// Stores k and v at their positions in key_cache and value_cache [S, Hkv, L, Dh] (in inputs.dtype), then
// writes out [T, Hq, Dh] in inputs.dtype = softmax(q k / sqrt(Dh)) v over the positions 0 up to the row's
// own. Returns kOutOfRange unless every slot is in [0, S) and every row's position in [0, L).
int attention(const AttentionInputs& inputs, void* key_cache, void* value_cache, void* out,
              const AttentionShape& shape);

}  // namespace qwen::cpu
