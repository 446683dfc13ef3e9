// What decode makes of several results of one head, each of some of the keys.
#pragma once

#include "kernels/attention/heads.cuh"

namespace qwen::cuda {

inline constexpr float kMasked = -INFINITY;

// Maxima are of scores times log2(e), sums and results relative to them.
struct Extent {
  float maximum;
  float sum;
};

__device__ __forceinline__ void add_scaled(float4& sum, float scale, const float4& v) {
  sum.x += scale * v.x;
  sum.y += scale * v.y;
  sum.z += scale * v.z;
  sum.w += scale * v.w;
}

__device__ __forceinline__ uint32_t gate_factors(uint32_t pair) {
  return pack_bf16(gate_factor(low_bf16(pair)), gate_factor(high_bf16(pair)));
}
__device__ __forceinline__ uint32_t product(uint32_t a, uint32_t b) {
  return pack_bf16(low_bf16(a) * low_bf16(b), high_bf16(a) * high_bf16(b));
}

// gate: its factors.
__device__ __forceinline__ void store_output(bf16* out, const uint2& gate, const float4& v, float sum) {
  const float scale = __fdividef(1.0F, sum);
  *reinterpret_cast<uint2*>(out) = {product(pack_bf16(v.x * scale, v.y * scale), gate.x),
                                    product(pack_bf16(v.z * scale, v.w * scale), gate.y)};
}

// What several results of one head come to, taken kBatch at a time.
struct Total {
  float4 result = {0, 0, 0, 0};
  Extent extent = {kMasked, 0};

  template <int kBatch>
  __device__ __forceinline__ void add(const Extent (&extents)[kBatch], const float4 (&results)[kBatch]) {
    float maximum = extent.maximum;
#pragma unroll
    for (int i = 0; i < kBatch; ++i) maximum = fmaxf(maximum, extents[i].maximum);
    const float before = exp2f(extent.maximum - maximum);
    extent = {maximum, extent.sum * before};
    const float4 old = result;
    result = {0, 0, 0, 0};
    add_scaled(result, before, old);
#pragma unroll
    for (int i = 0; i < kBatch; ++i) {
      const float scale = exp2f(extents[i].maximum - maximum);
      extent.sum += scale * extents[i].sum;
      add_scaled(result, scale, results[i]);
    }
  }
};

// Whether this thread is the last of `count` to get here: it then sees what the others' blocks wrote before a
// barrier before it. `counter` is zero before the first and after the last.
#ifdef QWEN_CUDA_EMULATION
inline bool arrives_last(uint32_t* counter, uint32_t count) {
  return atomicInc(counter, count - 1) == count - 1;
}
#else
__device__ __forceinline__ bool arrives_last(uint32_t* counter, uint32_t count) {
  uint32_t before;
  asm volatile("atom.acq_rel.gpu.global.inc.u32 %0, [%1], %2;"
               : "=r"(before)
               : "l"(counter), "r"(count - 1)
               : "memory");
  return before == count - 1;
}
#endif

}  // namespace qwen::cuda
