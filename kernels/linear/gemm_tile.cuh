// What a block of prefill's products makes: its shape, and in routed products its expert and rows.
#pragma once

#include "kernels/cuda/primitives.cuh"

namespace qwen::cuda::gemm {

inline constexpr int kDepth = 64;             // columns a step: a tile's
inline constexpr int kRowBytes = 2 * kDepth;  // of a token in shared memory
inline constexpr int kWeightBytes = 512;      // of a tile
inline constexpr int kScaleBytes = 64;        // of a tile: two groups of 32

enum class Output { kPlain, kSwiglu };
// Where tokens come from and go to. Dense: both in order. Gathered: from x[order / A], to the sorted row.
// Scattered: from the sorted row, to y[order].
enum class Rows { kDense, kGathered, kScattered };

template <int kWarpCount, int kRowTiles, int kTokenCount, Output kOutput>
struct Tile {
  static constexpr int kWarps = kWarpCount;
  static constexpr int kThreads = 32 * kWarps;
  static constexpr int kTokens = kTokenCount;
  static constexpr int kTileRows = kWarps * kRowTiles;
  // On sm_90a: warps that only copy, beside these (gemm_pipeline.cuh).
  static constexpr bool kPipelined = kRowTiles * kTokens > 128;
  static constexpr int kFeatures = (kOutput == Output::kSwiglu ? 8 : 16) * kRowTiles;  // of y, a warp's
  // A stage: tokens, which warpgroup products take from a multiple of 1024 bytes, weights, scales.
  static constexpr int kTokenBytes = kTokens * kRowBytes;
  static constexpr int kWeightsAt = kTokenBytes;
  static constexpr int kScalesAt = kWeightsAt + kTileRows * kWeightBytes;
  static constexpr int kStageBytes = (kScalesAt + kTileRows * kScaleBytes + 1023) / 1024 * 1024;
  static constexpr int kStagingPitch = 2 * kFeatures + 16;  // conflict-free for rows of 16 bytes
  static constexpr int kStagingBytes = 16 * kStagingPitch;  // a warp's: sixteen tokens
  // A multiprocessor's: as many as have registers for their accumulators, one, two or three.
  static constexpr int kBlocks = kPipelined ? 1 : kRowTiles * kTokens > 32 ? 2 : 3;
  // Two blocks fit on sm_90, and one where there are 99 KiB; the largest are for sm_90 alone.
  static constexpr int kMostBytes = (kBlocks == 1 ? 200 : 96) * 1024;
  static constexpr int kFit = (kMostBytes - 1024 - kWarps * kStagingBytes) / kStageBytes;
  static constexpr int kStages = kFit < 6 ? kFit : 6;
  static constexpr int kAhead = kStages - 2;  // the stage before last may still be read
  static constexpr int kSharedBytes = 1024 + kStages * kStageBytes + kWarps * kStagingBytes;
  static_assert(kAhead >= 2);
};

struct TokenTile {
  int expert;
  int begin;  // its first row, sorted if routed
  int count;  // its rows; 0: there is no such tile
};

// The place in `counts`, one a lane, of element `index`: the lane that holds it, or -1. `index` becomes
// relative to it.
__device__ __forceinline__ int locate(int count, int& index) {
  const int lane = threadIdx.x % 32;
  int sum = count;
#pragma unroll
  for (int offset = 1; offset < 32; offset *= 2) {
    const int other = __shfl_up_sync(~0U, sum, offset);
    if (lane >= offset) sum += other;
  }
  const unsigned past = __ballot_sync(~0U, sum > index);
  const int owner = __ffs(past) - 1;
  index -= __shfl_sync(~0U, sum - count, owner < 0 ? 31 : owner);
  return owner;
}

// Tile `index` when every expert's rows are cut into tiles of kTokens, or with kEven into as many that are
// alike, of a multiple of eight; past the last, every one is empty. Every warp finds it for itself.
template <int kTokens, bool kEven = false>
__device__ __forceinline__ TokenTile find_tile(const int32_t* offsets, int experts, int index) {
  const auto tiles = [&](int expert) {
    return expert < experts ? (offsets[expert + 1] - offsets[expert] + kTokens - 1) / kTokens : 0;
  };
  const int lane = threadIdx.x % 32;
  const int per_lane = (experts + 31) / 32;
  int count = 0;
#pragma unroll 8
  for (int i = 0; i < per_lane; ++i) count += tiles(lane * per_lane + i);
  const int owner = locate(count, index);
  if (owner < 0) return {0, 0, 0};
  const int expert = owner * per_lane + locate(lane < per_lane ? tiles(owner * per_lane + lane) : 0, index);
  const int rows = offsets[expert + 1] - offsets[expert];
  const int pieces = (rows + kTokens - 1) / kTokens;
  const int width = kEven ? ((rows + pieces - 1) / pieces + 7) / 8 * 8 : kTokens;
  return {expert, offsets[expert] + index * width, min(width, rows - index * width)};
}

}  // namespace qwen::cuda::gemm
