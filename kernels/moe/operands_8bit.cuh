// Int4 weights as 8-bit operands of the tensor cores, and these operands' product.
#pragma once

#include <cuda_fp8.h>

#include <type_traits>

#include "kernels/cuda/primitives.cuh"
#include "kernels/moe/cuda.h"

namespace qwen::cuda::moe8 {

// Four codes, a byte's low half each, as e4m3 numbers code * 2^-9: sign and magnitude, 0 to 7 of which are
// subnormal and 8 the first that is not. The bytes' high halves are ignored. `signs`: codes' sign bits, in a
// byte's lowest.
__device__ __forceinline__ uint32_t float8_codes(uint32_t codes, uint32_t signs) {
  return and_xor(codes, 0x0f0f0f0fU, signs * 15) + signs * 0x81;
}

// What a product's sums are: of int8 exact, of e4m3 float32 that the tensor cores add up with fewer bits.
template <ExpertActivations kKind>
using Sum = std::conditional_t<kKind == ExpertActivations::kInt8, int32_t, float>;

// A lane's fragment of 16 rows by 32 columns from its words of row r and of row r + 8: 16 times the codes, or
// e4m3 numbers 2^-9 times them.
template <ExpertActivations kKind>
__device__ __forceinline__ void operand_8bit(uint32_t (&a)[4], uint32_t first, uint32_t eighth) {
  if constexpr (kKind == ExpertActivations::kInt8) {
    constexpr uint32_t kHigh = 0xf0f0f0f0U;
    a[0] = first << 4 & kHigh;
    a[1] = eighth << 4 & kHigh;
    a[2] = first & kHigh;
    a[3] = eighth & kHigh;
  } else {
    constexpr uint32_t kLowest = 0x01010101U;
    a[0] = float8_codes(first, first >> 3 & kLowest);
    a[1] = float8_codes(eighth, eighth >> 3 & kLowest);
    a[2] = float8_codes(first >> 4, first >> 7 & kLowest);
    a[3] = float8_codes(eighth >> 4, eighth >> 7 & kLowest);
  }
}

#ifdef QWEN_CUDA_EMULATION
inline double e4m3_element(uint32_t word, int i) {
  __nv_fp8_e4m3 value;
  value.__x = static_cast<__nv_fp8_storage_t>(word >> (8 * i));
  return static_cast<float>(value);
}
#endif

// As mma_s8, of operands of either kind. e4m3: from sm_89 on.
__device__ __forceinline__ void mma_8bit(int32_t (&c)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
  mma_s8(c, a, b);
}
__device__ __forceinline__ void mma_8bit(float (&c)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
#ifdef QWEN_CUDA_EMULATION
  emulated::Product<float> product = {c, a, b};
  emulated::warp_operation("mma_e4m3", ~0U, &emulated::combine_products<float, double, 4, e4m3_element>,
                           &product);
#elif __CUDA_ARCH__ >= 890
  asm volatile(
      "mma.sync.aligned.m16n8k32.row.col.f32.e4m3.e4m3.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
      "{%0, %1, %2, %3};"
      : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
#endif
}

}  // namespace qwen::cuda::moe8
