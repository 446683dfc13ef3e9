// Int4 tiles times the few rows of a decode step: what the bandwidth-bound kernels share.
//
// The rows are the columns of a tensor-core product: W [16, 64] of a tile times x^T [64, 8]. Weights go to
// shared memory by asynchronous copies, which hold no registers, so that a block has all of its share in
// flight, begun before the previous kernel ends. A tile then costs about 50 instructions a warp, half of what
// the memory's rate leaves.
//
// A row's result does not depend on the other rows: each is a column of its own, and nothing here branches on
// their values.
#pragma once

#include "kernels/linear/activations.cuh"

namespace qwen::cuda {

// What a warp multiplies at once: the fewest columns of whole tiles and whole groups.
template <int kGroup>
struct Unit {
  static constexpr int kTiles = kGroup > 64 ? kGroup / 64 : 1;
  static constexpr int kColumns = 64 * kTiles;
  static constexpr int kGroups = kColumns / kGroup;
  static constexpr int kTileBytes = 512 * kTiles;  // of one tile row
  static constexpr int kScaleBytes = 32 * kGroups;
  static constexpr int kBytes = kTileBytes + kScaleBytes;
};

// The units of a matrix shared out in their order, `each` a share but for the last. Computed by the host:
// divisions.
struct UnitSplit {
  int units;
  int each;
  int shares;  // that have units

  UnitSplit(int units, int most_shares) : units(units) {
    each = (units + most_shares - 1) / most_shares;
    shares = (units + each - 1) / each;
  }
};
template <int kGroup>
UnitSplit split_columns(const Int4Matrix& w, int most_shares) {
  return {w.column_tiles() / Unit<kGroup>::kTiles, most_shares};
}

// A warp's share of kRowTiles tile rows: `units` units of columns from `first_unit` on, in shared memory.
template <int kGroup, int kRowTiles>
struct WeightSlice {
  using U = Unit<kGroup>;

  unsigned char* shared;  // [units] of tiles [kRowTiles, kTileBytes], then scales [kRowTiles, kScaleBytes]
  int first_unit;
  int units;

  static constexpr int kUnitBytes = kRowTiles * U::kBytes;
  static constexpr int kCopyGroups = 2;

  // Share `index` of `split`, with room for its units at `shared`.
  __device__ static WeightSlice share(unsigned char* shared, const UnitSplit& split, int index) {
    const int first = index * split.each;
    return {shared, first, max(0, min(split.each, split.units - first))};
  }
  // The share of warp `index`; `shared_of_warps` has room for each warp's.
  __device__ static WeightSlice of_warp(unsigned char* shared_of_warps, const UnitSplit& split, int index) {
    return share(shared_of_warps + index * split.each * kUnitBytes, split, index);
  }

  // Starts copying a unit of the tile rows from `row_tile` on; past the last one, that again.
  __device__ __forceinline__ void copy_unit(const Int4Matrix& w, int row_tile, int unit) const {
    const int lane = static_cast<int>(threadIdx.x) % 32;
    const int last = w.row_tiles() - 1;
    unsigned char* to = shared + unit * kUnitBytes;
#pragma unroll
    for (int i = 0; i < kRowTiles; ++i) {
      const int64_t tile =
          static_cast<int64_t>(min(row_tile + i, last)) * w.column_tiles() + (first_unit + unit) * U::kTiles;
#pragma unroll
      for (int j = 0; j < U::kTiles; ++j) {
        copy_async_16(to + (i * U::kTiles + j) * 512 + lane * 16, w.tiles + (tile + j) * 32 + lane);
      }
    }
    constexpr int kPieces = U::kScaleBytes / 16;
    if (lane < kRowTiles * kPieces) {
      const int64_t group = static_cast<int64_t>(min(row_tile + lane / kPieces, last)) * w.groups() +
                            (first_unit + unit) * U::kGroups;
      copy_async_16(to + kRowTiles * U::kTileBytes + lane * 16,
                    reinterpret_cast<const unsigned char*>(w.scales + group * 8) + lane % kPieces * 16);
    }
  }

  // All units, in kCopyGroups groups of copies of as many units.
  __device__ __forceinline__ void copy(const Int4Matrix& w, int row_tile) const {
    const int first_half = (units + 1) / 2;
#pragma unroll 1
    for (int unit = 0; unit < first_half; ++unit) copy_unit(w, row_tile, unit);
    copy_async_commit();
#pragma unroll 1
    for (int unit = first_half; unit < units; ++unit) copy_unit(w, row_tile, unit);
    copy_async_commit();
  }

