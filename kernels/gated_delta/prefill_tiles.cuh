// Prefill's tensor-core products: float16 matrices in shared memory as their operands, and where a chunk's
// matrices are kept between its kernels.
//
// float16, not bfloat16: where keys resemble each other the results are small differences of sums over a
// chunk, and bfloat16's rounding of one factor shows there (1 % of the output). All factors are within its
// range: keys and queries are normalized, the inverse and P are at most 1, and values that are not, in 65504,
// are cut off.
#pragma once

#include <cuda_fp16.h>

#include "kernels/cuda/primitives.cuh"
#include "kernels/gated_delta/cuda.h"

namespace qwen::cuda {

inline constexpr int kChunk = 64;  // tokens

// A pair of float16, `low` in the low half, and the product of tensor cores as mma_bf16.
#ifdef QWEN_CUDA_EMULATION
namespace emulated {
inline double f16_element(uint32_t word, int i) {
  return __half2float(__ushort_as_half(static_cast<unsigned short>(word >> (16 * i))));
}
}  // namespace emulated
inline uint32_t pack_f16(float low, float high) {
  const auto bits = [](float x) -> uint32_t {
    return __half_as_ushort(__float2half_rn(fminf(fmaxf(x, -65504.0F), 65504.0F)));
  };
  return bits(low) | bits(high) << 16;
}
inline void mma_f16(float (&c)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
  emulated::Product<float> product = {c, a, b};
  emulated::warp_operation("mma_f16", ~0U,
                           &emulated::combine_products<float, double, 2, emulated::f16_element>, &product);
}
#else
__device__ __forceinline__ uint32_t pack_f16(float low, float high) {
  uint32_t pair;
  asm("cvt.rn.satfinite.f16x2.f32 %0, %1, %2;" : "=r"(pair) : "f"(high), "f"(low));
  return pair;
}
__device__ __forceinline__ void mma_f16(float (&c)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
  asm volatile(
      "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
      "{%0, %1, %2, %3};"
      : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}
#endif

// Where element (row, column) of a row-major matrix [64, kColumns] of 16-bit elements is. Pieces of 16 bytes
// are permuted so that the same piece of eight consecutive rows lies in all banks; of more than 64 columns,
// the first 64 come first, so that a row is always a line of them.
template <int kColumns>
__device__ __forceinline__ unsigned swizzled(unsigned row, unsigned column) {
  if constexpr (kColumns > 64) return column / 64 * (kChunk * 64) + swizzled<64>(row, column % 64);
  constexpr unsigned kPieces = kColumns / 8;
  constexpr unsigned kRowsALine = kPieces >= 8 ? 1 : 8 / kPieces;
  constexpr unsigned kMask = (kPieces >= 8 ? 8 : kPieces) - 1;
  const unsigned piece = (column / 8) ^ ((row / kRowsALine) & kMask);
  return row * kColumns + piece * 8 + column % 8;
}

// Operands of a product from matrices [.., kColumns] of 16-bit elements in shared memory; a: 16 by 16, b: 16
// (along k) by 16, for two products. `lane` is the thread's in its warp.

// a(i, k) = m(row + i, column + k)
template <int kColumns>
__device__ __forceinline__ void load_a(uint32_t (&a)[4], const uint16_t* m, unsigned row, unsigned column,
                                       unsigned lane) {
  load_matrix_x4(a, m + swizzled<kColumns>(row + lane % 16, column + lane / 16 * 8));
}
// a(i, k) = m(row + k, column + i)
template <int kColumns>
__device__ __forceinline__ void load_a_transposed(uint32_t (&a)[4], const uint16_t* m, unsigned row,
                                                  unsigned column, unsigned lane) {
  load_matrix_x4_transposed(
      a, m + swizzled<kColumns>(row + lane % 8 + lane / 16 * 8, column + lane / 8 % 2 * 8));
}
// b[j](k, n) = m(row + k, column + 8 j + n)
template <int kColumns>
__device__ __forceinline__ void load_b(uint32_t (&b)[2][2], const uint16_t* m, unsigned row, unsigned column,
                                       unsigned lane) {
  uint32_t r[4];
  load_matrix_x4_transposed(r, m + swizzled<kColumns>(row + lane % 16, column + lane / 16 * 8));
  b[0][0] = r[0];
  b[0][1] = r[1];
  b[1][0] = r[2];
  b[1][1] = r[3];
}
// b[j](k, n) = m(row + 8 j + n, column + k)
template <int kColumns>
__device__ __forceinline__ void load_b_of_rows(uint32_t (&b)[2][2], const uint16_t* m, unsigned row,
                                               unsigned column, unsigned lane) {
  uint32_t r[4];
  load_matrix_x4(r, m + swizzled<kColumns>(row + lane % 8 + lane / 16 * 8, column + lane / 8 % 2 * 8));
  b[0][0] = r[0];
  b[0][1] = r[1];
  b[1][0] = r[2];
  b[1][1] = r[3];
}

// Four consecutive elements in one store.
__device__ __forceinline__ void store4(uint16_t* to, uint32_t first_pair, uint32_t second_pair) {
  *reinterpret_cast<uint64_t*>(to) = first_pair | static_cast<uint64_t>(second_pair) << 32;
}

// A lower triangular [64, 64] as its ten tiles of 16 by 16 on and below the diagonal, row after row, each in
// the order in which a warp's lanes have it as an operand, a uint4 a lane.
inline constexpr int kTriangleTiles = 10;
__device__ __forceinline__ constexpr int triangle_tile(int row, int column) {
  return row * (row + 1) / 2 + column;
}

// What the state's update takes of a value head's chunk. With g the logarithm of decay, summed from the
// chunk's first token:
struct StateGates {
  uint4 inverse[kTriangleTiles][32];  // of I + A, as b: its rows are n, its columns k
  float beta[kChunk];
  float beta_kept[kChunk];  // beta exp(g)
  float left[kChunk];       // exp(g_last - g)
  float kept_last[4];       // exp(g_last), four times
};
// And what the output takes.
struct OutputGates {
  uint4 mixing[kTriangleTiles][32];  // q k^T with decay, as a
  float kept[kChunk];                // exp(g)
};

// What prepare_chunks leaves for scan_chunks, for each chunk. Rows past the last token are zero. Matrices
// have the pieces of their rows where shared memory has them (swizzled).
struct PrefillChunks {
  uint16_t* q;          // float16 [chunks, Hk, 64, Dk] normalized, times Dk^-0.5
  uint16_t* k;          // float16 [chunks, Hk, 64, Dk] normalized
  uint16_t* v;          // bfloat16 [chunks, Hv, Dv / 16, 64, 16]
  StateGates* state;    // [chunks, Hv]
  OutputGates* output;  // [chunks, Hv]
  size_t bytes;         // of all

  PrefillChunks(void* scratch, const DeltaShape& shape, int64_t chunks) {
    auto* next = static_cast<unsigned char*>(scratch);
    const auto take = [&]<typename T>(T*& array, int64_t elements) {
      array = reinterpret_cast<T*>(next);
      next += elements * sizeof(T);
    };
    take(q, chunks * shape.key_heads * kChunk * shape.key_dim);
    take(k, chunks * shape.key_heads * kChunk * shape.key_dim);
    take(v, chunks * shape.value_heads * kChunk * shape.value_dim);
    take(state, chunks * shape.value_heads);
    take(output, chunks * shape.value_heads);
    bytes = next - static_cast<unsigned char*>(scratch);
  }
};

}  // namespace qwen::cuda
