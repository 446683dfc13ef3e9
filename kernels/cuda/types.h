// What the CUDA kernels' launchers take: plain pointers, sizes and a stream.
//
// B rows of a decode step, T tokens of a prefill chunk, S state slots, N out-features, K in-features, G group
// size.
//
// A launcher only enqueues work on `stream`: it never allocates, synchronizes or throws, and returns the
// first CUDA error. Pointers are device memory, 16-byte aligned, row-major and dense unless said otherwise;
// scratch needs no initialization unless said otherwise. A result depends on the arguments alone: the same
// call gives the same bits.
#pragma once

#include <cuda_bf16.h>
#include <cuda_runtime_api.h>

#include <cstdint>

namespace qwen::cuda {

using bf16 = __nv_bfloat16;

// Words of the array `counters` that some launchers take beside scratch: zero before the call and zero again
// after it, so that one array serves every launch of a stream.
inline constexpr int kCounters = 1024;

// Most rows of a decode step: the width of one tensor-core tile.
inline constexpr int kMaxDecodeRows = 8;

// An int4 matrix W [N, K] in tiles of 16 rows by 64 columns, laid out so that a warp reads a tile as 32 x 16
// consecutive bytes and has tensor-core fragments (mma.m16n8k16, A operand) without a shuffle.
//
// Lane l = 4 r + q (r in 0..7, q in 0..3) owns rows r and r + 8 of a tile. Its 16 bytes are four words: {row
// r, columns 0..31}, {row r, columns 32..63}, {row r + 8, columns 0..31}, {row r + 8, columns 32..63}. Nibble
// p (bits 4p..4p+3) of the word of columns c..c+31, for p in 0..3, is column c + 16 (p / 2) + 8 (p % 2) + 2
// q; nibble p + 4 is the column after it. A nibble is the code in two's complement, -8 to 7. Rows are padded
// to 16 and columns to 64 with zero codes.
//
// Scales: for each tile row and group, eight words: word r holds the scale of row r in its low half and that
// of row r + 8 in its high half. There are ceil64(K) / G groups; padding has scale zero.
//
// kernels/linear/int4_tiles.py packs both.
struct Int4Matrix {
  const uint4* tiles;      // [ceil(N / 16), ceil(K / 64), 32]
  const uint32_t* scales;  // bf16 pairs [ceil(N / 16), ceil64(K) / G, 8]
  int n;                   // N
  int k;                   // K, a multiple of 32; the width of the activations
  int group;               // G: 32, 64 or 128

  __host__ __device__ int row_tiles() const { return (n + 15) / 16; }
  __host__ __device__ int column_tiles() const { return (k + 63) / 64; }
  __host__ __device__ int groups() const { return column_tiles() * 64 / group; }
  bool is_valid() const {
    return n > 0 && k > 0 && k % 32 == 0 && (group == 32 || group == 64 || group == 128) &&
           column_tiles() * 64 % group == 0;
  }
};

// E matrices of one shape, one after the other. A gate-up matrix of an expert of intermediate size I has N =
// 2 I rows with gate and up interleaved by eights: tile t holds gate rows 8t..8t+7, then up rows 8t..8t+7. I
// is a multiple of 8.
using Int4Experts = Int4Matrix;  // tiles and scales have a leading dimension E; n and k are one expert's

// qweight i8 [N, K] with scales bf16 [N, K / G].
struct Int8Matrix {
  const int8_t* qweight;
  const bf16* scales;
  int n;
  int k;
  int group;
};

// x / rms(x) * (1 + weight), rounded to bfloat16: Qwen3_5MoeRMSNorm. A null weight: no norm.
struct RmsNorm {
  const bf16* weight;  // [K]
  float eps;
};

}  // namespace qwen::cuda
