// How a warp's slice of x gets into its shared memory (decode_slice.cuh), and what x goes through on the way.
#pragma once

#include "kernels/linear/decode_slice.cuh"

namespace qwen::cuda {

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
// squares of each row, if the input has a norm, to `squares` [rows, kDecodeWarps] (this warp's column).
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
        if constexpr (Input::kNorm) squares[row * kDecodeWarps + static_cast<int>(threadIdx.x / 32)] = square;
      }
    }
  }
  __syncwarp();
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
