// What the routed experts' products with 8-bit activations take.
#pragma once

#include "kernels/linear/gemm_tile.cuh"
#include "kernels/moe/cuda.h"

namespace qwen::cuda::moe8 {

using gemm::Output;
using gemm::Rows;
using gemm::TokenTile;

inline constexpr int kColumns = 128;  // of a step, and of a group of activations: a row of 128 bytes of codes

// Quantized rows: codes [rows][pitch], int8 or e4m3, and the scale of each group of 128 columns, or of each
// row. Columns past K are zero.
//
// The columns of each 32 are in the order that a tile's words have (types.h) when their low nibbles are taken
// first, then their high ones: byte 4 m + i has column 8 (m / 4) + 2 (m % 4) + i / 2 + 16 (i % 2).
struct QuantizedRows {
  uint8_t* codes;
  float* scales;  // [rows][groups], or [rows]
  int k;

  __host__ __device__ int groups() const { return (k + kColumns - 1) / kColumns; }
  __host__ __device__ int pitch() const { return groups() * kColumns; }
};

struct Arguments {
  QuantizedRows x;
  Int4Experts w;
  bf16* y;
  const int32_t* order;
  const int32_t* offsets;
  int experts;
  int top_k;
  int feature_blocks;
};

// The largest code, and what the product of a weight's operand and a code stands for more than that of their
// numbers: int8 operands are 16 times the weight's code, e4m3's 2^-9 times.
template <ExpertActivations kKind>
inline constexpr float kLargest = kKind == ExpertActivations::kInt8 ? 127.0F : 448.0F;
template <ExpertActivations kKind>
inline constexpr float kOperand = kKind == ExpertActivations::kInt8 ? 0.0625F : 512.0F;

// Whether each group of 128 columns has its scale, not each row alone: e4m3's error hardly depends on the
// scale.
template <ExpertActivations kKind>
inline constexpr bool kGroupScales = kKind == ExpertActivations::kInt8;

}  // namespace qwen::cuda::moe8
