// How the decode kernels split their matrices over blocks.
//
// A block's warps stand side by side along K, and its tile rows pass through their rings (decode_slice.cuh).
// One block an SM reads at the memory's full rate, if its share is even; more would leave the next kernel's
// blocks no room.
#pragma once

#include <algorithm>

#include "kernels/cuda/tuning.h"

namespace qwen::cuda {

inline constexpr int kDecodeWarps = 16;  // of a block

struct DecodeConfig {
  int blocks_per_sm;  // at most
};

enum DecodeKernel { kLinearDecode, kHead, kDeltaInput, kDeltaOutput, kMoeGateUp, kDecodeKernels };

constexpr bool is_valid(DecodeConfig config) {
  return config.blocks_per_sm >= 1 && config.blocks_per_sm <= 2;
}

using TunedDecode = Tuned<DecodeKernel, DecodeConfig>;

inline constexpr TunedDecode kTunedDecode[] = {
#define TUNED_DECODE(architecture, kernel, n, k, group, blocks_per_sm) \
  {architecture, kernel, n, k, group, 0, {blocks_per_sm}},
#define TUNED_PREFILL(...)
#include "kernels/gated_delta/tuned.inc"
#include "kernels/linear/tuned.inc"
#include "kernels/moe/tuned.inc"
#undef TUNED_DECODE
#undef TUNED_PREFILL
    {}};
static_assert(std::ranges::all_of(kTunedDecode, [](const TunedDecode& line) {
  return line.architecture == 0 || is_valid(line.config);
}));

// For sweeps: where it is not 0, it is used instead of the table. Not thread-safe.
inline DecodeConfig decode_overrides[kDecodeKernels] = {};

inline constexpr DecodeConfig kDefaultDecodeConfig = {1};

// For an int4 matrix [n, k], or one of E.
constexpr DecodeConfig decode_config(DecodeKernel kernel, int n, int k, int group, int architecture) {
  const DecodeConfig* tuned =
      find_tuned<DecodeKernel, DecodeConfig>(kTunedDecode, tuned_as(architecture), kernel, n, k, group, 0);
  return tuned != nullptr ? *tuned : kDefaultDecodeConfig;
}
inline DecodeConfig decode_config(DecodeKernel kernel, int n, int k, int group) {
  if (decode_overrides[kernel].blocks_per_sm != 0) return decode_overrides[kernel];
  return decode_config(kernel, n, k, group, gpu_architecture());
}

}  // namespace qwen::cuda
