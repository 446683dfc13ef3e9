// The product of few tokens: the warps of a block share out the columns of a small tile, load what they need
// straight into registers, and add up at the end, so that there is one trip to memory.
#pragma once

#include "kernels/linear/float.cuh"

namespace qwen::cuda::small {

// 16 kM tokens by 8 kN features. kAhead times 32 columns a warp are on their way at once: a lane has 16 bytes
// of each row. These are 8 columns, and the places that two products of 16 columns have for them: which
// column has which place is the same for both sides, and no matter.
template <int kWarps, int kM, int kN, int kAhead>
struct FewTile {
  static_assert(kAhead % 2 == 0);
  static constexpr int kThreads = 32 * kWarps;
  static constexpr int kTokens = 16 * kM;
  static constexpr int kFeatures = 8 * kN;
  static constexpr int kSums = kTokens * kFeatures;
  static constexpr int kStep = 64 * kWarps;  // columns: two times 32 of each warp, which are 128 bytes
  static constexpr int kSharedBytes = kWarps * kSums * 4;
};

template <int kWarps, int kM, int kN, int kAhead>
__global__ void __launch_bounds__(32 * kWarps) multiply_float_few(Arguments g) {
  using T = FewTile<kWarps, kM, kN, kAhead>;
  QWEN_DYNAMIC_SHARED(shared);
  float* const sums = reinterpret_cast<float*>(shared);  // [kWarps][kM * kN][32][4]
  const int token_tiles = (g.tokens - 1) / T::kTokens + 1;
  const int first_token = static_cast<int>(blockIdx.x) % token_tiles * T::kTokens;
  const int first_feature = static_cast<int>(blockIdx.x) / token_tiles * T::kFeatures;
  const int lane = threadIdx.x % 32;
  const int warp = threadIdx.x / 32;
  // Rows that do not exist are another's: nobody uses their sums.
  const bf16* weights[kN];
  const bf16* tokens[kM][2];
#pragma unroll
  for (int j = 0; j < kN; ++j) {
    weights[j] = g.weight_row(min(first_feature + 8 * j + lane / 4, g.rows() - 1));
  }
#pragma unroll
  for (int i = 0; i < kM; ++i) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int token = min(first_token + 16 * i + 8 * half + lane / 4, g.tokens - 1);
      tokens[i][half] = g.x + static_cast<size_t>(token) * g.k;
    }
  }
  const auto column_of = [&](int c) { return c / 2 * T::kStep + warp * 64 + c % 2 * 32 + lane % 4 * 8; };
  const auto load = [&](const bf16* row, int column) {
    return column < g.k ? *reinterpret_cast<const uint4*>(row + column) : uint4{0, 0, 0, 0};
  };
  uint4 a[kAhead][kM][2];
  uint4 b[kAhead][kN];
  const auto load_weights = [&](int slot, int column) {
#pragma unroll
    for (int j = 0; j < kN; ++j) b[slot][j] = load(weights[j], column);
  };
  const auto load_tokens = [&](int slot, int column) {
#pragma unroll
    for (int i = 0; i < kM; ++i) {
#pragma unroll
      for (int half = 0; half < 2; ++half) a[slot][i][half] = load(tokens[i][half], column);
    }
  };
#pragma unroll
  for (int s = 0; s < kAhead; ++s) load_weights(s, column_of(s));
  wait_for_previous_kernel();
#pragma unroll
  for (int s = 0; s < kAhead; ++s) load_tokens(s, column_of(s));
  let_next_kernel_start();

  float acc[kM][kN][4] = {};
  const int end = ((g.k - 1) / T::kStep + 1) * 2;
#pragma unroll 1
  for (int first = 0; first < end; first += kAhead) {
#pragma unroll
    for (int s = 0; s < kAhead; ++s) {
#pragma unroll
      for (int j = 0; j < kN; ++j) {
        const uint32_t first_b[2] = {b[s][j].x, b[s][j].y};
        const uint32_t second_b[2] = {b[s][j].z, b[s][j].w};
#pragma unroll
        for (int i = 0; i < kM; ++i) {
          const uint4& low = a[s][i][0];
          const uint4& high = a[s][i][1];
          const uint32_t first_a[4] = {low.x, high.x, low.y, high.y};
          const uint32_t second_a[4] = {low.z, high.z, low.w, high.w};
          mma_bf16(acc[i][j], first_a, first_b);
          mma_bf16(acc[i][j], second_a, second_b);
        }
      }
      if (first + kAhead < end) {  // zeros, where these are some too many
        load_weights(s, column_of(first + s + kAhead));
        load_tokens(s, column_of(first + s + kAhead));
      }
    }
  }

#pragma unroll
  for (int i = 0; i < kM * kN; ++i) {
    const float (&c)[4] = acc[i / kN][i % kN];
    *reinterpret_cast<float4*>(sums + ((warp * kM * kN + i) * 32 + lane) * 4) = {c[0], c[1], c[2], c[3]};
  }
  __syncthreads();
#pragma unroll
  for (int first = 0; first < T::kSums; first += T::kThreads) {
    const int at = first + static_cast<int>(threadIdx.x);
    if (at >= T::kSums) continue;
    float sum = 0;
#pragma unroll
    for (int other = 0; other < kWarps; ++other) sum += sums[other * T::kSums + at];
    const int tile = at / 128;
    const int row = at % 128 / 16 + at % 4 / 2 * 8;
    const int column = at % 16 / 4 * 2 + at % 2;
    g.write(first_token + 16 * (tile / kN) + row, first_feature + 8 * (tile % kN) + column, sum);
  }
}

}  // namespace qwen::cuda::small
