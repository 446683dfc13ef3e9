// The norms as kernels of their own, for prefill; decode has them in the prologue of the product that
// follows.
#pragma once

#include "kernels/cuda/types.h"

namespace qwen::cuda {

// y = norm(x). x, y [T, D] (may be the same).
cudaError_t rms_norm(const bf16* x, RmsNorm norm, bf16* y, int64_t tokens, int d, cudaStream_t stream);

// y = x / rms(x) * weight * silu(gate) over each head of `dim` elements: Qwen3_5MoeRMSNormGated. x [T, H,
// dim] float32, gate [T, gate_stride] with the heads in its first H * dim columns, weight [dim], y [T, H *
// dim]. The normalized value is rounded to bfloat16 before the weight, as norm/reference.py does.
cudaError_t gated_rms_norm(const float* x, const bf16* gate, int64_t gate_stride, const bf16* weight,
                           float eps, bf16* y, int64_t tokens, int heads, int dim, cudaStream_t stream);

}  // namespace qwen::cuda
