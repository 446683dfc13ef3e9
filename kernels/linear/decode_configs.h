// How the decode kernels split their matrices over blocks.
//
// A block takes `row_tiles` tile rows over all of K, its warps side by side along K. All its weights are on
// their way into shared memory before anything is computed, so what counts is that all blocks are resident at
// once (then the whole matrix is in flight), that each SM gets its share, and that few blocks repeat the
// prologue.
#pragma once

#include <algorithm>

#include "kernels/cuda/tuning.h"

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

constexpr bool is_valid(DecodeKernel kernel, DecodeConfig config) {
  const bool one_row_tile = kernel == kMoeDown || kernel == kRouter;
  const int most_rows = one_row_tile ? 1 : kernel == kMoeGateUp ? 2 : 3;
  const int most_warps = kernel == kMoeGateUp ? 8 : max_decode_warps(config.row_tiles);
  return config.row_tiles >= 1 && config.row_tiles <= most_rows && config.warps >= 1 &&
         config.warps <= most_warps;
}

using TunedDecode = Tuned<DecodeKernel, DecodeConfig>;

inline constexpr TunedDecode kTunedDecode[] = {
#define TUNED_DECODE(architecture, kernel, n, k, group, warps, row_tiles) \
  {architecture, kernel, n, k, group, 0, {warps, row_tiles}},
#define TUNED_PREFILL(...)
#include "kernels/gated_delta/tuned.inc"
#include "kernels/linear/tuned.inc"
#include "kernels/moe/tuned.inc"
#undef TUNED_DECODE
#undef TUNED_PREFILL
    {}};
static_assert(std::ranges::all_of(kTunedDecode, [](const TunedDecode& line) {
  return line.architecture == 0 || is_valid(line.kernel, line.config);
}));

// For sweeps: where warps is not 0, it is used instead of the table. Not thread-safe. A result's bits depend
// on it.
inline DecodeConfig decode_overrides[kDecodeKernels] = {};

// Predictions for the 132 SMs of an H200, unmeasured.
constexpr DecodeConfig default_decode_config(DecodeKernel kernel, int n, int k) {
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
  const int row_tiles = (n + 15) / 16;
  const int column_tiles = (k + 63) / 64;
  // Two blocks of three tile rows fill an SM's turn with 768 tile rows; with few, one a block reaches more
  // SMs.
  const int rows = row_tiles >= 3 * 132 ? 3 : 1;
  return {column_tiles >= 64 ? 16 : column_tiles >= 16 ? 8 : 4, rows};
}

// For an int4 matrix [n, k], or one of E. kRouter: n = E without its shared gate, k = D, group = 0.
constexpr DecodeConfig decode_config(DecodeKernel kernel, int n, int k, int group, int architecture) {
  const DecodeConfig* tuned =
      find_tuned<DecodeKernel, DecodeConfig>(kTunedDecode, tuned_as(architecture), kernel, n, k, group, 0);
  return tuned != nullptr ? *tuned : default_decode_config(kernel, n, k);
}
inline DecodeConfig decode_config(DecodeKernel kernel, int n, int k, int group) {
  if (decode_overrides[kernel].warps != 0) return decode_overrides[kernel];
  return decode_config(kernel, n, k, group, gpu_architecture());
}

}  // namespace qwen::cuda
