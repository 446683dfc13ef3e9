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

// Where a lane copies its share from, of the part of a tile row that begins at column `first_column`. Lanes
// that no scales are left for bring the same as others.
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

// Four values of x: at two columns and at those 16 further.
struct Four {
  float low[2];
  float high[2];
};

// Four values as a word of each digit, {high, low}. 1.5 * 2^23 leaves the rounded value in the low bits of
// the sum; 128 more makes the low digit one of -128..127 with its top bit turned.
__device__ __forceinline__ uint2 digits_of(const Four& v, float factor) {
  constexpr float kShift = 12582912.0F + 128.0F;
  const auto shifted = [&](float x) { return __float_as_uint(x * factor + kShift); };
  const uint32_t first = __byte_perm(shifted(v.low[0]), shifted(v.high[0]), 0x5140);
  const uint32_t second = __byte_perm(shifted(v.low[1]), shifted(v.high[1]), 0x5140);
  return {__byte_perm(first, second, 0x7632), __byte_perm(first, second, 0x5410) ^ 0x80808080U};
}

__device__ __forceinline__ uint32_t magnitude(float v) { return __float_as_uint(v) & 0x7fffffffU; }

// A warp's slice of the rows of x into its shared memory `to`, through `input`, as digits or as bfloat16; its
// squares of each row, if the input has a norm, to `squares` [rows, kMaxDecodeWarps] (this warp's column).
// At most kMaxRows rows: 1 makes it short, which a step of one row, whose every block does this, wants.
template <int kGroup, int kUnits, bool kDigits, int kMaxRows, typename Input>
__device__ __forceinline__ void load_slice(
    unsigned char* to, float* squares, const Input& input,
    const typename Input::Weights (&weights)[Slice<kGroup, kUnits>::kOfLane], int first_column, int rows,
    int k) {
  using S = Slice<kGroup, kUnits>;
  constexpr int kAtOnce = kMaxRows == 1 ? 1 : 4 / S::kOfLane < 1 ? 1 : 4 / S::kOfLane;  // passes
  const int passes = kMaxRows == 1 ? 1 : (rows + S::kRowsOfPass - 1) / S::kRowsOfPass;
  const int first_row = static_cast<int>(threadIdx.x % 32) / S::kLanes;
  float* scales = reinterpret_cast<float*>(to + rows * 8 * S::kDigitWords);
#pragma unroll 1
  for (int first = 0; first < passes; first += kAtOnce) {
    typename Input::Raw raw[kAtOnce][S::kOfLane];
#pragma unroll
    for (int p = 0; p < kAtOnce; ++p) {
#pragma unroll
      for (int i = 0; i < S::kOfLane; ++i) {
        const int row = (first + p) * S::kRowsOfPass + first_row;
        const int column = first_column + S::column_of_lane(i);
        raw[p][i] = {};
        if (row < rows && column < k) raw[p][i] = input.load(row, column, k);
      }
    }
#pragma unroll
    for (int p = 0; p < kAtOnce; ++p) {
      if (first + p >= passes) break;
      const int row = (first + p) * S::kRowsOfPass + first_row;
      float square = 0;
      uint32_t largest = 0;  // NaN is above all
      Four v[S::kOfLane];
#pragma unroll
      for (int i = 0; i < S::kOfLane; ++i) {
        v[i] = input.finish(raw[p][i], weights[i], square);
        largest = max(largest, max(max(magnitude(v[i].low[0]), magnitude(v[i].low[1])),
                                   max(magnitude(v[i].high[0]), magnitude(v[i].high[1]))));
      }
      if constexpr (kDigits) {
        if constexpr (S::kLanes == 32) {
          largest = __reduce_max_sync(~0U, largest);
        } else {
#pragma unroll
          for (int offset = S::kLanes / 2; offset > 0; offset /= 2) {
            largest = max(largest, __shfl_xor_sync(~0U, largest, offset));
          }
        }
      }
      const float most = __uint_as_float(largest);
      // 127.5 * 256 would round past the largest digits.
      const float factor = most > 1e-30F ? __fdividef(127.0F * 256.0F, most) : 0.0F;
      if (row < rows) {
#pragma unroll
        for (int i = 0; i < S::kOfLane; ++i) {
          const int word = S::word_of_lane(i);
          if constexpr (kDigits) {
            const uint2 digits = digits_of(v[i], factor);
            uint32_t* at =
                reinterpret_cast<uint32_t*>(to) + row * 2 * S::kDigitWords + word % 4 * S::kWords + word / 4;
            at[0] = digits.x;
            at[S::kDigitWords] = digits.y;
          } else {
            uint32_t* at =
                reinterpret_cast<uint32_t*>(to + row * S::kBf16RowBytes) + S::column_of_lane(i) / 2;
            at[0] = pack_bf16(v[i].low[0], v[i].low[1]);
            at[8] = pack_bf16(v[i].high[0], v[i].high[1]);
          }
        }
      }
      if constexpr (Input::kNorm) square = warp_sum(square, S::kLanes);
      if (row < rows && threadIdx.x % S::kLanes == 0) {
        if constexpr (kDigits) scales[row] = most * (1.0F / (127.0F * 256.0F * 16.0F));
        if constexpr (Input::kNorm)
          squares[row * kMaxDecodeWarps + static_cast<int>(threadIdx.x / 32)] = square;
      }
    }
  }
  __syncwarp();
}

