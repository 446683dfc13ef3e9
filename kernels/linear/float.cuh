// What prefill's products with small bfloat16 matrices (float.cu) have in common.
#pragma once

#include "kernels/cuda/primitives.cuh"

namespace qwen::cuda::small {

// y = x W^T. Row N of W, if there is one, lies by itself, and so does its column of y.
struct Arguments {
  const bf16* x;       // [T, K]
  const bf16* w;       // [N, K]
  const bf16* last_w;  // [K], row N, or null
  float* y;            // [T, N], rounded to bfloat16
  float* last_y;       // [T]
  int tokens;
  int k;
  int n;

  __host__ __device__ int rows() const { return n + (last_w != nullptr ? 1 : 0); }
  __device__ __forceinline__ const bf16* weight_row(int feature) const {
    return feature == n ? last_w : w + static_cast<size_t>(feature) * k;
  }
  __device__ __forceinline__ void write(int token, int feature, float value) const {
    if (token >= tokens || feature >= rows()) return;
    float* const to = feature < n ? y + static_cast<size_t>(token) * n + feature : last_y + token;
    *to = round_bf16(value);
  }
};

}  // namespace qwen::cuda::small
