// Sigmoid and silu to float32's precision, and a silu to a few units of it in a third of the instructions,
// for what every block repeats or waits for. Kernels have others of their own.
#pragma once

#include "kernels/cuda/primitives.cuh"

namespace qwen::cuda {

__device__ __forceinline__ float sigmoid(float x) { return 1.0F / (1.0F + expf(-x)); }
__device__ __forceinline__ float silu(float x) { return x / (1.0F + expf(-x)); }
__device__ __forceinline__ float fast_silu(float x) { return __fdividef(x, 1.0F + __expf(-x)); }

}  // namespace qwen::cuda