// The product of one tile row with up to eight rows of x: lane (r, q) has W's rows r and r + 8 times x's rows
// q and q + 4.
struct TileSums {
  float of[2][2] = {};  // [q or q + 4, r or r + 8]
};

// A warp's slice of x as the tensor cores' B operands. Lanes of absent rows have the last one's, whose
// products are never used.
template <int kGroup, int kUnits, int kMaxRows>
struct Fragments {
  using S = Slice<kGroup, kUnits>;

  uint32_t words[S::kWords];  // of digit r % 2 of row r / 2
  const uint2* more;  // the same of row r / 2 + 4, in shared memory; null: there are four rows or less
  float scales[2];    // of the rows q and q + 4

  // From what load_slice left, which stays in use where there are more than four rows.
  __device__ __forceinline__ void read(const unsigned char* from, int rows) {
    const int lane = static_cast<int>(threadIdx.x % 32);
    const auto words_of = [&](int row) {
      return from + 4 * ((min(row, rows - 1) * 2 + lane / 4 % 2) * S::kDigitWords + lane % 4 * S::kWords);
    };
#pragma unroll
    for (int i = 0; i < S::kWords / 4; ++i) {
      const uint4 v = reinterpret_cast<const uint4*>(words_of(lane / 8))[i];
      words[4 * i] = v.x;
      words[4 * i + 1] = v.y;
      words[4 * i + 2] = v.z;
      words[4 * i + 3] = v.w;
    }
    more = kMaxRows > 4 && rows > 4 ? reinterpret_cast<const uint2*>(words_of(lane / 8 + 4)) : nullptr;
    const float* all_scales = reinterpret_cast<const float*>(from + rows * 8 * S::kDigitWords);
    scales[0] = all_scales[min(lane % 4, rows - 1)];
    scales[1] = all_scales[min(lane % 4 + 4, rows - 1)];
  }

  // W x^T of kItems tile rows that copy_item brought.
  template <int kItems>
  __device__ __forceinline__ void multiply(TileSums (&sums)[kItems],
                                           const unsigned char* const (&items)[kItems]) const {
    if (kMaxRows > 4 && more != nullptr) {
#pragma unroll
      for (int i = 0; i < kItems; ++i) {
        const unsigned char* const item[1] = {items[i]};
        multiply_halves<1, 2>(reinterpret_cast<TileSums(&)[1]>(sums[i]), item);
      }
    } else {
      multiply_halves<kItems, 1>(sums, items);
    }
  }

