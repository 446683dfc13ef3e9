// Prefill's routed experts with 8-bit activations by mma.sync: for GPUs without warpgroup products, for rows
// that are no multiple of 128 columns, and in emulation.
#pragma once

#include <algorithm>

#include "kernels/linear/gemm_output.cuh"
#include "kernels/linear/gemm_tile.cuh"
#include "kernels/moe/operands_8bit.cuh"
#include "kernels/moe/quantize_rows.cuh"

namespace qwen::cuda::moe8 {

using gemm::kRowBytes;
using gemm::kScaleBytes;
using gemm::kWeightBytes;

inline constexpr int kWarps = 8;
inline constexpr int kThreads = 32 * kWarps;

template <int kTokens, Output kOutput>
struct SyncTile : gemm::Tile<kWarps, 1, kTokens, kOutput> {
  static constexpr int kTokenBytes = kTokens * kRowBytes;
  static constexpr int kTokenScaleBytes = kTokens * static_cast<int>(sizeof(float));
  static constexpr int kStageBytes = kTokenBytes + kWarps * 2 * (kWeightBytes + kScaleBytes);
  static constexpr int kStages = 4;
  static constexpr int kStaging = kWarps * gemm::Tile<kWarps, 1, kTokens, kOutput>::kStagingBytes;
  // And the scales of all the tokens' groups.
  static constexpr int shared_bytes(int groups) {
    return kStages * kStageBytes + kStaging + groups * kTokenScaleBytes;
  }
};

// A block makes 128 features by kTokens tokens; a warp has 16 features and all tokens.
template <ExpertActivations kKind, int kTokens, Output kOutput, Rows kRows>
__global__ void __launch_bounds__(kThreads, 2) multiply_sync(const __grid_constant__ Arguments g) {
  using T = SyncTile<kTokens, kOutput>;
  constexpr int kCopies = (kTokens + 31) / 32;
  QWEN_DYNAMIC_SHARED(tokens_shared);
  const int lane = threadIdx.x % 32;
  const int warp = threadIdx.x / 32;
  unsigned char* const weights_shared = tokens_shared + T::kStages * T::kTokenBytes + warp * 2 * kWeightBytes;
  unsigned char* const scales_shared =
      tokens_shared + T::kStages * (T::kTokenBytes + kWarps * 2 * kWeightBytes) + warp * 2 * kScaleBytes;
  unsigned char* const staging = tokens_shared + T::kStages * T::kStageBytes + warp * T::kStagingBytes;
  float* const token_scales =  // [groups][kTokens]
      reinterpret_cast<float*>(tokens_shared + T::kStages * T::kStageBytes + T::kStaging);
  __shared__ int sources[kTokens];  // rows of x
  __shared__ int targets[kTokens];  // and of y

  wait_for_previous_kernel();
  const Int4Matrix w = g.w;
  const gemm::TokenTile tile = gemm::find_tile<kTokens>(g.offsets, g.experts, blockIdx.x / g.feature_blocks);
  if (tile.count == 0) return;
  for (int t = threadIdx.x; t < kTokens; t += kThreads) {
    const int sorted = tile.begin + min(t, tile.count - 1);
    sources[t] = kRows == Rows::kGathered ? g.order[sorted] / g.top_k : sorted;
    targets[t] = kRows == Rows::kGathered ? sorted : g.order[sorted];
  }
  __syncthreads();

  const int column_tiles = w.column_tiles();
  const int row_tiles = w.row_tiles();
  const int steps = g.x.groups();
  const int row_tile = static_cast<int>(blockIdx.x % g.feature_blocks) * kWarps + warp;
  const size_t weight_row = static_cast<size_t>(tile.expert) * row_tiles + min(row_tile, row_tiles - 1);
  const uint4* const weights_from = w.tiles + weight_row * column_tiles * 32 + lane;
  const uint32_t* const scales_from = w.scales + weight_row * w.groups() * 8;
  const int per_step = kColumns / w.group;  // groups of weights: 1, 2 or 4
  const uint8_t* tokens_from[kCopies];
#pragma unroll
  for (int i = 0; i < kCopies; ++i) {
    const int row = sources[min(static_cast<int>(threadIdx.x) / 8 + 32 * i, kTokens - 1)];
    tokens_from[i] = g.x.codes + static_cast<size_t>(row) * g.x.pitch() + threadIdx.x % 8 * 16;
  }
  const int token_row = threadIdx.x / 8;
  unsigned char* const tokens_to =
      tokens_shared + token_row * kRowBytes + (threadIdx.x % 8 ^ token_row % 8) * 16;
  const auto copy = [&](int step) {
    const int slot = step % T::kStages;
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const bool valid = 2 * step + half < column_tiles;
      copy_async_16(weights_shared + slot * kWarps * 2 * kWeightBytes + half * kWeightBytes + lane * 16,
                    valid ? weights_from + (2 * step + half) * 32 : weights_from, valid);
    }
    if (lane < 2 * per_step) {
      const int chunk = 2 * per_step * step + lane;  // of 16 bytes
      const bool valid = chunk < 2 * w.groups();
      copy_async_16(scales_shared + slot * kWarps * 2 * kScaleBytes + lane * 16,
                    valid ? scales_from + chunk * 4 : scales_from, valid);
    }
    if (kTokens < 32 && token_row >= kTokens) return;
#pragma unroll
    for (int i = 0; i < kCopies; ++i) {
      copy_async_16(tokens_to + slot * T::kTokenBytes + i * 32 * kRowBytes, tokens_from[i] + step * kColumns);
    }
  };
  for (int s = 0; s < T::kStages - 1; ++s) {
    if (s < steps) copy(s);
    copy_async_commit();
  }
  const int scales = kGroupScales<kKind> ? steps : 1;
  for (int i = threadIdx.x; i < scales * kTokens; i += kThreads) {
    token_scales[i] = g.x.scales[static_cast<size_t>(sources[i % kTokens]) * scales + i / kTokens];
  }
  let_next_kernel_start();

