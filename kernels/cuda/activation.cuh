// Sigmoid and silu to float32's precision. Where a kernel's time is in them, it has faster ones of its own.
#pragma once

#include "kernels/cuda/primitives.cuh"

namespace qwen::cuda {

__device__ __forceinline__ float sigmoid(float x) { return 1.0F / (1.0F + expf(-x)); }
__device__ __forceinline__ float silu(float x) { return x / (1.0F + expf(-x)); }

}  // namespace qwen::cuda
