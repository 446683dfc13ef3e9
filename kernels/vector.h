// The inner loops of the CPU kernels, compiled for several instruction sets and chosen once a process.
//
// Every loop sums in lanes of a fixed width and reduces them in a fixed order, so a result depends on its own
// operands alone: not on how many rows or tokens a call carries. (Between machines of different vector width
// it may differ in rounding.) Thread-safe; nothing here allocates.
#pragma once

#include <cstdint>

namespace qwen::cpu {

inline constexpr int kTileRows = 4;          // weight rows a dot product call takes
inline constexpr int kTileTokens = 4;        // and tokens at most
inline constexpr int64_t kColumnBlock = 32;  // columns of a dot product are padded to a multiple of this
inline constexpr int kWeightedSumHeads = 4;  // heads a weighted_sum call takes at most

struct VectorOps {
  const char* name;

  void (*bf16_to_float)(const uint16_t* in, int64_t n, float* out);
  void (*float_to_bf16)(const float* in, int64_t n, uint16_t* out);

  // out[k] = q[k] * scales[k / group]. REQUIRES: group % 32 == 0, columns % group == 0.
  void (*dequantize_int8)(const int8_t* q, const uint16_t* scales, int64_t columns, int64_t group,
                          float* out);
  // The same for two codes a byte, in interleaved order: of each 32 columns first the 16 even, then the 16
  // odd ones.
  void (*dequantize_int4)(const uint8_t* q, const uint16_t* scales, int64_t columns, int64_t group,
                          float* out);

  // out[t * out_stride + r] = sum over k of w[r][k] * x[t][k] for 4 rows and 1 to 4 tokens.
  // REQUIRES: columns % 32 == 0.
  void (*dot)(const float* const* w, const float* const* x, int tokens, int64_t columns, float* out,
              int64_t out_stride);
  // The same for one token, dequantizing on the way; bit-identical to `dot` on the dequantized rows (for
  // int4, on x in interleaved order). scales[r] is the row's own. REQUIRES: group % 32 == 0.
  void (*dot_bf16)(const uint16_t* const* w, const float* x, int64_t columns, float* out);
  void (*dot_int8)(const int8_t* const* w, const uint16_t* const* scales, const float* x, int64_t columns,
                   int64_t group, float* out);
  void (*dot_int4)(const uint8_t* const* w, const uint16_t* const* scales, const float* x, int64_t columns,
                   int64_t group, float* out);

  // out[i] = silu(gate[i]) * up[i].
  void (*swiglu)(const float* gate, const float* up, int64_t n, float* out);
  // x[i] = exp(x[i] - max(x)); returns their sum. REQUIRES: n > 0.
  float (*exp_shifted)(float* x, int64_t n);
  // Returns the sum of x[i] * x[i].
  float (*sum_of_squares)(const float* x, int64_t n);
  // out[i] += scale * x[i].
  void (*add_scaled)(const float* x, float scale, int64_t n, float* out);
  // out[h][c] += sum over j < n, in this order, of weights[h][j] * rows[j * stride + c], for 1 to 4 heads.
  void (*weighted_sum)(const float* const* weights, int heads, const float* rows, int64_t stride, int64_t n,
                       int64_t columns, float* const* out);

  // out[c] = silu(sum over w < taps of weight[w * weight_stride + c] * history[w * history_stride + c]).
  void (*convolve_silu)(const float* weight, int64_t weight_stride, const float* history,
                        int64_t history_stride, int64_t taps, int64_t channels, float* out);
  // One token of the gated delta rule on `columns` of the value dimension: state [key_dim] rows of `stride`
  // floats, q and k [key_dim], v and out [columns].
  void (*delta_step)(float* state, int64_t stride, int64_t key_dim, int64_t columns, const float* q,
                     const float* k, const float* v, float decay, float beta, float* out);
};

// The best set this machine runs. The environment variable QWEN_CPU_ISA (v4, v3 or base) picks a lesser one.
const VectorOps& vector_ops();

}  // namespace qwen::cpu
