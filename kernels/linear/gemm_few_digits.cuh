// The integers that multiply_few multiplies (gemm_few.cuh), as a decode step does (linear/decode_slice.cuh):
// codes times 16, and values of x as two digits, 256 high + low.
#pragma once

#include "kernels/linear/decode_input.cuh"

namespace qwen::cuda::gemm {

// A row of x as two digits of 8 bits, by one warp: the operands of columns 2 (t % 4) (the high digit) and 2
// (t % 4) + 1 of four tokens' products. Lane l = 4 r + q has for its column r and 64 columns of x 16 bytes:
// for each 32, its two registers. Returns the scale of the digits' product with 16 times a code.
__device__ __forceinline__ float store_digits(unsigned char* to, int tile_bytes, const bf16* from, int k,
                                              int column_tiles) {
  const int lane = threadIdx.x % 32;
  uint32_t largest = 0;  // shifted left, so without its sign; NaN is above all
#pragma unroll 8
  for (int column = 8 * lane; column < k; column += 256) {
    const uint4 v = *reinterpret_cast<const uint4*>(from + column);
    const auto of = [](uint32_t pair) { return max(pair << 1 & 0xfffe0000U, pair << 17); };
    largest = max(largest, max(max(of(v.x), of(v.y)), max(of(v.z), of(v.w))));
  }
  const float most = __uint_as_float(__reduce_max_sync(~0U, largest) >> 1);
  // 127.5 * 256 would round past the largest digits.
  const float factor = most > 1e-30F ? __fdividef(127.0F * 256.0F, most) : 0.0F;
#pragma unroll 4
  for (int tile = lane / 4; tile < column_tiles; tile += 8) {
    const auto* const words = reinterpret_cast<const uint32_t*>(from + tile * 64) + lane % 4;
    uint2 digits[4];
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const int j = i / 2 * 4 + i % 2;
      const bool inside = tile * 64 + i / 2 * 32 < k;
      const uint32_t low = inside ? words[4 * j] : 0;
      const uint32_t high = inside ? words[4 * j + 8] : 0;
      digits[i] = digits_of({{low_bf16(low), high_bf16(low)}, {low_bf16(high), high_bf16(high)}}, factor);
    }
    unsigned char* const at = to + tile * tile_bytes + lane % 4 * 16;
    *reinterpret_cast<uint4*>(at) = {digits[0].x, digits[1].x, digits[2].x, digits[3].x};
    *reinterpret_cast<uint4*>(at + 64) = {digits[0].y, digits[1].y, digits[2].y, digits[3].y};
  }
  return most * (1.0F / (127.0F * 256.0F * 16.0F));
}

// d = a b + start, as mma_s8.
__device__ __forceinline__ void mma_s8_from(int32_t start, int32_t (&d)[4], const uint32_t (&a)[4],
                                            const uint32_t (&b)[2]) {
#ifdef QWEN_CUDA_EMULATION
  d[0] = d[1] = d[2] = d[3] = start;
  mma_s8(d, a, b);
#else
  asm volatile(
      "mma.sync.aligned.m16n8k32.row.col.s32.s8.s8.s32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
      "{%10, %10, %10, %10};"
      : "=r"(d[0]), "=r"(d[1]), "=r"(d[2]), "=r"(d[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]), "r"(start));
#endif
}

// A product begins with 1.5 * 2^23's bits: a float that much larger then holds it, as it stays below 2^22. A
// conversion of the digits' sum takes fewer instructions, but each as long as eight others.
inline constexpr int32_t kShiftBits = 0x4b400000;
template <bool kConvert>
__device__ __forceinline__ float value_of(int32_t high, int32_t low) {
  if constexpr (kConvert) {
    return static_cast<float>(high * 256 + low);
  } else {
    constexpr float kShift = 12582912.0F;
    return (__int_as_float(high) - kShift) * 256.0F + (__int_as_float(low) - kShift);
  }
}

// A lane's operand of 16 rows by 32 columns: words of rows r and r + 8, codes times 16.
__device__ __forceinline__ void unpack(uint32_t (&a)[4], uint32_t row, uint32_t row8) {
  constexpr uint32_t kCodes = 0xf0f0f0f0U;
  a[0] = row << 4 & kCodes;
  a[1] = row8 << 4 & kCodes;
  a[2] = row & kCodes;
  a[3] = row8 & kCodes;
}

}  // namespace qwen::cuda::gemm
