// How many tokens a block of prefill's int4 products takes.
//
// Wide token tiles dequantize a weight less often; narrow ones multiply with less padding, and are more
// blocks.
#pragma once

#include <algorithm>

#include "kernels/cuda/tuning.h"

namespace qwen::cuda {

struct PrefillConfig {
  int tokens;  // of a tile: 16, 32 or 128; of experts 8, too, and 64
  int rows;  // tile rows of a tile: 8; 16 of the largest tiles, of experts' of 64 tokens, which may have 32,
             // and of experts' smallest (gemm_few.cuh); 1, of dense tiles of 32 tokens: few, whose columns
             // the warps share out (gemm_narrow.cuh)
  // The order of tiles (gemm::Order), for sweeps; the tables leave it to the kernels. Not of the last two.
  int together = 0;        // 0: what is best
  bool tile_each = false;  // a block a tile instead of a persistent grid
};

enum PrefillKernel { kLinearPrefill, kSwigluPrefill, kMoeGateUpPrefill, kMoeDownPrefill, kPrefillKernels };

constexpr bool is_valid(PrefillKernel kernel, PrefillConfig config) {
  const bool experts = kernel == kMoeGateUpPrefill || kernel == kMoeDownPrefill;
  const int tokens = config.tokens;
  switch (config.rows) {
    case 1:
      return !experts && tokens == 32;
    case 8:
      return tokens == 16 || tokens == 32 || (!experts && tokens == 128);
    case 16:
      return tokens == 128 || (experts && (tokens == 8 || tokens == 16 || tokens == 64));
    case 32:
      return experts && tokens == 64;
    default:
      return false;
  }
}

using TunedPrefill = Tuned<PrefillKernel, PrefillConfig>;

inline constexpr TunedPrefill kTunedPrefill[] = {
#define TUNED_DECODE(...)
#define TUNED_PREFILL(architecture, kernel, n, k, group, rows, tokens, tile_rows) \
  {architecture, kernel, n, k, group, rows, {tokens, tile_rows}},
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
constexpr PrefillConfig default_prefill_config(PrefillKernel kernel, int n, int64_t rows) {
  if (kernel == kLinearPrefill || kernel == kSwigluPrefill) {
    constexpr int64_t kFull = 96;  // blocks that fill most of the machine
    const int64_t feature_blocks = (n + 127) / 128;
    const int64_t wide_blocks = rows > 64 ? (rows + 127) / 128 * feature_blocks : 0;
    if (wide_blocks >= 2 * kFull) return {128, 16};
    if (wide_blocks >= kFull) return {128, 8};
    if ((rows + 31) / 32 * feature_blocks <= kFull) return {32, 1};
    return {rows > 16 ? 32 : 16, 8};
  }
  if (rows <= 11) return {rows > 5 ? 16 : 8, 16};
  return rows < 64 ? PrefillConfig{64, 32} : PrefillConfig{128, 16};
}

// rows: tokens, or of experts the rows that one is expected to have, T A / E.
constexpr PrefillConfig prefill_config(PrefillKernel kernel, int n, int k, int group, int64_t rows,
                                       int architecture) {
  const PrefillConfig* tuned = find_tuned<PrefillKernel, PrefillConfig>(kTunedPrefill, tuned_as(architecture),
                                                                        kernel, n, k, group, rows);
  return tuned != nullptr ? *tuned : default_prefill_config(kernel, n, rows);
}
inline PrefillConfig prefill_config(PrefillKernel kernel, int n, int k, int group, int64_t rows) {
  if (prefill_overrides[kernel].tokens != 0) return prefill_overrides[kernel];
  return prefill_config(kernel, n, k, group, rows, gpu_architecture());
}

}  // namespace qwen::cuda
