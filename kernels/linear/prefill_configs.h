// How many tokens a block of prefill's int4 products takes.
//
// Wide token tiles dequantize a weight less often; narrow ones multiply with less padding, and are more
// blocks.
#pragma once

#include <algorithm>

#include "kernels/cuda/tuning.h"

namespace qwen::cuda {

struct PrefillConfig {
  int tokens;  // of a tile: 16, 32 or 128; 64 too for experts
  int tiles;   // that a block makes one after the other; 1 but for kMoeDownPrefill
};

enum PrefillKernel { kLinearPrefill, kSwigluPrefill, kMoeGateUpPrefill, kMoeDownPrefill, kPrefillKernels };

constexpr bool is_valid(PrefillKernel kernel, PrefillConfig config) {
  const bool experts = kernel == kMoeGateUpPrefill || kernel == kMoeDownPrefill;
  const bool width = config.tokens == 16 || config.tokens == 32 || config.tokens == 128;
  return (width || (experts && config.tokens == 64)) && config.tiles >= 1 &&
         (config.tiles == 1 || kernel == kMoeDownPrefill);
}

using TunedPrefill = Tuned<PrefillKernel, PrefillConfig>;

inline constexpr TunedPrefill kTunedPrefill[] = {
#define TUNED_DECODE(...)
#define TUNED_PREFILL(architecture, kernel, n, k, group, rows, tokens, tiles) \
  {architecture, kernel, n, k, group, rows, {tokens, tiles}},
#include "kernels/linear/tuned.inc"
#include "kernels/moe/tuned.inc"
#undef TUNED_DECODE
#undef TUNED_PREFILL
    {}};
static_assert(std::ranges::all_of(kTunedPrefill, [](const TunedPrefill& line) {
  return line.architecture == 0 || is_valid(line.kernel, line.config);
}));

// For sweeps: where tokens is not 0, it is used instead of the table. Not thread-safe.
inline PrefillConfig prefill_overrides[kPrefillKernels] = {};

// Predictions for the 132 SMs of an H200, unmeasured.
constexpr PrefillConfig default_prefill_config(PrefillKernel kernel, int n, int k, int64_t rows) {
  if (kernel == kLinearPrefill || kernel == kSwigluPrefill) {
    constexpr int64_t kFull = 96;  // blocks that fill most of the machine
    const int64_t wide_blocks = (rows + 127) / 128 * ((n + 127) / 128);
    if (rows > 64 && wide_blocks >= kFull) return {128, 1};
    return {rows > 16 ? 32 : 16, 1};
  }
  // Few steps a tile: a block makes two, so that finding the expert and filling the stages pay.
  const int tiles = kernel == kMoeDownPrefill && k <= 1024 ? 2 : 1;
  return {rows > 160 ? 128 : rows > 24 ? 64 : rows > 10 ? 32 : 16, tiles};
}

// rows: tokens, or of experts the rows that one is expected to have, T A / E.
constexpr PrefillConfig prefill_config(PrefillKernel kernel, int n, int k, int group, int64_t rows,
                                       int architecture) {
  const PrefillConfig* tuned = find_tuned<PrefillKernel, PrefillConfig>(kTunedPrefill, tuned_as(architecture),
                                                                        kernel, n, k, group, rows);
  return tuned != nullptr ? *tuned : default_prefill_config(kernel, n, k, rows);
}
inline PrefillConfig prefill_config(PrefillKernel kernel, int n, int k, int group, int64_t rows) {
  if (prefill_overrides[kernel].tokens != 0) return prefill_overrides[kernel];
  return prefill_config(kernel, n, k, group, rows, gpu_architecture());
}

}  // namespace qwen::cuda
