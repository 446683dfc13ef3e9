// Prefill's dense products of few tokens with matrices of few features, which are too few tiles for the
// machine if each has all columns: here the warps of a block share out the columns of its tile, each with
// copies of its own that no barrier holds up, and add up in the end.
#pragma once

#include "kernels/linear/gemm_fragments.cuh"
#include "kernels/linear/gemm_loader.cuh"
#include "kernels/linear/gemm_output.cuh"

namespace qwen::cuda::gemm {

template <int kRowTiles, int kTokenCount>
struct NarrowTile {
  static constexpr int kWarps = 8;
  static constexpr int kThreads = 32 * kWarps;
  static constexpr int kTokens = kTokenCount;
  static constexpr int kTokenBytes = kTokens * kRowBytes;
  static constexpr int kStageBytes = kTokenBytes + kRowTiles * (kWeightBytes + kScaleBytes);  // a warp's
  static constexpr int kStages = kWarps * kStageBytes * 4 < 226 * 1024 ? 4 : 3;
  static constexpr int kSumBytes = kWarps * kRowTiles * kTokens / 8 * 32 * static_cast<int>(sizeof(float4));
  static constexpr int kSharedBytes = kWarps * kStages * kStageBytes;
  static_assert(kSumBytes <= kSharedBytes);
};

// A block makes kRowTiles tile rows by kTokens tokens.
template <int kRowTiles, int kTokens, Output kOutput>
__global__ void __launch_bounds__(NarrowTile<kRowTiles, kTokens>::kThreads)
    multiply_narrow(const __grid_constant__ Arguments g) {
  using N = NarrowTile<kRowTiles, kTokens>;
  using T = Tile<N::kWarps, 1, N::kTokens, kOutput>;  // of the warps that write
  static_assert(N::kSumBytes + kRowTiles * T::kStagingBytes <= N::kSharedBytes);
  QWEN_DYNAMIC_SHARED(shared);
  const int lane = threadIdx.x % 32;
  const int warp = threadIdx.x / 32;
  const Int4Matrix& w = g.w;
  const int row_tiles = w.row_tiles();
  const int token_tiles = (g.tokens + N::kTokens - 1) / N::kTokens;  // next to each other: they share weights
  const int begin = static_cast<int>(blockIdx.x) % token_tiles * N::kTokens;
  const int count = min(N::kTokens, g.tokens - begin);
  const int first_tile = static_cast<int>(blockIdx.x) / token_tiles * kRowTiles;
  const int first = warp * w.column_tiles() / N::kWarps;
  const int steps = (warp + 1) * w.column_tiles() / N::kWarps - first;

  unsigned char* const stages = shared + warp * N::kStages * N::kStageBytes;
  const auto stage = [&](int step) { return stages + step % N::kStages * N::kStageBytes; };
  const int group_shift = w.group == 32 ? 0 : w.group == 64 ? 1 : 2;
  const int scale_chunks = w.group == 32 ? 4 : 2;  // of 16 bytes, a tile's a step
  const auto copy_weights = [&](int step) {
    unsigned char* const to = stage(step) + N::kTokenBytes;
    const int column_tile = first + step;
#pragma unroll
    for (int i = 0; i < kRowTiles; ++i) {
      const int64_t tile = int64_t{min(first_tile + i, row_tiles - 1)} * w.column_tiles() + column_tile;
      copy_async_16(to + i * kWeightBytes + lane * 16, w.tiles + tile * 32 + lane);
    }
    if (lane < kRowTiles * scale_chunks) {
      const int i = lane / scale_chunks;
      const int64_t group =
          int64_t{min(first_tile + i, row_tiles - 1)} * w.groups() + (2 * column_tile >> group_shift);
      copy_async_16(to + kRowTiles * kWeightBytes + i * kScaleBytes + lane % scale_chunks * 16,
                    w.scales + group * 8 + lane % scale_chunks * 4);
    }
  };
  const int row = lane / 8;
  const int chunk = lane % 8;
  const auto copy_tokens = [&](int step) {
    const int column = (first + step) * kDepth + chunk * 8;
    const bf16* const from = g.x + static_cast<size_t>(begin + row) * w.k + column;
#pragma unroll
    for (int i = 0; i < N::kTokens / 4; ++i) {
      const int t = row + 4 * i;
      if (t >= count) break;  // a token's products do not depend on the others
      const bool inside = column < w.k;
      copy_async_16(stage(step) + t * kRowBytes + (chunk ^ t % 8) * 16,
                    inside ? from + static_cast<size_t>(4 * i) * w.k : g.x, inside);
    }
  };
  for (int s = 0; s < min(N::kStages - 1, steps); ++s) copy_weights(s);
  wait_for_previous_kernel();
  for (int s = 0; s < N::kStages - 1; ++s) {
    if (s < steps) copy_tokens(s);
    copy_async_commit();
  }
  let_next_kernel_start();

  const int second = w.group == 32 ? 8 : 0;
  float acc[kRowTiles][N::kTokens / 8][4] = {};
#pragma unroll 1
  for (int step = 0; step < steps; ++step) {
    copy_async_wait<N::kStages - 2>();
    __syncwarp();  // the stage is there, and the one before is read
    if (step + N::kStages - 1 < steps) {
      copy_weights(step + N::kStages - 1);
      copy_tokens(step + N::kStages - 1);
    }
    copy_async_commit();
    const unsigned char* const tokens = stage(step);
    const unsigned char* const weights = tokens + N::kTokenBytes;
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      uint32_t a[kRowTiles][2][4];
#pragma unroll
      for (int i = 0; i < kRowTiles; ++i) {
        const uint4 words = reinterpret_cast<const uint4*>(weights + i * kWeightBytes)[lane];
        const auto* const scales =
            reinterpret_cast<const uint32_t*>(weights + kRowTiles * kWeightBytes + i * kScaleBytes);
        dequantize_half(a[i], half == 0 ? words.x : words.y, half == 0 ? words.z : words.w,
                        scales[lane / 4 + half * second]);
      }
      multiply_half<kRowTiles, N::kTokens>(acc, a, tokens, half);
    }
  }