 private:
  template <int kItems, int kHalves>
  __device__ __forceinline__ void multiply_halves(TileSums (&sums)[kItems],
                                                  const unsigned char* const (&items)[kItems]) const {
    const int lane = static_cast<int>(threadIdx.x % 32);
    // A product begins with 1.5 * 2^23's bits: a float that much larger then holds it, as it stays below
    // 2^22, where a conversion would take eight times as long.
    constexpr int32_t kShiftBits = 0x4b400000;
    constexpr float kShift = 12582912.0F;
    int32_t products[kItems][kHalves][4];
#pragma unroll
    for (int i = 0; i < kItems; ++i) {
#pragma unroll
      for (int half = 0; half < kHalves; ++half) {
#pragma unroll
        for (int c = 0; c < 4; ++c) products[i][half][c] = kShiftBits;
      }
    }
#pragma unroll
    for (int j = 0; j < S::kTiles; ++j) {
      uint4 w[kItems];
#pragma unroll
      for (int i = 0; i < kItems; ++i) w[i] = *reinterpret_cast<const uint4*>(items[i] + j * 512 + lane * 16);
#pragma unroll
      for (int s = 0; s < 2; ++s) {  // 32 columns each
#pragma unroll
        for (int i = 0; i < kItems; ++i) {
          const uint32_t row = s == 0 ? w[i].x : w[i].y;
          const uint32_t row8 = s == 0 ? w[i].z : w[i].w;
          const uint32_t a[4] = {row << 4 & 0xf0f0f0f0U, row8 << 4 & 0xf0f0f0f0U, row & 0xf0f0f0f0U,
                                 row8 & 0xf0f0f0f0U};
#pragma unroll
          for (int half = 0; half < kHalves; ++half) {
            const uint2 later = half == 0 ? uint2{} : more[2 * j + s];
            const uint32_t b[2] = {half == 0 ? words[4 * j + 2 * s] : later.x,
                                   half == 0 ? words[4 * j + 2 * s + 1] : later.y};
            mma_s8(products[i][half], a, b);
          }
        }
        const int columns = 64 * j + 32 * (s + 1);
        if (columns % kGroup != 0) continue;
        // The group's scale of the weights.
#pragma unroll
        for (int i = 0; i < kItems; ++i) {
          const uint32_t scale = reinterpret_cast<const uint32_t*>(
              items[i] + S::kTileBytes)[(columns / kGroup - 1) * 8 + lane / 4];
#pragma unroll
          for (int half = 0; half < kHalves; ++half) {
            int32_t (&c)[4] = products[i][half];
            const auto digit = [&](int n) { return __int_as_float(c[n]) - kShift; };
            sums[i].of[half][0] += low_bf16(scale) * (digit(0) * 256.0F + digit(1));
            sums[i].of[half][1] += high_bf16(scale) * (digit(2) * 256.0F + digit(3));
            c[0] = c[1] = c[2] = c[3] = kShiftBits;
          }
        }
      }
    }
#pragma unroll
    for (int i = 0; i < kItems; ++i) {
#pragma unroll
      for (int half = 0; half < kHalves; ++half) {
        sums[i].of[half][0] *= scales[half];
        sums[i].of[half][1] *= scales[half];
      }
    }
  }
};

// The product of 16 rows of bfloat16 weights that copy_item brought with the slice of x that load_slice left
// as bfloat16, as TileSums has it.
template <int kGroup, int kUnits>
__device__ __forceinline__ TileSums multiply_bf16(const unsigned char* x, const unsigned char* item,
                                                  int rows) {
  using S = Slice<kGroup, kUnits>;
  const int lane = static_cast<int>(threadIdx.x % 32);
  const unsigned char* weights = item + lane % 16 * S::kBf16RowBytes + lane / 16 * 16;
  // The product's column 2q is row q of x, 2q + 1 row q + 4.
  const int row = lane % 8 / 2 + lane % 2 * 4;
  const unsigned char* columns = x + min(row, rows - 1) * S::kBf16RowBytes + lane / 8 * 16;
  float c[4] = {};
#pragma unroll
  for (int i = 0; i < S::kColumns / 32; ++i) {
    uint32_t b[4];
    load_matrix_x4(b, columns + i * 64);
#pragma unroll
    for (int s = 0; s < 2; ++s) {
      uint32_t a[4];
      load_matrix_x4(a, weights + i * 64 + s * 32);
      const uint32_t pair[2] = {b[2 * s], b[2 * s + 1]};
      mma_bf16(c, a, pair);
    }
  }
  TileSums sums;
  sums.of[0][0] = c[0];
  sums.of[1][0] = c[1];
  sums.of[0][1] = c[2];
  sums.of[1][1] = c[3];
  return sums;
}

