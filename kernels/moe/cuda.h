// The router and the experts on the GPU, routed and shared. Conventions: cuda/types.h; the arithmetic:
// reference.py and export/moe.py.
//
// D hidden size, E experts, A experts a token, I intermediate size of a routed expert, Is of the shared one.
#pragma once

#include "kernels/cuda/types.h"

namespace qwen::cuda {

inline constexpr int kMaxExperts = 1024;
inline constexpr int kMaxChoices = 32;

struct MoeShape {
  int hidden;               // D
  int experts;              // E, at most kMaxExperts
  int top_k;                // A, at most kMaxChoices
  int intermediate;         // I
  int shared_intermediate;  // Is
};

// Decode, 1: the logits of norm(x), float32 [B, E + 1], the last for the shared expert, rounded to bfloat16.
//   x [B, D]; router [E, D]; shared_gate [1, D].
cudaError_t router_decode(const bf16* x, RmsNorm norm, const bf16* router, const bf16* shared_gate,
                          float* logits, MoeShape shape, int rows, cudaStream_t stream);

// Decode, 2: act = silu(gate) * up of norm(x), by each row's A best experts and by the shared one.
//   gate_up: E of N = 2 I, K = D; shared_gate_up: N = 2 Is; act [B, A I + Is], choice by choice, best first,
//   the shared one last. Of logits NaN comes first, and of equal ones the lowest expert.
cudaError_t moe_gate_up_decode(const bf16* x, RmsNorm norm, const float* logits, Int4Experts gate_up,
                               Int4Matrix shared_gate_up, bf16* act, MoeShape shape, int rows,
                               cudaStream_t stream);

// Decode, 3: y = residual + sum over choices of weight * act down^T, the shared expert included.
//   down: E of N = D, K = I; shared_down: K = Is; residual, y [B, D] (may be the same). The weights are
//   those of reference.router, and the sigmoid of the last logit, rounded to bfloat16.
// Must directly follow moe_gate_up_decode in the stream, or a copy: it reads the logits and the residual
// before it waits for its predecessor, which lets it start when they are there (launch.h).
cudaError_t moe_down_decode(const bf16* act, const float* logits, Int4Experts down, Int4Matrix shared_down,
                            const bf16* residual, bf16* y, MoeShape shape, int rows, cudaStream_t stream);

// Prefill, 1: from the logits [T, E] (float32, rounded to bfloat16) to ids i32 [T, A] and weights [T, A].
cudaError_t router_prefill(const float* logits, int32_t* ids, float* weights, MoeShape shape, int64_t tokens,
                           cudaStream_t stream);

// Prefill, 2: sorts the T A choices by expert. Shapes depend on T and the shape alone.
//   order i32 [T A]: choice indices (token * A + choice), grouped by expert, ascending within one; offsets
//   i32 [E + 1]: where each expert's begin. scratch: moe_sort_scratch bytes.
cudaError_t moe_sort(const int32_t* ids, int32_t* order, int32_t* offsets, void* scratch, MoeShape shape,
                     int64_t tokens, cudaStream_t stream);
size_t moe_sort_scratch(MoeShape shape, int64_t tokens);

// Prefill, 1 and 2: both at once, of few tokens by one kernel. scratch: moe_sort_scratch bytes.
cudaError_t moe_route(const float* logits, int32_t* ids, float* weights, int32_t* order, int32_t* offsets,
                      void* scratch, MoeShape shape, int64_t tokens, cudaStream_t stream);

// Prefill, 3: act [T A, I], in sorted order: silu(gate) * up of x[order / A]. x [T, D].
cudaError_t moe_gate_up_prefill(const bf16* x, const int32_t* order, const int32_t* offsets,
                                Int4Experts gate_up, bf16* act, MoeShape shape, int64_t tokens,
                                cudaStream_t stream);

// Prefill, 4: choices [T A, D] = act down^T, each row at its choice index (unsorted again).
cudaError_t moe_down_prefill(const bf16* act, const int32_t* order, const int32_t* offsets, Int4Experts down,
                             bf16* choices, MoeShape shape, int64_t tokens, cudaStream_t stream);

// What the routed experts of prefill multiply their int4 weights with. Rows are quantized once: int8 each
// group of 128 columns on its own, e4m3 each row. The error against float32, of random activations: 1e-2 and
// 4e-2 of what gate_up makes, 7e-3 and 3e-2 of down's; with columns twenty times as large as the others 3e-2
// of gate_up, both.
enum class ExpertActivations : int {
  kBfloat16 = 0,
  kInt8 = 1,
  kFloat8 = 2,  // e4m3
};

// Prefill, 3 and 4 with activations of 8 bits, `kind` kInt8 or kFloat8; kFloat8 is for GPUs from sm_89 on,
// cudaErrorNotSupported elsewhere. scratch: moe_8bit_scratch bytes, of one at a time.
cudaError_t moe_gate_up_prefill_8bit(ExpertActivations kind, const bf16* x, const int32_t* order,
                                     const int32_t* offsets, Int4Experts gate_up, bf16* act, void* scratch,
                                     MoeShape shape, int64_t tokens, cudaStream_t stream);
cudaError_t moe_down_prefill_8bit(ExpertActivations kind, const bf16* act, const int32_t* order,
                                  const int32_t* offsets, Int4Experts down, bf16* choices, void* scratch,
                                  MoeShape shape, int64_t tokens, cudaStream_t stream);
size_t moe_8bit_scratch(MoeShape shape, int64_t tokens);

// Prefill, 5: y = residual + sum of weights * choices + sigmoid(shared_logit) * shared, the sigmoid rounded
// to bfloat16.
//   weights [T, A]; choices [T A, D]; shared [T, D]; shared_logit [T]; residual, y [T, D] (may be the same).
cudaError_t moe_combine(const float* weights, const bf16* choices, const bf16* shared,
                        const float* shared_logit, const bf16* residual, bf16* y, MoeShape shape,
                        int64_t tokens, cudaStream_t stream);

}  // namespace qwen::cuda
