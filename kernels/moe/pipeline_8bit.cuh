// The copying half of prefill's products with 8-bit activations on sm_90a (gemm_8bit.cuh): four warps that
// fill stages of 128 columns, and the barriers in shared memory that say which are full and which are empty.
#pragma once

#include "kernels/linear/barrier.cuh"
#include "kernels/moe/rows_8bit.cuh"

namespace qwen::cuda::moe8 {

// A block makes 256 rows of weights by up to kTokenCount tokens. kGroup: columns that a scale of the weights
// is for; 32 serves 64, too.
template <int kTokenCount, int kGroup, Output kOutput>
struct Pipeline : gemm::Tile<8, 2, kTokenCount, kOutput> {
  using Base = gemm::Tile<8, 2, kTokenCount, kOutput>;
  static constexpr int kTokens = kTokenCount;
  static constexpr int kMultipliers = 256;  // threads
  static constexpr int kCopiers = 128;
  static constexpr int kThreads = kMultipliers + kCopiers;
  static constexpr int kTileRowBytes = 2 * gemm::kWeightBytes;
  static constexpr int kScaleBytes = kGroup == 128 ? 32 : 128;  // of a tile row, at most
  // A stage: tokens from a multiple of 1024 bytes on, weights, their scales, the tokens'.
  static constexpr int kWeightsAt = kTokens * kColumns;
  static constexpr int kScalesAt = kWeightsAt + 16 * kTileRowBytes;
  static constexpr int kTokenScalesAt = kScalesAt + 16 * kScaleBytes;
  static constexpr int kStageBytes = (kTokenScalesAt + kTokens * 4 + 1023) / 1024 * 1024;
  static constexpr int kStagingBytes = 8 * Base::kStagingBytes;
  // Of 227 KiB: what aligns the stages, and barriers and tables of rows that are not dynamic.
  static constexpr int kBeside = 1024 + 3 * 1024;
  static constexpr int kFit = (227 * 1024 - kBeside - kStagingBytes) / kStageBytes;
  static constexpr int kStages = kFit < 8 ? kFit : 8;
  static constexpr int kSharedBytes = 1024 + kStages * kStageBytes + kStagingBytes;
  // Of a thread that multiplies and of one that copies: together what 384 threads begin with, 168 each.
  static constexpr int kRegisters = kTokens > 96 ? 232 : 224;
  static constexpr int kCopyRegisters = 3 * 168 - 2 * kRegisters;
};

// What a stage belongs to; count 0: there is no more.
struct StageTile {
  int begin;  // its first row, sorted
  int count;
  int feature_block;
};

#if QWEN_WGMMA

template <typename P>
struct Barriers {
  uint64_t of_full[P::kStages];
  uint64_t of_empty[P::kStages];
  StageTile tiles[P::kStages];

  __device__ __forceinline__ uint32_t full(int slot) const { return shared_address(of_full + slot); }
  __device__ __forceinline__ uint32_t empty(int slot) const { return shared_address(of_empty + slot); }

  __device__ __forceinline__ void init() const {
    for (int i = 0; i < P::kStages; ++i) {
      barrier_init(full(i), P::kCopiers + 1);
      barrier_init(empty(i), P::kMultipliers / 32);
    }
    fence_barrier_init();
  }
};

// Copies what the block's tiles need, stage after stage; the last one has no tile.
template <typename P, bool kGroups, Rows kRows>
__device__ __forceinline__ void copy_tiles(const Arguments& g, unsigned char* stages, Barriers<P>& barriers) {
  constexpr int kCopies = P::kTokens / 16;
  const int thread = static_cast<int>(threadIdx.x) - P::kMultipliers;
  // Eight threads copy a row of tokens, and of weights: 16 tile rows.
  const int first = thread / 8;
  const int chunk = thread % 8;
  const int steps = g.x.groups();
  const int row_tiles = g.w.row_tiles();
  const int scale_chunks = kColumns / g.w.group * 2;  // of 16 bytes, a tile row's
  const int scale_row = thread / scale_chunks;
  const int scales_to = P::kScalesAt + scale_row * P::kScaleBytes + thread % scale_chunks * 16;
  const int weights_to = P::kWeightsAt + first * P::kTileRowBytes + chunk * 16;
  const int tokens_to = first * kColumns + (chunk ^ first % 8) * 16;
  int slot = 0;
  uint32_t parity = 1;  // of the empty barriers: the first round does not wait
  for (int index = static_cast<int>(blockIdx.x);; index += static_cast<int>(gridDim.x)) {
    const TokenTile tile = gemm::find_tile<P::kTokens>(g.offsets, g.experts, index / g.feature_blocks);
    const int feature_block = index % g.feature_blocks;
    if (tile.count == 0) break;
    const auto row_of = [&](int t) {
      const int row = tile.begin + min(t, tile.count - 1);
      return kRows == Rows::kGathered ? g.order[row] / g.top_k : row;
    };
    const uint8_t* tokens[kCopies];
#pragma unroll
    for (int i = 0; i < kCopies; ++i) {
      tokens[i] = g.x.codes + static_cast<uint32_t>(row_of(first + 16 * i)) * g.x.pitch() + chunk * 16;
    }
    const float* token_scales = nullptr;
    if constexpr (kGroups) token_scales = g.x.scales + static_cast<int64_t>(row_of(thread)) * steps;
    // Rows past the last are not copied: what they give is not written.
    const int64_t first_row = int64_t{tile.expert} * row_tiles + feature_block * 16;
    const int rows = min(16, row_tiles - feature_block * 16);
    const unsigned char* weights = reinterpret_cast<const unsigned char*>(g.w.tiles) +
                                   (first_row + first) * steps * P::kTileRowBytes + chunk * 16;
    const unsigned char* scales =
        reinterpret_cast<const unsigned char*>(g.w.scales) +
        ((first_row + scale_row) * steps * scale_chunks + thread % scale_chunks) * 16;
    for (int step = 0; step < steps; ++step) {
      barrier_wait(barriers.empty(slot), parity);
      unsigned char* const stage = stages + slot * P::kStageBytes;
      if (thread == 0) {
        barriers.tiles[slot] = {tile.begin, tile.count, feature_block};
        barrier_arrive(barriers.full(slot));
      }
      if (first < rows) {
#pragma unroll
        for (int i = 0; i < 8; ++i) copy_async_16(stage + weights_to + i * 128, weights + i * 128);
      }
      if (scale_row < rows) copy_async_16(stage + scales_to, scales);
      weights += P::kTileRowBytes;
      scales += scale_chunks * 16;
#pragma unroll
      for (int i = 0; i < kCopies; ++i) {
        // A token's products do not depend on the others.
        if (first + 16 * i < tile.count) copy_async_16(stage + tokens_to + i * 16 * kColumns, tokens[i]);
        tokens[i] += kColumns;
      }
      if constexpr (kGroups) {
        if (thread < P::kTokens) copy_async_4(stage + P::kTokenScalesAt + thread * 4, token_scales + step);
      }
      barrier_arrive_after_copies(barriers.full(slot));
      if (++slot == P::kStages) slot = 0, parity ^= 1;
    }
  }
  barrier_wait(barriers.empty(slot), parity);
  if (thread == 0) {
    barriers.tiles[slot].count = 0;
    barrier_arrive(barriers.full(slot));
  }
  barrier_arrive_after_copies(barriers.full(slot));
}

#endif  // QWEN_WGMMA

}  // namespace qwen::cuda::moe8
