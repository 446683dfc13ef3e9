// Prefill's attention where the blocks of a cluster have the same rows, and each a part of the context: they
// add up their results out of each other's shared memory.
#pragma once

#include "kernels/attention/prefill_products.cuh"
#include "kernels/attention/prefill_ring.cuh"
#include "kernels/cuda/cluster.cuh"

#if QWEN_WGMMA

namespace qwen::cuda::prefill_attention {

__device__ __forceinline__ uint32_t address_in_block(const void* shared, int rank) {
  uint32_t there;
  asm volatile("mapa.shared::cluster.u32 %0, %1, %2;" : "=r"(there) : "r"(shared_address(shared)), "r"(rank));
  return there;
}
__device__ __forceinline__ float4 load_16_of_block(uint32_t address) {
  float4 v;
  asm volatile("ld.shared::cluster.v4.f32 {%0, %1, %2, %3}, [%4];"
               : "=f"(v.x), "=f"(v.y), "=f"(v.z), "=f"(v.w)
               : "r"(address)
               : "memory");
  return v;
}
__device__ __forceinline__ float2 load_8_of_block(uint32_t address) {
  float2 v;
  asm volatile("ld.shared::cluster.v2.f32 {%0, %1}, [%2];" : "=f"(v.x), "=f"(v.y) : "r"(address) : "memory");
  return v;
}

// Where a part's float32 results have a row's chunk of 8 columns.
template <typename P>
__device__ __forceinline__ int part_offset(int row, int chunk) {
  return row * P::kDim + (chunk ^ row % 8) * 8;
}

// Adds up the parts of this block's share of the rows, which lie in the cluster's blocks' `results` and
// `scales` (maximum and sum), and writes them.
template <typename P>
__device__ __forceinline__ void add_parts(const Arguments& a, const float* results, const float2* scales,
                                          int parts, int blocks, int first_row, int end_row, int key_head,
                                          int heads, int warp, int lane) {
  const int dim = a.shape.head_dim;
  const int share = (P::kRows + blocks - 1) / blocks;
  const int begin = static_cast<int>(blockIdx.x) % blocks * share;
  const int end = min(min(begin + share, P::kRows), end_row - first_row);
#pragma unroll 1
  for (int row = begin + warp; row < end; row += P::kWarps) {
    if (8 * lane >= dim) break;
    const int64_t token = (first_row + row) / heads;
    const int head = key_head * heads + (first_row + row) % heads;
    const uint4 gates = load_16(a.qkv + token * a.shape.row_size() + (2 * head + 1) * dim + 8 * lane);
    float2 scale[P::kMostParts];
    float top = -INFINITY;
#pragma unroll
    for (int part = 0; part < P::kMostParts; ++part) {
      if (part >= parts) break;
      scale[part] = load_8_of_block(address_in_block(scales + row, part));
      top = fmaxf(top, scale[part].x);
    }
    float v[8] = {};
    float sum = 0;
#pragma unroll
    for (int part = 0; part < P::kMostParts; ++part) {
      if (part >= parts) break;
      const float weight = power_of_2(scale[part].x - top);
      sum = fmaf(scale[part].y, weight, sum);
      const uint32_t from = address_in_block(results + part_offset<P>(row, lane), part);
      const float4 low = load_16_of_block(from);
      const float4 high = load_16_of_block(from + 16);
      v[0] = fmaf(low.x, weight, v[0]), v[1] = fmaf(low.y, weight, v[1]);
      v[2] = fmaf(low.z, weight, v[2]), v[3] = fmaf(low.w, weight, v[3]);
      v[4] = fmaf(high.x, weight, v[4]), v[5] = fmaf(high.y, weight, v[5]);
      v[6] = fmaf(high.z, weight, v[6]), v[7] = fmaf(high.w, weight, v[7]);
    }
    const float factor = __fdividef(1.0F, sum);
#pragma unroll
    for (float& x : v) x *= factor;
    store_16(a.out + (token * a.shape.query_heads + head) * dim + 8 * lane, gate_all(v, gates));
  }
}

}  // namespace qwen::cuda::prefill_attention

#endif  // QWEN_WGMMA
