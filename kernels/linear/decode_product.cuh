// The tensor cores' product of a warp's slice (decode_slice.cuh), and the sum of the warps' products.
#pragma once

#include "kernels/linear/decode_slice.cuh"

namespace qwen::cuda {

// The product of one tile row with up to eight rows of x: lane (r, q) has W's rows r and r + 8 times x's rows
// q and q + 4.
struct TileSums {
  float of[2][2] = {};  // [q or q + 4, r or r + 8]
};

// A warp's slice of x as the tensor cores' B operands. Lanes of absent rows have the last one's, whose
// products are never used.
template <int kGroup, int kUnits, int kMaxRows>
struct Fragments {
  using S = Slice<kGroup, kUnits>;

  uint32_t words[S::kWords];  // of digit r % 2 of row r / 2
  const uint2* more;  // the same of row r / 2 + 4, in shared memory; null: there are four rows or less
  float scales[2];    // of the rows q and q + 4

  // From what load_slice left, which stays in use where there are more than four rows.
  __device__ __forceinline__ void read(const unsigned char* from, int rows) {
    const int lane = static_cast<int>(threadIdx.x % 32);
    const auto words_of = [&](int row) {
      return from + 4 * ((min(row, rows - 1) * 2 + lane / 4 % 2) * S::kDigitWords + lane % 4 * S::kWords);
    };
#pragma unroll
    for (int i = 0; i < S::kWords / 4; ++i) {
      const uint4 v = reinterpret_cast<const uint4*>(words_of(lane / 8))[i];
      words[4 * i] = v.x;
      words[4 * i + 1] = v.y;
      words[4 * i + 2] = v.z;
      words[4 * i + 3] = v.w;
    }
    more = kMaxRows > 4 && rows > 4 ? reinterpret_cast<const uint2*>(words_of(lane / 8 + 4)) : nullptr;
    const float* all_scales = reinterpret_cast<const float*>(from + rows * 8 * S::kDigitWords);
    scales[0] = all_scales[min(lane % 4, rows - 1)];
    scales[1] = all_scales[min(lane % 4 + 4, rows - 1)];
  }

  // W x^T of kItems tile rows that copy_item brought.
  template <int kItems>
  __device__ __forceinline__ void multiply(TileSums (&sums)[kItems],
                                           const unsigned char* const (&items)[kItems]) const {
    if (kMaxRows > 4 && more != nullptr) {
#pragma unroll
      for (int i = 0; i < kItems; ++i) {
        const unsigned char* const item[1] = {items[i]};
        multiply_halves<1, 2>(reinterpret_cast<TileSums(&)[1]>(sums[i]), item);
      }
    } else {
      multiply_halves<kItems, 1>(sums, items);
    }
  }

