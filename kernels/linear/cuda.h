// Matrix products with int4, int8 and bfloat16 weights on the GPU, and the int8 embedding. Conventions:
// cuda/types.h.
#pragma once

#include "kernels/cuda/types.h"

namespace qwen::cuda {

// y = norm(x) W^T (+ residual), for 1 to kMaxDecodeRows rows: bound by the bandwidth of W.
// x [B, K], residual [B, N] or null (may be y), y [B, N].
cudaError_t int4_linear_decode(const bf16* x, RmsNorm norm, Int4Matrix w, const bf16* residual, bf16* y,
                               int rows, cudaStream_t stream);

// The head: y = norm(x) W^T with y float32 [B, N], each value rounded to bfloat16 as a bfloat16 model's
// logits are.
cudaError_t int4_head(const bf16* x, RmsNorm norm, Int4Matrix w, float* y, int rows, cudaStream_t stream);
cudaError_t int8_head(const bf16* x, RmsNorm norm, Int8Matrix w, float* y, int rows, cudaStream_t stream);

// y = x W^T (+ residual) for any T, on tensor cores, W dequantized in the tile.
// x [T, K], residual [T, N] or null (may be y), y [T, N].
cudaError_t int4_linear_prefill(const bf16* x, Int4Matrix w, const bf16* residual, bf16* y, int64_t tokens,
                                cudaStream_t stream);

// y = silu(x gate^T) * (x up^T), W = gate and up interleaved (Int4Experts). x [T, K], y [T, N / 2].
cudaError_t int4_swiglu_prefill(const bf16* x, Int4Matrix w, bf16* y, int64_t tokens, cudaStream_t stream);

// y = x W^T for a small bfloat16 W [N, K] (gates, router), any T. y is rounded to bfloat16 and stored as
// float32 [T, N].
cudaError_t float_linear_prefill(const bf16* x, const bf16* w, float* y, int64_t tokens, int k, int n,
                                 cudaStream_t stream);
// The same of two matrices in one launch: router [E, K] and shared_gate [1, K].
// logits [T, E], shared_logit [T].
cudaError_t router_logits_prefill(const bf16* x, const bf16* router, const bf16* shared_gate, float* logits,
                                  float* shared_logit, int64_t tokens, int k, int experts,
                                  cudaStream_t stream);

// y [T, D] = the rows `ids` [T] of a table of D = table.k columns. An id outside the table gives a row of
// NaN.
cudaError_t int8_embedding(const int64_t* ids, Int8Matrix table, bf16* y, int64_t tokens,
                           cudaStream_t stream);

}  // namespace qwen::cuda
