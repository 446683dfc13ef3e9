// The inverse of a chunk's lower triangular matrix, in shared memory.
#pragma once

#include "kernels/gated_delta/prefill_tiles.cuh"

namespace qwen::cuda {

// Row stride in floats: a column of four rows by eight, and a row of eight by four, are then in different
// banks.
inline constexpr int kInverseStride = 68;

// c [16, 8] of float32 a [16, k_begin..k_end] b [k_begin..k_end, 8] by a warp. Factors are rounded to tf32:
// the inverse is stored no more exactly.
__device__ __forceinline__ void multiply_tile(float (&c)[4], const float* a, const float* b, int k_begin,
                                              int k_end, int lane) {
  const auto tf32 = [](float x) { return __float_as_uint(x) + 0x1000U; };
  const int r = lane / 4;
  const int q = lane % 4;
#pragma unroll 2
  for (int k = k_begin; k < k_end; k += 8) {
    const float* left = a + r * kInverseStride + k + q;
    const float* right = b + (k + q) * kInverseStride + r;
    const uint32_t left_operand[4] = {tf32(left[0]), tf32(left[8 * kInverseStride]), tf32(left[4]),
                                      tf32(left[8 * kInverseStride + 4])};
    const uint32_t right_operand[2] = {tf32(right[0]), tf32(right[4 * kInverseStride])};
    mma_tf32(c, left_operand, right_operand);
  }
}

// Replaces the 64 by 64 matrix A, of which only what is strictly below the diagonal counts, by the inverse of
// I + A on and below the diagonal's tiles of 16 by 16. Those are inverted by substitution; then, twice, pairs
// of neighbours [[X, 0], [A, Y]] are joined: the corner becomes -Y A X, with A X where the zeros were. By
// eight warps, of which `warp` is one, where `takes_part`; all threads of the block call it. Ends with a
// barrier.
__device__ __forceinline__ void invert(float* m, bool takes_part, int warp, int lane) {
  if (takes_part && warp < 2) {
    const int tile = (warp * 32 + lane) / 16 * 16;
    const int column = lane % 16;
    const float* rows = m + tile * kInverseStride + tile;
    float x[16];
#pragma unroll
    for (int i = 0; i < 16; ++i) {
      // Four sums, for short chains.
      float sums[4] = {};
#pragma unroll
      for (int k = 0; k < i; k += 4) {
        const float4 a = *reinterpret_cast<const float4*>(rows + i * kInverseStride + k);
        sums[0] += a.x * x[k];
        if (k + 1 < i) sums[1] += a.y * x[k + 1];
        if (k + 2 < i) sums[2] += a.z * x[k + 2];
        if (k + 3 < i) sums[3] += a.w * x[k + 3];
      }
      x[i] = (i == column ? 1.0F : 0.0F) - ((sums[0] + sums[1]) + (sums[2] + sums[3]));
    }
    __syncwarp();
#pragma unroll
    for (int i = 0; i < 16; ++i) m[(tile + i) * kInverseStride + tile + column] = x[i];
  }
  __syncthreads();
  const int r = lane / 4;
  const int q = lane % 4;
#pragma unroll
  for (int size = 16; size < kChunk; size *= 2) {
    // Tiles of 16 by 8 of all corners of this size, one a warp.
    const int columns = size / 8;
    const int tiles = kChunk / (2 * size) * (size / 16) * columns;
    const int corner = warp / (size / 16 * columns) * 2 * size;
    const int row = warp / columns % (size / 16) * 16;
    const int column = warp % columns * 8;
    float* const above = m + corner * kInverseStride + corner;
    float* const own = m + (corner + size) * kInverseStride + corner;
    const float* const beside = own + size;
    float* const product = above + size;
    const auto store = [&](float* to, const float (&c)[4]) {
      to += (row + r) * kInverseStride + column + 2 * q;
      *reinterpret_cast<float2*>(to) = {c[0], c[1]};
      *reinterpret_cast<float2*>(to + 8 * kInverseStride) = {c[2], c[3]};
    };
    const bool has_tile = takes_part && warp < tiles;
    if (has_tile) {
      // X and Y are zero above the diagonal: from tile (column / 16, column / 16), to tile (row / 16, row /
      // 16).
      float c[4] = {};
      multiply_tile(c, own + row * kInverseStride, above + column, column / 16 * 16, size, lane);
      store(product, c);
    }
    __syncthreads();
    if (has_tile) {
      float c[4] = {};
      multiply_tile(c, beside + row * kInverseStride, product + column, 0, row + 16, lane);
      for (float& x : c) x = -x;
      store(own, c);
    }
    __syncthreads();
  }
}

}  // namespace qwen::cuda
