// The linear-attention token mixer on the GPU. Conventions: cuda/types.h; the arithmetic: reference.py.
//
// Hk key heads, Hv value heads, Dk and Dv their dimensions, C = 2 Hk Dk + Hv Dv channels, W convolution taps,
// Z = Hv Dv, S state slots. Dk and Dv are 16, 32, 64 or 128 (Dv also 8), W is 2 to kMaxTaps, Hv a multiple of
// Hk.
#pragma once

#include "kernels/cuda/types.h"

namespace qwen::cuda {

inline constexpr int kMaxTaps = 4;

struct DeltaShape {
  int key_heads;
  int value_heads;
  int key_dim;
  int value_dim;
  int taps;

  __host__ __device__ int channels() const { return 2 * key_heads * key_dim + value_heads * value_dim; }
  __host__ __device__ int value_size() const { return value_heads * value_dim; }
  static bool is_dimension(int d) { return d == 16 || d == 32 || d == 64 || d == 128; }
  bool has_valid_value_dim() const { return is_dimension(value_dim) || value_dim == 8; }
  bool has_valid_heads() const {
    return key_heads > 0 && value_heads > 0 && value_heads % key_heads == 0 && is_dimension(key_dim) &&
           has_valid_value_dim();
  }
  bool has_valid_taps() const { return taps >= 2 && taps <= kMaxTaps; }
};

// Decode, 1: the projections of norm(x), and the convolution with silu of the channels, whose state advances.
//   x [B, D]; qkvz: N = C + Z; ab [2 Hv, D]: rows of a, then of b; conv_weight [C, W]; conv_state [S, C, W -
//   1], advanced in place; slot [B], distinct. mixed [B, C]: silu(convolution); z [B, Z]; gates [B, 2 Hv]: a,
//   then b, rounded to bfloat16.
// The projections are rounded to bfloat16 before the convolution.
cudaError_t delta_input_decode(const bf16* x, RmsNorm norm, Int4Matrix qkvz, const bf16* ab,
                               const bf16* conv_weight, bf16* conv_state, const int64_t* slot, float* mixed,
                               bf16* z, float* gates, DeltaShape shape, int rows, cudaStream_t stream);

// Decode, 2: one step of the gated delta rule for each row, from its slot's state, advanced in place.
//   recurrent_state [S, Hv, Dk, Dv]; a_log, dt_bias [Hv]; core [B, Z].
// Slots and states are read before the previous kernel has ended: see cuda/launch.h.
cudaError_t delta_step_decode(const float* mixed, const float* gates, const bf16* a_log, const bf16* dt_bias,
                              float* recurrent_state, const int64_t* slot, float* core, DeltaShape shape,
                              int rows, cudaStream_t stream);

// Decode, 3: gated norm of core by z, output projection, residual. norm_weight [Dv]; out: K = Z; residual, y
// [B, D] (may be the same). core is rounded to bfloat16 first.
cudaError_t delta_output_decode(const float* core, const bf16* z, const bf16* norm_weight, float eps,
                                Int4Matrix out, const bf16* residual, bf16* y, DeltaShape shape, int rows,
                                cudaStream_t stream);

// Prefill, T consecutive tokens of slot[0]: convolution, then the chunked delta rule.
//   qkvz [T, C + Z]; gates [T, 2 Hv]: a, then b; core [T, Z]; conv_state and recurrent_state advance in
//   place. scratch: delta_prefill_scratch(shape, tokens) bytes.
cudaError_t delta_prefill(const bf16* qkvz, const float* gates, const bf16* conv_weight, const bf16* a_log,
                          const bf16* dt_bias, bf16* conv_state, float* recurrent_state, const int64_t* slot,
                          float* core, void* scratch, DeltaShape shape, int64_t tokens, cudaStream_t stream);
size_t delta_prefill_scratch(DeltaShape shape, int64_t tokens);

}  // namespace qwen::cuda