  __syncthreads();                                         // all stages are read
  float4* const sums = reinterpret_cast<float4*>(shared);  // [warps][row tiles][tokens / 8][lanes]
  constexpr int kPieces = N::kTokens / 8;
#pragma unroll
  for (int i = 0; i < kRowTiles; ++i) {
#pragma unroll
    for (int j = 0; j < kPieces; ++j) {
      const float (&c)[4] = acc[i][j];
      sums[((warp * kRowTiles + i) * kPieces + j) * 32 + lane] = {c[0], c[1], c[2], c[3]};
    }
  }
  __syncthreads();
  if (warp >= kRowTiles) return;
  float total[1][kPieces][4] = {};
#pragma unroll
  for (int from = 0; from < N::kWarps; ++from) {
#pragma unroll
    for (int j = 0; j < kPieces; ++j) {
      const float4 c = sums[((from * kRowTiles + warp) * kPieces + j) * 32 + lane];
      total[0][j][0] += c.x, total[0][j][1] += c.y, total[0][j][2] += c.z, total[0][j][3] += c.w;
    }
  }
  const int feature = (first_tile + warp) * T::kFeatures;
  const int features = kOutput == Output::kSwiglu ? w.n / 2 : w.n;
  const auto row_of = [&](int token) { return begin + token; };
  write_tile<T, 1, N::kTokens, kOutput, true>(total, shared + N::kSumBytes + warp * T::kStagingBytes,
                                              g.residual, g.y, feature, features, count, row_of);
}

template <int kRowTiles, int kTokens, Output kOutput>
cudaError_t launch_narrow(const Arguments& arguments, cudaStream_t stream) {
  using N = NarrowTile<kRowTiles, kTokens>;
  const int64_t blocks = (int64_t{arguments.tokens} + N::kTokens - 1) / N::kTokens *
                         ((arguments.w.row_tiles() + kRowTiles - 1) / kRowTiles);
  return launch(multiply_narrow<kRowTiles, kTokens, kOutput>,
                {dim3(static_cast<unsigned>(blocks)), dim3(N::kThreads), N::kSharedBytes}, stream, arguments);
}

}  // namespace qwen::cuda::gemm