  float acc[1][kTokens / 8][4] = {};
  Sum<kKind> sums[kTokens / 8][4] = {};
  for (int s = 0; s < steps; ++s) {
    copy_async_wait<T::kStages - 2>();
    __syncthreads();
    if (s + T::kStages - 1 < steps) copy(s + T::kStages - 1);
    copy_async_commit();
    const int slot = s % T::kStages;
    const uint4* const weights =
        reinterpret_cast<const uint4*>(weights_shared + slot * kWarps * 2 * kWeightBytes) + lane;
    const uint32_t* const weight_scales =
        reinterpret_cast<const uint32_t*>(scales_shared + slot * kWarps * 2 * kScaleBytes) + lane / 4;
    const unsigned char* const tokens = tokens_shared + slot * T::kTokenBytes;
#pragma unroll
    for (int quarter = 0; quarter < 4; ++quarter) {
      const uint4 words = weights[quarter / 2 * 32];
      const uint32_t first = quarter % 2 == 0 ? words.x : words.y;
      const uint32_t eighth = quarter % 2 == 0 ? words.z : words.w;
      uint32_t a[4];
      operand_8bit<kKind>(a, first, eighth);
      const int chunk = (2 * quarter + lane / 8 % 2) ^ (lane % 8);
#pragma unroll
      for (int j = 0; j < kTokens / 16; ++j) {
        uint32_t b[4];
        load_matrix_x4(b, tokens + (16 * j + lane % 8 + lane / 16 * 8) * kRowBytes + chunk * 16);
        const uint32_t even[2] = {b[0], b[1]};
        const uint32_t odd[2] = {b[2], b[3]};
        mma_8bit(sums[2 * j], a, even);
        mma_8bit(sums[2 * j + 1], a, odd);
      }
      if ((quarter + 1) * per_step % 4 != 0) continue;  // the group goes on
      const uint32_t pair = weight_scales[quarter * per_step / 4 * 8];
      const float low = low_bf16(pair);
      const float high = high_bf16(pair);
#pragma unroll
      for (int j = 0; j < kTokens / 8; ++j) {
        const float2 scale = *reinterpret_cast<const float2*>(
            token_scales + (kGroupScales<kKind> ? s : 0) * kTokens + 8 * j + lane % 4 * 2);
        acc[0][j][0] += static_cast<float>(sums[j][0]) * (low * scale.x);
        acc[0][j][1] += static_cast<float>(sums[j][1]) * (low * scale.y);
        acc[0][j][2] += static_cast<float>(sums[j][2]) * (high * scale.x);
        acc[0][j][3] += static_cast<float>(sums[j][3]) * (high * scale.y);
#pragma unroll
        for (int e = 0; e < 4; ++e) sums[j][e] = 0;
      }
    }
  }
  const int feature = row_tile * T::kFeatures;
  const int features = kOutput == Output::kSwiglu ? w.n / 2 : w.n;
  gemm::write_tile<T, 1, kTokens, kOutput, false>(acc, staging, nullptr, g.y, feature, features, tile.count,
                                                  [&](int token) { return targets[token]; });
}

template <ExpertActivations kKind, int kTokens, Output kOutput, Rows kRows>
cudaError_t launch_sync(Arguments arguments, int64_t choices, cudaStream_t stream) {
  arguments.feature_blocks = (arguments.w.row_tiles() + kWarps - 1) / kWarps;
  const int64_t tiles = choices / kTokens + std::min<int64_t>(arguments.experts, choices);
  const dim3 grid(static_cast<unsigned>(arguments.feature_blocks * tiles));
  const auto shared_bytes = static_cast<size_t>(
      SyncTile<kTokens, kOutput>::shared_bytes(kGroupScales<kKind> ? arguments.x.groups() : 1));
  return launch(multiply_sync<kKind, kTokens, kOutput, kRows>, {grid, dim3(kThreads), shared_bytes}, stream,
                arguments);
}

}  // namespace qwen::cuda::moe8
