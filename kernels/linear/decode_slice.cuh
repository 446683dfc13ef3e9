// What a warp does in the products of a decode step, which are bound by the bandwidth of their weights.
//
// A block's warps stand side by side along K: each has a slice of the columns, for all tile rows of its
// block. So a warp needs its own columns of x alone. It reads them, puts them through the norm's weight and
// keeps them as tensor-core fragments, without a barrier of the block; the norm's factor, one number a row of
// x, comes in where the warps' sums are added up. Every block repeats this, so its instructions count.
//
// Int4 weights multiply x as integers: a code, times 16 in its nibble's place, is an int8, and a value of x
// is two int8 digits, 256 high + low: 16 bits relative to the largest of its slice's row, which is nearer
// than bfloat16 comes but for values a hundred times smaller than that. The digits of four rows of x are the
// eight columns of a tensor-core product. It takes half the instructions of a product in bfloat16, whose
// codes must be widened, and is exact within a group.
//
// Weights pass through a ring of slots in shared memory, filled by asynchronous copies, which hold no
// registers and begin before the previous kernel ends.
//
// A row's result does not depend on the other rows: each has columns of its own, and nothing here branches on
// their values.
#pragma once

#include "kernels/cuda/primitives.cuh"
#include "kernels/linear/decode_configs.h"

namespace qwen::cuda {

// The fewest columns of whole tiles and whole groups.
template <int kGroup>
struct Unit {
  static constexpr int kTiles = kGroup > 64 ? kGroup / 64 : 1;
  static constexpr int kColumns = 64 * kTiles;
};

// Slots of a warp's ring. On an H200, 6 of 1 KB for each of 16 warps read at the memory's full rate.
inline constexpr int kRingSlots = 6;

// kUnits units of columns, a warp's share of K.
template <int kGroup, int kUnits>
struct Slice {
  static constexpr int kTiles = kUnits * Unit<kGroup>::kTiles;
  static constexpr int kColumns = 64 * kTiles;
  static constexpr int kGroups = kColumns / kGroup;

  // A tile row of the slice in shared memory: tiles, then scales.
  static constexpr int kTileBytes = 512 * kTiles;
  static constexpr int kItemBytes = kTileBytes + 32 * kGroups;
  // 16 rows of bfloat16 weights, each padded so that rows do not meet in a bank.
  static constexpr int kBf16RowBytes = 2 * kColumns + 16;
  static constexpr int kBf16Bytes = 16 * kBf16RowBytes;

  // x in shared memory. As digits: words [rows, high and low, 4 lanes q, kWords], each digit padded, then the
  // rows' scales; as bfloat16: rows as those of the weights.
  static constexpr int kWords = kColumns / 16;
  static constexpr int kDigitWords = 4 * kWords + 4;
  __host__ __device__ static constexpr int row_bytes(int rows) {
    return rows * 8 * kDigitWords + 4 * kMaxDecodeRows;
  }

  // How lanes share a row of x: a word of digits each, which is two columns and the two 16 further.
  static constexpr int kLanes = kColumns < 128 ? kColumns / 4 : 32;
  static constexpr int kOfLane = kColumns / 4 / kLanes;
  static constexpr int kRowsOfPass = 32 / kLanes;

  // Word i of a lane: 32 columns are words [2, 4 lanes q], of the columns 8 s + 2 q.
  __device__ __forceinline__ static int word_of_lane(int i) {
    return i * 32 + static_cast<int>(threadIdx.x % kLanes);
  }
  __device__ __forceinline__ static int column_of_lane(int i) {
    const int word = word_of_lane(i);
    return word / 8 * 32 + word % 8 * 2;
  }
};

// Where a lane copies its share from, of the part of a tile row that begins at column `first_column`; the
// first kScaleLanes have scales, too.
template <int kGroup, int kUnits>
struct ItemSource {
  using S = Slice<kGroup, kUnits>;
  static constexpr int kScaleLanes = S::kGroups < 16 ? 2 * S::kGroups : 32;
  static_assert(S::kGroups <= 16);

