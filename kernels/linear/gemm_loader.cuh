// What a block of prefill's products copies to shared memory: step after step of one tile, then of the
// block's next, so that the copies run ahead of the products across tiles, too.
#pragma once

#include "kernels/linear/gemm_tile.cuh"

namespace qwen::cuda::gemm {

struct Arguments {
  const bf16* x;
  Int4Matrix w;          // of all experts, unless dense
  const bf16* residual;  // or null; dense only
  bf16* y;
  const int32_t* order;    // unless dense, as are the next three
  const int32_t* offsets;  // [experts + 1]
  int experts;
  int top_k;
  int tokens;          // dense only, as is the next
  int width;           // tokens of a tile, a multiple of 8
  int feature_blocks;  // blocks of features
  int token_tiles;     // routed: those that any routing can need
  int together;        // token tiles that all meet a block of features before any meets the next
  int tiles;           // feature_blocks * token_tiles
};

// Tile `index` of all; its features are those of feature_block. What runs at a time are neighbours: they
// share the weights of a block of features and, of few token tiles at once, their rows, so that L2 delivers
// both.
template <typename T, Rows kRows>
__device__ __forceinline__ TokenTile tile_at(const Arguments& g, int index, int& feature_block, bool& last) {
  const int first = index / (g.together * g.feature_blocks) * g.together;
  const int together = min(g.together, g.token_tiles - first);
  const int rest = index - first * g.feature_blocks;
  feature_block = rest / together;
  const int token_tile = first + rest % together;
  last = token_tile == first;  // no more, if it is empty
  if constexpr (kRows == Rows::kDense) {
    const int begin = token_tile * g.width;
    return {0, begin, min(g.width, g.tokens - begin)};
  } else {
    return find_tile<T::kTokens, T::kPipelined>(g.offsets, g.experts, token_tile);
  }
}

// The first tile of the block's, `index` and on, that has rows; without any, there is no more.
template <typename T, Rows kRows>
__device__ __forceinline__ TokenTile next_tile(const Arguments& g, int& index, int& feature_block) {
  for (; index < g.tiles; index += static_cast<int>(gridDim.x)) {
    bool last;
    const TokenTile tile = tile_at<T, kRows>(g, index, feature_block, last);
    if (tile.count > 0) return tile;
    if (last) break;
  }
  return {0, 0, 0};
}

// Instructions are as short as shared memory's bandwidth here, so what a step needs is kept ready: pointers
// that move on, and offsets in the stage.
template <typename T, int kRowTiles, Rows kRows>
class Loader {
 public:
  // Begins with the block's first tile. Routed: after the wait for the previous kernel.
  __device__ __forceinline__ explicit Loader(const Arguments& g)
      : g_(g),
        steps_(g.w.column_tiles()),
        scale_shift_(g.w.group == 128  ? 4
                     : g.w.group == 64 ? 5
                                       : 6),
        index_(static_cast<int>(blockIdx.x)) {
    const int lane = threadIdx.x % 32;
    const int warp = threadIdx.x / 32;
    const int row = threadIdx.x / 8;
    tokens_to_ = row * kRowBytes + (threadIdx.x % 8 ^ row % 8) * 16;
    weights_to_ = T::kWeightsAt + warp * kRowTiles * kWeightBytes + lane * 16;
    scales_to_ = lane < kRowTiles * scale_chunks()
                     ? T::kScalesAt + warp * kRowTiles * kScaleBytes + lane / scale_chunks() * kScaleBytes +
                           lane % scale_chunks() * 16
                     : kNone;
    const int ragged = g.w.k % kDepth;  // columns of the last step, where they are not all
    ragged_step_ = ragged != 0 && token_column() >= ragged ? steps_ - 1 : kNone;
    ask_rows(index_);
    enter();
  }

  __device__ __forceinline__ bool more() const { return count_ != 0; }
  __device__ __forceinline__ int steps() const { return steps_; }

  // The weights of the tile's step `ahead` from here.
  __device__ __forceinline__ void copy_weights(unsigned char* stage, int ahead = 0) const {
    const unsigned char* const from = weights_ + ahead * kWeightBytes;
#pragma unroll
    for (int i = 0; i < kRowTiles; ++i) {
      copy_async_16(stage + weights_to_ + i * kWeightBytes, from + i * next_row_);
    }
    if (scales_to_ != kNone) copy_async_16(stage + scales_to_, scales_ + scale_offset(step_ + ahead));
  }

  // Rows past the last are not copied: a token's products do not depend on the others.
  __device__ __forceinline__ void copy_tokens(unsigned char* stage) const {
#pragma unroll
    for (int i = 0; i < kCopies; ++i) {
      if (static_cast<int>(threadIdx.x) / 8 + i * kRowsAtOnce >= count_) continue;
      copy_async_16(stage + tokens_to_ + i * kRowsAtOnce * kRowBytes, row_of(i), step_ != ragged_step_);
    }
  }

