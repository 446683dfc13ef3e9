// Matrices of bfloat16 in shared memory as tensor-core operands, and where prefill keeps its chunks in
// between.
#pragma once

#include "kernels/cuda/primitives.cuh"
#include "kernels/gated_delta/cuda.h"

namespace qwen::cuda {

inline constexpr int kChunk = 64;  // tokens

// Where element (row, column) of a row-major bfloat16 matrix of kColumns columns is. Pieces of 16 bytes are
// permuted so that the same piece of eight consecutive rows lies in all banks.
template <int kColumns>
__device__ __forceinline__ unsigned swizzled(unsigned row, unsigned column) {
  constexpr unsigned kPieces = kColumns / 8;
  constexpr unsigned kRowsALine = kPieces >= 8 ? 1 : 8 / kPieces;
  constexpr unsigned kMask = (kPieces >= 8 ? 8 : kPieces) - 1;
  const unsigned piece = (column / 8) ^ ((row / kRowsALine) & kMask);
  return row * kColumns + piece * 8 + column % 8;
}

// Operands of mma_bf16 from matrices [.., kColumns] in shared memory; a: 16 by 16, b: 16 (along k) by 16, for
// two products. `lane` is the thread's in its warp.

// a(i, k) = m(row + i, column + k)
template <int kColumns>
__device__ __forceinline__ void load_a(uint32_t (&a)[4], const bf16* m, unsigned row, unsigned column,
                                       unsigned lane) {
  load_matrix_x4(a, m + swizzled<kColumns>(row + lane % 16, column + lane / 16 * 8));
}
// a(i, k) = m(row + k, column + i)
template <int kColumns>
__device__ __forceinline__ void load_a_transposed(uint32_t (&a)[4], const bf16* m, unsigned row,
                                                  unsigned column, unsigned lane) {
  load_matrix_x4_transposed(
      a, m + swizzled<kColumns>(row + lane % 8 + lane / 16 * 8, column + lane / 8 % 2 * 8));
}
// b[j](k, n) = m(row + k, column + 8 j + n)
template <int kColumns>
__device__ __forceinline__ void load_b(uint32_t (&b)[2][2], const bf16* m, unsigned row, unsigned column,
                                       unsigned lane) {
  uint32_t r[4];
  load_matrix_x4_transposed(r, m + swizzled<kColumns>(row + lane % 16, column + lane / 16 * 8));
  b[0][0] = r[0];
  b[0][1] = r[1];
  b[1][0] = r[2];
  b[1][1] = r[3];
}
// b[j](k, n) = m(row + t, column + k) for the token t = 4 (n / 2) + 2 j + n % 2: then a lane's two pairs of
// a product's columns, 2 q and 2 q + 1 of each j, are the tokens 4 q to 4 q + 3.
template <int kColumns>
__device__ __forceinline__ void load_b_of_rows(uint32_t (&b)[2][2], const bf16* m, unsigned row,
                                               unsigned column, unsigned lane) {
  const unsigned n = lane % 8;
  uint32_t r[4];
  load_matrix_x4(r,
                 m + swizzled<kColumns>(row + n / 2 * 4 + lane / 16 * 2 + n % 2, column + lane / 8 % 2 * 8));
  b[0][0] = r[0];
  b[0][1] = r[1];
  b[1][0] = r[2];
  b[1][1] = r[3];
}

// Four consecutive elements in one store.
__device__ __forceinline__ void store4(bf16* to, uint32_t first_pair, uint32_t second_pair) {
  *reinterpret_cast<uint64_t*>(to) = first_pair | static_cast<uint64_t>(second_pair) << 32;
}

// A pair of float32 as two pairs of bfloat16 whose sum is within 2^-17 of it.
__device__ __forceinline__ void split_bf16(float x, float y, uint32_t& high, uint32_t& low) {
  high = pack_bf16(x, y);
  low = pack_bf16(x - low_bf16(high), y - high_bf16(high));
}

// What prepare_chunks leaves for scan_chunks, for each chunk. Rows past the last token are zero.
struct PrefillChunks {
  bf16* q;        // [chunks, Hk, 64, Dk] normalized, times Dk^-0.5
  bf16* k;        // [chunks, Hk, 64, Dk] normalized
  bf16* v;        // [chunks, Hv, 64, Dv]
  bf16* inverse;  // [chunks, Hv, 2, 64, 64] of I + A, as two bfloat16 summands; 16 by 16 tiles above the
                  // diagonal unset
  bf16* mixing;   // [chunks, Hv, 2, 64, 64] q k^T with decay, on and below the diagonal; likewise
  float* decay;   // [chunks, Hv, 64] its logarithm, summed from the chunk's first token
  float* beta;    // [chunks, Hv, 64]
  size_t bytes;   // of all

  PrefillChunks(void* scratch, const DeltaShape& shape, int64_t chunks) {
    auto* next = static_cast<unsigned char*>(scratch);
    const auto take = [&]<typename T>(T*& array, int64_t elements) {
      array = reinterpret_cast<T*>(next);
      next += elements * sizeof(T);
    };
    take(q, chunks * shape.key_heads * kChunk * shape.key_dim);
    take(k, chunks * shape.key_heads * kChunk * shape.key_dim);
    take(v, chunks * shape.value_heads * kChunk * shape.value_dim);
    take(inverse, chunks * shape.value_heads * 2 * kChunk * kChunk);
    take(mixing, chunks * shape.value_heads * 2 * kChunk * kChunk);
    take(decay, chunks * shape.value_heads * kChunk);
    take(beta, chunks * shape.value_heads * kChunk);
    bytes = next - static_cast<unsigned char*>(scratch);
  }
};

}  // namespace qwen::cuda