// The sums of a tile row by all warps in shared memory: [rows, 16] of kSumStride floats, a warp's each. The
// stride keeps both its writes and the reads below off one another's banks.
inline constexpr int kSumStride = kMaxDecodeWarps + 4;

__device__ __forceinline__ void store_sums(float* of_tile, const TileSums& sums, int rows) {
  const int lane = static_cast<int>(threadIdx.x % 32);
  const int warp = static_cast<int>(threadIdx.x / 32);
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    const int row = half * 4 + lane % 4;
    if (row >= rows) continue;
    float* of_row = of_tile + (row * 16 + lane / 4) * kSumStride + warp;
    of_row[0] = sums.of[half][0];
    of_row[8 * kSumStride] = sums.of[half][1];
  }
}

// The sum of kMaxDecodeWarps floats, always in the same order.
__device__ __forceinline__ float sum_over_warps(const float* of_warps) {
  float4 v[kMaxDecodeWarps / 4];
#pragma unroll
  for (int i = 0; i < kMaxDecodeWarps / 4; ++i) v[i] = reinterpret_cast<const float4*>(of_warps)[i];
  float sums[kMaxDecodeWarps / 4];
#pragma unroll
  for (int i = 0; i < kMaxDecodeWarps / 4; ++i) sums[i] = (v[i].x + v[i].y) + (v[i].z + v[i].w);
  static_assert(kMaxDecodeWarps == 16);
  return (sums[0] + sums[1]) + (sums[2] + sums[3]);
}

// A lane's share of a bfloat16 row: two columns, and those 16 further.
struct Bf16Four {
  uint32_t low, high;

  __device__ static Bf16Four read(const bf16* from) {
    return {*reinterpret_cast<const uint32_t*>(from), *reinterpret_cast<const uint32_t*>(from + 16)};
  }
  __device__ Four widen() const {
    return {{low_bf16(low), high_bf16(low)}, {low_bf16(high), high_bf16(high)}};
  }
};

// x as it is.
struct PlainInput {
  const bf16* x;  // [B, K]

  static constexpr bool kNorm = false;
  struct Weights {};
  using Raw = Bf16Four;

  __device__ Weights weights(int /*column*/, int /*k*/) const { return {}; }
  __device__ Raw load(int row, int column, int k) const { return Raw::read(x + (row * k + column)); }
  __device__ Four finish(const Raw& raw, const Weights& /*weights*/, float& /*square*/) const {
    return raw.widen();
  }
  int least_columns() const { return 8; }
};

// x (1 + weight), without the norm's factor.
struct NormedInput {
  const bf16* x;  // [B, K]
  RmsNorm norm;

  static constexpr bool kNorm = true;
  using Weights = Bf16Four;
  using Raw = Bf16Four;

  __device__ Weights weights(int column, int k) const {
    return column < k ? Weights::read(norm.weight + column) : Weights{};
  }
  __device__ Raw load(int row, int column, int k) const { return Raw::read(x + (row * k + column)); }
  __device__ Four finish(const Raw& raw, const Weights& weights, float& square) const {
    Four v = raw.widen();
    const Four w = weights.widen();
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      square += v.low[i] * v.low[i] + v.high[i] * v.high[i];
      v.low[i] += v.low[i] * w.low[i];
      v.high[i] += v.high[i] * w.high[i];
    }
    return v;
  }
  int least_columns() const { return 8; }
};

}  // namespace qwen::cuda
