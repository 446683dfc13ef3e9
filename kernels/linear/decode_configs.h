// How the decode kernels split their matrices over blocks.
//
// A block takes `row_tiles` tile rows over all of K, its warps side by side along K. All its weights are on
// their way into shared memory before anything is computed, so what counts is that all blocks are resident at
// once (then the whole matrix is in flight), that each SM gets its share, and that few blocks repeat the
// prologue.
#pragma once

#include "kernels/cuda/types.h"

namespace qwen::cuda {

struct DecodeConfig {
  int warps;      // of a block, at most max_decode_warps(row_tiles); for kMoeDown, of a choice
  int row_tiles;  // of a block: 1, 2 or 3; 1 for kMoeDown and kRouter
};

// More tile rows take more registers.
constexpr int max_decode_warps(int row_tiles) { return row_tiles == 1 ? 16 : 8; }

enum DecodeKernel {
  kLinearDecode,
  kHead,
  kDeltaInput,
  kDeltaOutput,
  kMoeGateUp,
  kMoeDown,
  kRouter,
  kDecodeKernels
};

// For sweeps: where warps is not 0, it is used instead of the table. Not thread-safe. A result's bits depend
// on it.
inline DecodeConfig decode_overrides[kDecodeKernels] = {};

// Predictions for the 132 SMs of an H200, unmeasured.
inline DecodeConfig decode_config(DecodeKernel kernel, int row_tiles, int column_tiles) {
  if (decode_overrides[kernel].warps != 0) return decode_overrides[kernel];
  switch (kernel) {
    case kMoeGateUp:
      return {4, 1};  // 576 tile rows at A = 8: at most 5 of them an SM
    case kMoeDown:
      return {2, 1};  // 18 warps a block at A = 8
    case kRouter:
      return {8, 1};
    default:
      break;
  }
  // Two blocks of three tile rows fill an SM's turn with 768 tile rows; with few, one a block reaches more
  // SMs.
  const int rows = row_tiles >= 3 * 132 ? 3 : 1;
  return {column_tiles >= 64 ? 16 : column_tiles >= 16 ? 8 : 4, rows};
}

}  // namespace qwen::cuda