 private:
  template <int kItems, int kHalves>
  __device__ __forceinline__ void multiply_halves(TileSums (&sums)[kItems],
                                                  const unsigned char* const (&items)[kItems]) const {
    const int lane = static_cast<int>(threadIdx.x % 32);
    // A product begins with 1.5 * 2^23's bits: a float that much larger then holds it, as it stays below
    // 2^22, where a conversion would take eight times as long.
    constexpr int32_t kShiftBits = 0x4b400000;
    constexpr float kShift = 12582912.0F;
    int32_t products[kItems][kHalves][4];
#pragma unroll
    for (int i = 0; i < kItems; ++i) {
#pragma unroll
      for (int half = 0; half < kHalves; ++half) {
#pragma unroll
        for (int c = 0; c < 4; ++c) products[i][half][c] = kShiftBits;
      }
    }
#pragma unroll
    for (int j = 0; j < S::kTiles; ++j) {
      uint4 w[kItems];
#pragma unroll
      for (int i = 0; i < kItems; ++i) w[i] = *reinterpret_cast<const uint4*>(items[i] + j * 512 + lane * 16);
#pragma unroll
      for (int s = 0; s < 2; ++s) {  // 32 columns each
#pragma unroll
        for (int i = 0; i < kItems; ++i) {
          const uint32_t row = s == 0 ? w[i].x : w[i].y;
          const uint32_t row8 = s == 0 ? w[i].z : w[i].w;
          const uint32_t a[4] = {row << 4 & 0xf0f0f0f0U, row8 << 4 & 0xf0f0f0f0U, row & 0xf0f0f0f0U,
                                 row8 & 0xf0f0f0f0U};
#pragma unroll
          for (int half = 0; half < kHalves; ++half) {
            const uint2 later = half == 0 ? uint2{} : more[2 * j + s];
            const uint32_t b[2] = {half == 0 ? words[4 * j + 2 * s] : later.x,
                                   half == 0 ? words[4 * j + 2 * s + 1] : later.y};
            mma_s8(products[i][half], a, b);
          }
        }
        const int columns = 64 * j + 32 * (s + 1);
        if (columns % kGroup != 0) continue;
        // The group's scale of the weights.
#pragma unroll
        for (int i = 0; i < kItems; ++i) {
          const uint32_t scale = reinterpret_cast<const uint32_t*>(
              items[i] + S::kTileBytes)[(columns / kGroup - 1) * 8 + lane / 4];
#pragma unroll
          for (int half = 0; half < kHalves; ++half) {
            int32_t (&c)[4] = products[i][half];
            const auto digit = [&](int n) { return __int_as_float(c[n]) - kShift; };
            sums[i].of[half][0] += low_bf16(scale) * (digit(0) * 256.0F + digit(1));
            sums[i].of[half][1] += high_bf16(scale) * (digit(2) * 256.0F + digit(3));
            c[0] = c[1] = c[2] = c[3] = kShiftBits;
          }
        }
      }
    }
#pragma unroll
    for (int i = 0; i < kItems; ++i) {
#pragma unroll
      for (int half = 0; half < kHalves; ++half) {
        sums[i].of[half][0] *= scales[half];
        sums[i].of[half][1] *= scales[half];
      }
    }
  }
};

// The product of 16 rows of bfloat16 weights that copy_item brought with the slice of x that load_slice left
// as bfloat16, as TileSums has it.
template <int kGroup, int kUnits>
__device__ __forceinline__ TileSums multiply_bf16(const unsigned char* x, const unsigned char* item,
                                                  int rows) {
  using S = Slice<kGroup, kUnits>;
  const int lane = static_cast<int>(threadIdx.x % 32);
  const unsigned char* weights = item + lane % 16 * S::kBf16RowBytes + lane / 16 * 16;
  // The product's column 2q is row q of x, 2q + 1 row q + 4.
  const int row = lane % 8 / 2 + lane % 2 * 4;
  const unsigned char* columns = x + min(row, rows - 1) * S::kBf16RowBytes + lane / 8 * 16;
  float c[4] = {};
#pragma unroll
  for (int i = 0; i < S::kColumns / 32; ++i) {
    uint32_t b[4];
    load_matrix_x4(b, columns + i * 64);
#pragma unroll
    for (int s = 0; s < 2; ++s) {
      uint32_t a[4];
      load_matrix_x4(a, weights + i * 64 + s * 32);
      const uint32_t pair[2] = {b[2 * s], b[2 * s + 1]};
      mma_bf16(c, a, pair);
    }
  }
  TileSums sums;
  sums.of[0][0] = c[0];
  sums.of[1][0] = c[1];
  sums.of[0][1] = c[2];
  sums.of[1][1] = c[3];
  return sums;
}

// The sums of a tile row by all warps in shared memory: [rows, 16] of kSumStride floats, a warp's each. The
// stride keeps both its writes and the reads below off one another's banks.
inline constexpr int kSumStride = kDecodeWarps + 4;

__device__ __forceinline__ void store_sums(float* of_tile, const TileSums& sums, int rows) {
  const int lane = static_cast<int>(threadIdx.x % 32);
  const int warp = static_cast<int>(threadIdx.x / 32);
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    const int row = half * 4 + lane % 4;
    if (row >= rows) continue;
    float* of_row = of_tile + (row * 16 + lane / 4) * kSumStride + warp;
    of_row[0] = sums.of[half][0];
    of_row[8 * kSumStride] = sums.of[half][1];
  }
}

// The sum of kDecodeWarps floats, always in the same order.
__device__ __forceinline__ float sum_over_warps(const float* of_warps) {
  float4 v[kDecodeWarps / 4];
#pragma unroll
  for (int i = 0; i < kDecodeWarps / 4; ++i) v[i] = reinterpret_cast<const float4*>(of_warps)[i];
  float sums[kDecodeWarps / 4];
#pragma unroll
  for (int i = 0; i < kDecodeWarps / 4; ++i) sums[i] = (v[i].x + v[i].y) + (v[i].z + v[i].w);
  static_assert(kDecodeWarps == 16);
  return (sums[0] + sums[1]) + (sums[2] + sums[3]);
}

}  // namespace qwen::cuda
