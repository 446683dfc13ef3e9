// The scalar functions around the delta rule, in float32.
#pragma once

#include "kernels/cuda/primitives.cuh"

namespace qwen::cuda {

inline constexpr float kL2Epsilon = 1e-6F;

// Results under 2^-126 are zero: without their handling an exponential is two instructions and a quotient
// three.
#ifdef QWEN_CUDA_EMULATION
inline float fast_exp2(float x) { return exp2f(x); }
inline float fast_reciprocal(float x) { return 1.0F / x; }
inline float fast_rsqrt(float x) { return 1.0F / sqrtf(x); }
#else
__device__ __forceinline__ float fast_exp2(float x) {
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}
__device__ __forceinline__ float fast_reciprocal(float x) {
  float y;
  asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}
__device__ __forceinline__ float fast_rsqrt(float x) {
  float y;
  asm("rsqrt.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}
#endif
__device__ __forceinline__ float fast_exp(float x) { return fast_exp2(x * 1.44269504F); }

__device__ __forceinline__ float fast_silu(float x) { return x * fast_reciprocal(1.0F + fast_exp(-x)); }

__device__ __forceinline__ float fast_sigmoid(float x) { return fast_reciprocal(1.0F + expf(-x)); }

// The logarithm of what a token leaves of the state. softplus is torch's: the identity above 20.
__device__ __forceinline__ float log_decay(float a, float a_log, float dt_bias) {
  const float x = a + dt_bias;
  return -expf(a_log) * (x > 20.0F ? x : log1pf(expf(x)));
}

}  // namespace qwen::cuda
