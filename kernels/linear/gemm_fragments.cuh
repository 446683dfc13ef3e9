// Tensor-core operands of prefill's products: weights dequantized, and their product with tokens in shared
// memory by mma.sync.
#pragma once

#include "kernels/linear/gemm_tile.cuh"

namespace qwen::cuda::gemm {

// Codes p and p + 4 of a word, times their row's scale.
__device__ __forceinline__ uint32_t dequantize(uint32_t word, int p, __nv_bfloat162 scale) {
  const uint32_t biased = biased_codes(word, p);
  const uint32_t bias = 0x43084308U;  // 136, 136
  const __nv_bfloat162 codes =
      __hsub2(reinterpret_cast<const __nv_bfloat162&>(biased), reinterpret_cast<const __nv_bfloat162&>(bias));
  const __nv_bfloat162 product = __hmul2(codes, scale);
  return reinterpret_cast<const uint32_t&>(product);
}

// A lane's fragments of 16 rows by 32 columns: a[k / 16] as mma_bf16 takes them. Words of row r, of row r + 8
// (of the lane), and their scales.
__device__ __forceinline__ void dequantize_half(uint32_t (&a)[2][4], uint32_t first, uint32_t eighth,
                                                uint32_t scales) {
  const __nv_bfloat162 both = reinterpret_cast<const __nv_bfloat162&>(scales);
  const __nv_bfloat162 low = __low2bfloat162(both);
  const __nv_bfloat162 high = __high2bfloat162(both);
#pragma unroll
  for (int block = 0; block < 2; ++block) {
    a[block][0] = dequantize(first, 2 * block, low);
    a[block][1] = dequantize(eighth, 2 * block, high);
    a[block][2] = dequantize(first, 2 * block + 1, low);
    a[block][3] = dequantize(eighth, 2 * block + 1, high);
  }
}

// The same in three quarters of the instructions, and a constant factor smaller, so that any scale of a model
// fits: a code, plus 8, as bits 4 to 7 of a bfloat16 is 2^-129 times as many, a denormal number or the first
// after those. One fma makes the product with the scale of it, rounded once, as is the product of the code.
inline constexpr float kDequantizedLess = 256;

struct Scales {
  __device__ __forceinline__ explicit Scales(uint32_t scales) {
    const uint32_t large = 0x7c007c00U;  // 2^121
    const uint32_t eight = 0xbd00bd00U;  // -8 / 256
    const __nv_bfloat162 both = reinterpret_cast<const __nv_bfloat162&>(scales);
    factor = __hmul2(both, reinterpret_cast<const __nv_bfloat162&>(large));
    offset = __hmul2(both, reinterpret_cast<const __nv_bfloat162&>(eight));
  }
  __nv_bfloat162 factor;
  __nv_bfloat162 offset;
};

__device__ __forceinline__ void dequantize_half_less(uint32_t (&a)[2][4], uint32_t first, uint32_t eighth,
                                                     const Scales& scales) {
  const auto make = [](uint32_t word, __nv_bfloat162 factor, __nv_bfloat162 offset) {
    const uint32_t code = and_xor(word, 0x00f000f0U, 0x00800080U);
    const __nv_bfloat162 product = __hfma2(reinterpret_cast<const __nv_bfloat162&>(code), factor, offset);
    return reinterpret_cast<const uint32_t&>(product);
  };
  const auto low = [&](uint32_t word) {
    return make(word, __low2bfloat162(scales.factor), __low2bfloat162(scales.offset));
  };
  const auto high = [&](uint32_t word) {
    return make(word, __high2bfloat162(scales.factor), __high2bfloat162(scales.offset));
  };
#pragma unroll
  for (int block = 0; block < 2; ++block) {
    const uint32_t p = first >> (8 * block);
    const uint32_t q = eighth >> (8 * block);
    a[block][0] = low(p << 4);
    a[block][1] = high(q << 4);
    a[block][2] = low(p);
    a[block][3] = high(q);
  }
}

// acc += a x^T for 32 columns of a stage of tokens [kTokens][64], chunks of 16 bytes swizzled by the row.
template <int kRowTiles, int kTokens>
__device__ __forceinline__ void multiply_half(float (&acc)[kRowTiles][kTokens / 8][4],
                                              const uint32_t (&a)[kRowTiles][2][4],
                                              const unsigned char* tokens, int half) {
  const int lane = threadIdx.x % 32;
  const int row = lane % 8 + lane / 16 * 8;  // of sixteen tokens
#pragma unroll
  for (int block = 0; block < 2; ++block) {
    const int chunk = (4 * half + 2 * block + lane / 8 % 2) ^ (lane % 8);
#pragma unroll
    for (int j = 0; j < kTokens / 16; ++j) {
      uint32_t b[4];
      load_matrix_x4(b, tokens + (16 * j + row) * kRowBytes + chunk * 16);
      const uint32_t first[2] = {b[0], b[1]};
      const uint32_t second[2] = {b[2], b[3]};
#pragma unroll
      for (int i = 0; i < kRowTiles; ++i) {
        mma_bf16(acc[i][2 * j], a[i][block], first);
        mma_bf16(acc[i][2 * j + 1], a[i][block], second);
      }
    }
  }
}

}  // namespace qwen::cuda::gemm