  __device__ __forceinline__ void advance() {
    weights_ += kWeightBytes;
#pragma unroll
    for (auto& from : tokens_) from += kRowBytes;
    if (++step_ < steps_) return;
    index_ += static_cast<int>(gridDim.x);
    enter();
  }

 private:
  static constexpr int kRowsAtOnce = T::kThreads / 8;
  static constexpr int kCopies = (T::kTokens + kRowsAtOnce - 1) / kRowsAtOnce;  // of 16 bytes, a thread's
  static constexpr int kPointers = kRows == Rows::kGathered ? kCopies : 1;
  static constexpr int kNone = -1;
  // A wide tile has no registers to spare, and takes long enough for a wait at its beginning not to count.
  static constexpr bool kAsksAhead = kRows == Rows::kGathered && T::kTokens < 64;

  __device__ __forceinline__ static int token_column() { return threadIdx.x % 8 * 8; }
  __device__ __forceinline__ int scale_chunks() const { return g_.w.group == 32 ? 4 : 2; }  // a tile's a step
  // Where the thread's i-th row is; only gathered rows are anywhere.
  __device__ __forceinline__ const unsigned char* row_of(int i) const {
    return kRows == Rows::kGathered ? tokens_[i % kPointers] : tokens_[0] + i * kRowsAtOnce * 2 * g_.w.k;
  }
  // A multiple of 32 bytes: of a group of 128, every second step's.
  __device__ __forceinline__ int scale_offset(int step) const { return step << scale_shift_ & ~31; }

  // The numbers of the rows of tile `index`, which come when they are first used.
  __device__ __forceinline__ void ask_rows(int index) {
    if constexpr (kAsksAhead) {
      int feature_block;
      const TokenTile tile = next_tile<T, kRows>(g_, index, feature_block);
#pragma unroll
      for (int i = 0; i < kCopies; ++i) choices_[i] = choice(tile, threadIdx.x / 8 + kRowsAtOnce * i);
    }
  }
  __device__ __forceinline__ int32_t choice(const TokenTile& tile, int t) const {
    return t < tile.count ? g_.order[tile.begin + t] : 0;
  }

  __device__ __forceinline__ void enter() {
    int feature_block;
    const TokenTile tile = next_tile<T, kRows>(g_, index_, feature_block);
    step_ = 0;
    count_ = tile.count;
    if (count_ == 0) return;
    // Tile rows past the last are copies of the last, and not written.
    const int row_tiles = g_.w.row_tiles();
    const int warp = threadIdx.x / 32;
    const int lane = threadIdx.x % 32;
    const int first = feature_block * T::kTileRows + warp * kRowTiles;
    const auto tile_of = [&](int i) {
      return int64_t{tile.expert} * row_tiles + min(first + i, row_tiles - 1);
    };
    weights_ =
        reinterpret_cast<const unsigned char*>(g_.w.tiles) + tile_of(0) * steps_ * kWeightBytes + lane * 16;
    if constexpr (kRowTiles > 1)
      next_row_ = static_cast<int>(tile_of(1) - tile_of(0)) * steps_ * kWeightBytes;
    scales_ = reinterpret_cast<const unsigned char*>(g_.w.scales) +
              tile_of(lane / scale_chunks()) * g_.w.groups() * 32 + lane % scale_chunks() * 16;
#pragma unroll
    for (int i = 0; i < kPointers; ++i) {
      const int t = threadIdx.x / 8 + kRowsAtOnce * i;
      int row = tile.begin + t;
      if constexpr (kRows == Rows::kGathered) {
        row = (kAsksAhead ? choices_[i] : choice(tile, t)) / g_.top_k;
      }
      tokens_[i] =
          reinterpret_cast<const unsigned char*>(g_.x + static_cast<int64_t>(row) * g_.w.k + token_column());
    }
    ask_rows(index_ + static_cast<int>(gridDim.x));
  }

  const Arguments& g_;
  const int steps_;
  const int scale_shift_;
  int index_;  // of the tile
  int step_;
  int count_;  // of its tokens; 0: there is no more
  int ragged_step_;
  const unsigned char* weights_;
  int next_row_ = 0;  // from one tile row's weights to those of the next
  const unsigned char* scales_;
  const unsigned char* tokens_[kPointers];
  int32_t choices_[kCopies];  // asked ahead: of the next tile's rows
  int tokens_to_;
  int weights_to_;
  int scales_to_;
};

}  // namespace qwen::cuda::gemm