  const uint4* tiles;
  const uint32_t* scales;
  int valid_tiles;  // zeros past K
  bool valid_scales;

  __device__ __forceinline__ ItemSource(const Int4Matrix& w, int row_tile, int first_column) {
    const int lane = static_cast<int>(threadIdx.x % 32);
    const int first_tile = first_column / 64;
    const int group = first_column / kGroup + lane % kScaleLanes / 2;
    valid_tiles = column_tiles(w) - first_tile;
    valid_scales = group < groups(w);
    tiles = w.tiles + (valid_tiles > 0 ? first_tile * 32 : 0) + lane;
    scales = w.scales + (valid_scales ? group * 8 : 0) + lane % 2 * 4;
    advance(w, row_tile);
  }

  // To another tile row.
  __device__ __forceinline__ void advance(const Int4Matrix& w, int row_tiles) {
    tiles += static_cast<int64_t>(row_tiles) * (column_tiles(w) * 32);
    scales += static_cast<int64_t>(row_tiles) * (groups(w) * 8);
  }

  __device__ __forceinline__ void settle() {
    qwen::cuda::settle(tiles);
    qwen::cuda::settle(scales);
  }

  __device__ __forceinline__ void copy(unsigned char* to) const {
    const int lane = static_cast<int>(threadIdx.x % 32);
#pragma unroll
    for (int j = 0; j < S::kTiles; ++j) {
      copy_async_16(to + j * 512 + lane * 16, tiles + j * 32, j < valid_tiles);
    }
    if (lane < kScaleLanes) copy_async_16(to + S::kTileBytes + lane * 16, scales, valid_scales);
  }

 private:
  // As Int4Matrix has them, without its signed and its unknown divisors.
  __device__ __forceinline__ static int column_tiles(const Int4Matrix& w) {
    return static_cast<int>(static_cast<unsigned>(w.k + 63) / 64);
  }
  __device__ __forceinline__ static int groups(const Int4Matrix& w) {
    return static_cast<int>(static_cast<unsigned>(column_tiles(w)) * 64 / kGroup);
  }
};

// Starts copying the part of a tile row that begins at column `first_column`, zeros past K.
template <int kGroup, int kUnits>
__device__ __forceinline__ void copy_item(unsigned char* to, const Int4Matrix& w, int row_tile,
                                          int first_column) {
  ItemSource<kGroup, kUnits>(w, row_tile, first_column).copy(to);
}

// Rows of bfloat16 weights: `first` [n_first, k], then `then` [n - n_first, k].
struct Bf16Rows {
  const bf16* first;
  const bf16* then;
  int n_first;
  int n;
  int k;  // a multiple of 32

  __host__ __device__ int row_tiles() const { return (n + 15) / 16; }
};

// Starts copying 16 rows' part of the slice, zeros past N and K.
template <int kGroup, int kUnits>
__device__ __forceinline__ void copy_item(unsigned char* to, const Bf16Rows& w, int row_tile,
                                          int first_column) {
  using S = Slice<kGroup, kUnits>;
  constexpr int kChunks = S::kColumns / 8;
#pragma unroll 4
  for (int i = static_cast<int>(threadIdx.x % 32); i < 16 * kChunks; i += 32) {
    const int row = row_tile * 16 + i / kChunks;
    const int column = first_column + i % kChunks * 8;
    const bool valid = row < w.n && column < w.k;
    const bf16* from = row < w.n_first ? w.first + static_cast<int64_t>(row) * w.k
                                       : w.then + static_cast<int64_t>(row - w.n_first) * w.k;
    copy_async_16(to + i / kChunks * S::kBf16RowBytes + i % kChunks * 16, valid ? from + column : w.first,
                  valid);
  }
}

}  // namespace qwen::cuda
