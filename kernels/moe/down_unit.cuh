// What a warp multiplies in moe_down_decode: kDownColumns columns of one choice's act with those of a tile
// row. As decode_slice.cuh has it for a slice of K, but for one row of x, which is bfloat16 as it is, and in
// the fewest instructions after the wait for it.
#pragma once

#include "kernels/linear/decode_input.cuh"
#include "kernels/linear/decode_product.cuh"

namespace qwen::cuda {

inline constexpr int kDownColumns = 256;

template <int kGroup>
struct DownUnit {
  static constexpr int kUnits = kDownColumns / Unit<kGroup>::kColumns;
  using S = Slice<kGroup, kUnits>;

  // act as digits: words [high and low, 4 lanes q, kWords], padded so that neither four nor eight of the
  // rows meet in a bank.
  static constexpr int kRowWords = S::kWords + 4;
  static constexpr int kDigitWords = 4 * kRowWords;
  static constexpr int kDigitBytes = 2 * kDigitWords * 4;
};

// A warp's unit of act, eight columns a lane: four, and those 16 further.
struct ActUnit {
  uint2 low;
  uint2 high;

  __device__ __forceinline__ static int column_of_lane() {
    const int lane = static_cast<int>(threadIdx.x % 32);
    return lane / 4 * 32 + lane % 4 * 4;
  }
  __device__ __forceinline__ explicit ActUnit(const bf16* from) {
    low = __ldcg(reinterpret_cast<const uint2*>(from));
    high = __ldcg(reinterpret_cast<const uint2*>(from + 16));
  }

  // Writes the unit's digits, and returns the scale that belongs to them: as load_slice does, but by a power
  // of two, times not quite 2^14, which takes no reciprocal and at most one of the 16 bits.
  template <int kGroup>
  __device__ __forceinline__ float write_digits(unsigned char* to) const {
    using Unit = DownUnit<kGroup>;
    constexpr uint32_t kExponent = 0x7f800000U;
    constexpr uint32_t kLeast = 0x0d800000U;   // 2^-100: less is as good as nothing
    constexpr uint32_t kFactor = 0x467e0000U;  // 127 * 2^7, so that the largest digit is below 127.5
    constexpr uint32_t kScale = 0x36810204U;   // 1 / (127 * 2^7 * 16): a weight is 16 times its code
    constexpr uint32_t kOne = 0x3f800000U;
    const auto both = [](uint32_t a, uint32_t b) {
      return max(a << 16 & 0x7fff0000U, b << 16 & 0x7fff0000U);
    };
    const auto tops = [](uint32_t a, uint32_t b) { return max(a & 0x7fff0000U, b & 0x7fff0000U); };
    const uint32_t largest = __reduce_max_sync(
        ~0U,
        max(max(max(both(low.x, low.y), both(high.x, high.y)), tops(low.x, low.y)), tops(high.x, high.y)));
    const uint32_t exponent = max(largest & kExponent, kLeast);
    const float factor = __uint_as_float(kFactor + kOne - exponent);
    const int lane = static_cast<int>(threadIdx.x % 32);
    uint32_t* at = reinterpret_cast<uint32_t*>(to) + lane % 2 * 2 * Unit::kRowWords + lane / 2;
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const uint32_t first = i == 0 ? low.x : low.y;
      const uint32_t second = i == 0 ? high.x : high.y;
      const Four v = {{low_bf16(first), high_bf16(first)}, {low_bf16(second), high_bf16(second)}};
      const uint2 digits = digits_of(v, factor);
      at[i * Unit::kRowWords] = digits.x;
      at[i * Unit::kRowWords + Unit::kDigitWords] = digits.y;
    }
    // Of NaN and infinity nothing is right but that it shows.
    return __uint_as_float(largest >= kExponent ? ~0U : exponent - kOne + kScale);
  }
};

// A warp's part of a tile row, from shared memory.
template <int kGroup>
struct DownWeights {
  using Unit = DownUnit<kGroup>;
  using S = typename Unit::S;

  uint4 tiles[S::kTiles];
  uint32_t scales[S::kGroups];

  __device__ __forceinline__ explicit DownWeights(const unsigned char* item) {
    const int lane = static_cast<int>(threadIdx.x % 32);
#pragma unroll
    for (int j = 0; j < S::kTiles; ++j) tiles[j] = reinterpret_cast<const uint4*>(item)[j * 32 + lane];
#pragma unroll
    for (int g = 0; g < S::kGroups; ++g) {
      scales[g] = reinterpret_cast<const uint32_t*>(item + S::kTileBytes)[g * 8 + lane / 4];
    }
  }

  // The product with the digits at `slice`, but for their scale: of the rows r and r + 8 in lane (r, q).
  __device__ __forceinline__ void multiply(float (&sums)[2], const unsigned char* slice) const {
    constexpr int32_t kShiftBits = 0x4b400000;  // see Fragments
    constexpr float kShift = 12582912.0F;
    constexpr int kSteps = kGroup / 32;
    const int lane = static_cast<int>(threadIdx.x % 32);
    const uint4* from =
        reinterpret_cast<const uint4*>(reinterpret_cast<const uint32_t*>(slice) +
                                       lane / 4 % 2 * Unit::kDigitWords + lane % 4 * Unit::kRowWords);
    uint4 x[S::kTiles];
#pragma unroll
    for (int j = 0; j < S::kTiles; ++j) x[j] = from[j];
    sums[0] = sums[1] = 0;
    // Two groups at once: one alone would wait for its own results.
#pragma unroll
    for (int first = 0; first < S::kGroups; first += 2) {
      int32_t products[2][4];
#pragma unroll
      for (int i = 0; i < 8; ++i) products[i / 4][i % 4] = kShiftBits;
#pragma unroll
      for (int step = 0; step < kSteps; ++step) {
#pragma unroll
        for (int g = 0; g < 2; ++g) {
          const int part = (first + g) * kSteps + step;  // 32 columns
          const uint4& w = tiles[part / 2];
          const uint4& v = x[part / 2];
          const uint32_t row = part % 2 == 0 ? w.x : w.y;
          const uint32_t row8 = part % 2 == 0 ? w.z : w.w;
          const uint32_t a[4] = {row << 4 & 0xf0f0f0f0U, row8 << 4 & 0xf0f0f0f0U, row & 0xf0f0f0f0U,
                                 row8 & 0xf0f0f0f0U};
          const uint32_t b[2] = {part % 2 == 0 ? v.x : v.z, part % 2 == 0 ? v.y : v.w};
          mma_s8(products[g], a, b);
        }
      }
#pragma unroll
      for (int g = 0; g < 2; ++g) {
        const auto digit = [&](int n) { return __int_as_float(products[g][n]) - kShift; };
        sums[0] += low_bf16(scales[first + g]) * (digit(0) * 256.0F + digit(1));
        sums[1] += high_bf16(scales[first + g]) * (digit(2) * 256.0F + digit(3));
      }
    }
  }
};

}  // namespace qwen::cuda