  // acc [16 kRowTiles, 8] += W x^T over a unit, whose activations begin at column tile `x_tile`. Lanes of
  // absent rows read the last one: their columns of the product are never used.
  __device__ __forceinline__ void multiply(float (&acc)[kRowTiles][4], const Activations& x, int rows,
                                           int unit, int x_tile) const {
    const int lane = static_cast<int>(threadIdx.x) % 32;
    const int r = lane / 4;
    const int q = lane % 4;
    const unsigned char* from = shared + unit * kUnitBytes;
    uint4 b[2 * U::kTiles];  // of 32 columns each
#pragma unroll
    for (int j = 0; j < U::kTiles; ++j) {
      const unsigned char* columns =
          x.x + min(r, rows - 1) * x.row_bytes + (x_tile + j) * 128 + ((q + x_tile + j) & 3) * 16;
      b[2 * j] = *reinterpret_cast<const uint4*>(columns);
      b[2 * j + 1] = *reinterpret_cast<const uint4*>(columns + 64);
    }
    float4 bias[U::kGroups];
#pragma unroll
    for (int g = 0; g < U::kGroups; ++g) bias[g] = x.sums[(x_tile / U::kTiles * U::kGroups + g) * 4 + q];
#pragma unroll
    for (int i = 0; i < kRowTiles; ++i) {
      uint32_t words[2 * U::kTiles][2];  // of 32 columns: row r, row r + 8
#pragma unroll
      for (int j = 0; j < U::kTiles; ++j) {
        const uint4 w = *reinterpret_cast<const uint4*>(from + (i * U::kTiles + j) * 512 + lane * 16);
        words[2 * j][0] = w.x;
        words[2 * j + 1][0] = w.y;
        words[2 * j][1] = w.z;
        words[2 * j + 1][1] = w.w;
      }
#pragma unroll
      for (int g = 0; g < U::kGroups; ++g) {
        const uint32_t scale =
            reinterpret_cast<const uint32_t*>(from + kRowTiles * U::kTileBytes)[(i * U::kGroups + g) * 8 + r];
        float sum[4] = {bias[g].x, bias[g].y, bias[g].z, bias[g].w};
#pragma unroll
        for (int h = g * kGroup / 32; h < (g + 1) * kGroup / 32; ++h) {
          const uint32_t pairs[4] = {b[h].x, b[h].y, b[h].z, b[h].w};
#pragma unroll
          for (int s = 0; s < 2; ++s) {
            const uint32_t a[4] = {biased_codes(words[h][0], 2 * s), biased_codes(words[h][1], 2 * s),
                                   biased_codes(words[h][0], 2 * s + 1),
                                   biased_codes(words[h][1], 2 * s + 1)};
            const uint32_t x_pairs[2] = {pairs[2 * s], pairs[2 * s + 1]};
            mma_bf16(sum, a, x_pairs);
          }
        }
        acc[i][0] += low_bf16(scale) * sum[0];
        acc[i][1] += low_bf16(scale) * sum[1];
        acc[i][2] += high_bf16(scale) * sum[2];
        acc[i][3] += high_bf16(scale) * sum[3];
      }
    }
  }

  // Multiplies all units, when copy()'s halves have arrived, and leaves the sums where the warp's weights
  // were: float [kRowTiles, rows, 16]. A barrier makes them visible to sum_over_warps.
  __device__ __forceinline__ void multiply_all(const Activations& x, int rows) const {
    float acc[kRowTiles][4] = {};
#pragma unroll 1
    for (int half = 0; half < kCopyGroups; ++half) {
      if (half == 0) {
        copy_async_wait<1>();
      } else {
        copy_async_wait<0>();
      }
      __syncwarp();
      const int middle = (units + 1) / 2;
      const int end = half == 0 ? middle : units;
#pragma unroll 1
      for (int unit = half == 0 ? 0 : middle; unit < end; ++unit) {
        multiply(acc, x, rows, unit, (first_unit + unit) * U::kTiles);
      }
    }
    __syncwarp();
    if (units == 0) return;
    const int lane = static_cast<int>(threadIdx.x) % 32;
    float* sums = reinterpret_cast<float*>(shared);
#pragma unroll
    for (int i = 0; i < kRowTiles; ++i) {
#pragma unroll
      for (int j = 0; j < 4; ++j) {
        const int row = lane % 4 * 2 + j % 2;
        if (row < rows) sums[(i * rows + row) * 16 + lane / 4 + j / 2 * 8] = acc[i][j];
      }
    }
  }
};

// One output of the product: the sum over the warps that multiply_all gave units, in their order.
template <int kGroup, int kRowTiles>
__device__ __forceinline__ float sum_over_warps(const unsigned char* shared_of_warps, const UnitSplit& split,
                                                int rows, int row_tile, int row, int out) {
  const int bytes_of_a_warp = split.each * WeightSlice<kGroup, kRowTiles>::kUnitBytes;
  float sum = 0;
  for (int i = 0; i < split.shares; ++i) {
    sum += reinterpret_cast<const float*>(shared_of_warps +
                                          i * bytes_of_a_warp)[(row_tile * rows + row) * 16 + out];
  }
  return sum;
}

}  // namespace qwen::cuda
