// How the decode kernels split their matrices over blocks.
//
// A block's warps stand side by side along K, and its tile rows pass through their rings (decode_slice.cuh).
// One block an SM reads at the memory's full rate, if its share is even; more would leave the next kernel's
// blocks no room.
#pragma once

#include <algorithm>

#include "kernels/cuda/tuning.h"

namespace qwen::cuda {

inline constexpr int kMaxDecodeWarps = 16;

struct DecodeConfig {
  int warps;          // of a block, about: slices are powers of two
  int blocks_per_sm;  // at most
};

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

constexpr bool is_valid(DecodeConfig config) {
  return config.warps >= 1 && config.warps <= kMaxDecodeWarps && config.blocks_per_sm >= 1;
}

using TunedDecode = Tuned<DecodeKernel, DecodeConfig>;

inline constexpr TunedDecode kTunedDecode[] = {
#define TUNED_DECODE(architecture, kernel, n, k, group, warps, blocks_per_sm) \
  {architecture, kernel, n, k, group, 0, {warps, blocks_per_sm}},
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

// For sweeps: where warps is not 0, it is used instead of the table. Not thread-safe. A result's bits depend
// on it.
inline DecodeConfig decode_overrides[kDecodeKernels] = {};

// As many warps as a block may have: the fewer columns a warp has, the sooner it has read them.
inline constexpr DecodeConfig kDefaultDecodeConfig = {kMaxDecodeWarps, 1};

// For an int4 matrix [n, k], or one of E. kRouter: n = E without its shared gate, k = D, group = 0.
constexpr DecodeConfig decode_config(DecodeKernel kernel, int n, int k, int group, int architecture) {
  const DecodeConfig* tuned =
      find_tuned<DecodeKernel, DecodeConfig>(kTunedDecode, tuned_as(architecture), kernel, n, k, group, 0);
  return tuned != nullptr ? *tuned : kDefaultDecodeConfig;
}
inline DecodeConfig decode_config(DecodeKernel kernel, int n, int k, int group) {
  if (decode_overrides[kernel].warps != 0) return decode_overrides[kernel];
  return decode_config(kernel, n, k, group, gpu_architecture());
}

}  // namespace qwen::cuda
