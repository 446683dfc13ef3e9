// Gated grouped-query attention on the GPU, from the projections to what the output projection takes.
// Conventions: cuda/types.h; the arithmetic: export/attention.py and reference.py.
//
// Hq query heads, Hkv key-value heads, Dh head dimension (16 to 256, a multiple of 16), R rotary dimensions
// (even, at most Dh), L cache length.
#pragma once

#include "kernels/cuda/types.h"

namespace qwen::cuda {

struct AttentionShape {
  int query_heads;
  int key_heads;
  int head_dim;
  int rotary_dim;
  float rope_theta;
  float eps;         // of the norms of q and k
  int cache_length;  // L

  // A row of the projections: for each query head its query and its gate side by side, then keys, then
  // values.
  __host__ __device__ int query_size() const { return query_heads * head_dim; }
  __host__ __device__ int key_size() const { return key_heads * head_dim; }
  __host__ __device__ int row_size() const { return 2 * query_size() + 2 * key_size(); }
};

// Both: q and k are normed (x / rms(x) * (1 + weight)), rounded to bfloat16 and rotated, k and v stored at
// the rows' positions, each row attends to positions 0 up to its own of its slot, and the result is
// multiplied with sigmoid(gate).
//   qkv [B or T, row_size()]; q_norm, k_norm [Dh]; key_cache, value_cache [S, Hkv, L, Dh]; out [B or T, Hq
//   Dh].

// Decode: position, slot [B]; slots are distinct. The work is split over the context, not over L. scratch:
// attention_decode_scratch(shape, rows) bytes. Positions, slots and what the slots' caches hold before the
// positions are read before the wait for the previous kernel; see cuda/launch.h.
cudaError_t attention_decode(const bf16* qkv, const bf16* q_norm, const bf16* k_norm, bf16* key_cache,
                             bf16* value_cache, const int64_t* position, const int64_t* slot, void* scratch,
                             uint32_t* counters, bf16* out, AttentionShape shape, int rows,
                             cudaStream_t stream);
size_t attention_decode_scratch(AttentionShape shape, int rows);

// Prefill: T consecutive tokens from position[0] of slot[0]. scratch: attention_prefill_scratch(shape,
// tokens) bytes.
cudaError_t attention_prefill(const bf16* qkv, const bf16* q_norm, const bf16* k_norm, bf16* key_cache,
                              bf16* value_cache, const int64_t* position, const int64_t* slot, void* scratch,
                              bf16* out, AttentionShape shape, int64_t tokens, cudaStream_t stream);
size_t attention_prefill_scratch(AttentionShape shape, int64_t tokens);

}  // namespace qwen::cuda
