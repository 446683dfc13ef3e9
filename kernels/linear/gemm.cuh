// The core of prefill's products with int4 weights: y^T = W x^T on tensor cores.
//
// The weights are the A operand. A lane's 16 bytes of a tile are its fragments of 16 rows by 64 columns, so
// that they go from shared memory to registers in one load and are dequantized there: bf16(code * scale), as
// a dequantized bfloat16 model has them. Tokens are the B operand, from shared memory that asynchronous
// copies fill kStages deep.
//
// A tile is 16 kRowTiles features a warp by up to kTokens tokens. Of the largest one block fits on a
// multiprocessor, of others two or three, each at another place of its tile. Large ones need less of what L2
// delivers and fewer instructions a product. A block makes tile after tile; the grid is what fits on the
// machine. All ways of multiplying have the accumulators in the same lanes:
//   sm_90a: wgmma, which reads the tokens from shared memory once for four warps. While one group of products
//     runs, the next weights are dequantized into the other of two sets of registers. The largest tiles have
//     warps of their own for the copies (gemm_pipeline.cuh).
//   elsewhere (and in emulation): mma.sync.
#pragma once

#include <algorithm>

#include "kernels/linear/gemm_fragments.cuh"
#include "kernels/linear/gemm_loader.cuh"
#include "kernels/linear/gemm_output.cuh"
#include "kernels/linear/gemm_pipeline.cuh"

namespace qwen::cuda::gemm {

// A block of the kernel, which has the same size whatever the GPU.
template <typename T>
struct Launched {
#ifdef QWEN_CUDA_EMULATION
  static constexpr int kThreads = T::kThreads;
#else
  static constexpr int kThreads = T::kThreads + (T::kPipelined ? Pipeline<T>::kThreads : 0);
#endif
  static constexpr int kSharedBytes =
      T::kPipelined ? std::max(Pipeline<T>::kSharedBytes, T::kSharedBytes) : T::kSharedBytes;
};

// All warps copy and multiply, and a barrier begins every step.
template <typename T, int kRowTiles, Output kOutput, Rows kRows>
__device__ __forceinline__ void multiply_in_step(const Arguments& g, unsigned char* stages) {
  constexpr int kTokens = T::kTokens;
  const int lane = threadIdx.x % 32;
  const int warp = threadIdx.x / 32;
  unsigned char* const staging = stages + T::kStages * T::kStageBytes + warp * T::kStagingBytes;
  __shared__ int targets[kTokens];  // scattered: rows of y

  if constexpr (kRows != Rows::kDense) wait_for_previous_kernel();
  Loader<T, kRowTiles, kRows> loader(g);
  const int steps = loader.steps();
  int early = 0;  // steps whose weights are on their way
  if constexpr (kRows == Rows::kDense) {
    for (; early < min(T::kAhead, steps); ++early) {
      loader.copy_weights(stages + early * T::kStageBytes, early);
    }
    wait_for_previous_kernel();
  }
  for (int i = 0; i < T::kAhead; ++i) {
    if (loader.more()) {
      unsigned char* const stage = stages + i * T::kStageBytes;
      if (i >= early) loader.copy_weights(stage);
      loader.copy_tokens(stage);
      loader.advance();
    }
    copy_async_commit();
  }
  let_next_kernel_start();

  constexpr int kEnd = T::kStages * T::kStageBytes;
  int from = 0;                         // the stage that is next, as an offset
  int to = T::kAhead * T::kStageBytes;  // and the one that is copied to next
  const int weights_at = T::kWeightsAt + warp * kRowTiles * kWeightBytes + lane * 16;
  const int scales_at = T::kScalesAt + warp * kRowTiles * kScaleBytes + lane / 4 * 4;
  // From the scales of a step's first 32 columns to those of the others.
  const int second = g.w.group == 32 ? 32 : 0;
  for (int index = static_cast<int>(blockIdx.x);; index += static_cast<int>(gridDim.x)) {
    int feature_block;
    const TokenTile tile = next_tile<T, kRows>(g, index, feature_block);
    if (tile.count == 0) break;
    int target = 0;
    if constexpr (kRows == Rows::kScattered) {
      if (static_cast<int>(threadIdx.x) < tile.count) target = g.order[tile.begin + threadIdx.x];
    }

    float acc[kRowTiles][kTokens / 8][4];
#pragma unroll
    for (int i = 0; i < kRowTiles; ++i) {
#pragma unroll
      for (int j = 0; j < kTokens / 8; ++j) {
#pragma unroll
        for (int e = 0; e < 4; ++e) acc[i][j][e] = 0;
      }
    }
#if QWEN_WGMMA
    uint32_t a[2][2][4];
#endif
#pragma unroll 1
    for (int step = 0; step < steps; ++step) {
      // The stage that is next is what this thread's oldest copies fill. The barrier makes the others'
      // visible, and says that all have left the stage before last, which is copied to.
      copy_async_wait<T::kAhead - 1>();
#if QWEN_WGMMA
      warpgroup_wait<1>();
      fence_shared_for_products();
#endif
      __syncthreads();
      if (loader.more()) {
        loader.copy_weights(stages + to);
        loader.copy_tokens(stages + to);
        loader.advance();
      }
      copy_async_commit();
      to = to + T::kStageBytes < kEnd ? to + T::kStageBytes : 0;
      const unsigned char* const stage = stages + from;
      from = from + T::kStageBytes < kEnd ? from + T::kStageBytes : 0;
      const auto weights = [&](int i) {
        return *reinterpret_cast<const uint4*>(stage + weights_at + i * kWeightBytes);
      };
      const auto scales = [&](int i, int half) {
        return *reinterpret_cast<const uint32_t*>(stage + scales_at + i * kScaleBytes + half * second);
      };
#if QWEN_WGMMA
      const uint32_t operand = swizzled_tile_low(stage);
#pragma unroll
      for (int i = 0; i < kRowTiles; ++i) {
        const uint4 words = weights(i);
#pragma unroll
        for (int half = 0; half < 2; ++half) {
          if (i + half > 0) warpgroup_wait<1>();  // the products that read a[half] before
          dequantize_half(a[half], half == 0 ? words.x : words.y, half == 0 ? words.z : words.w,
                          scales(i, half));
          warpgroup_fence();
          warpgroup_mma(acc[i], a[half][0], swizzled_tile(operand + 4 * half));
          warpgroup_mma(acc[i], a[half][1], swizzled_tile(operand + 4 * half + 2));
          warpgroup_commit();
        }
      }
#else
      uint4 words[kRowTiles];
#pragma unroll
      for (int i = 0; i < kRowTiles; ++i) words[i] = weights(i);
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        uint32_t a[kRowTiles][2][4];
#pragma unroll
        for (int i = 0; i < kRowTiles; ++i) {
          dequantize_half(a[i], half == 0 ? words[i].x : words[i].y, half == 0 ? words[i].z : words[i].w,
                          scales(i, half));
        }
        multiply_half<kRowTiles, kTokens>(acc, a, stage, half);
      }
#endif
    }
#if QWEN_WGMMA
    warpgroup_wait<0>();
#endif
    if constexpr (kRows == Rows::kScattered) {
      if (static_cast<int>(threadIdx.x) < kTokens) targets[threadIdx.x] = target;
      __syncthreads();
    }
    const int feature = (feature_block * T::kTileRows + warp * kRowTiles) * (T::kFeatures / kRowTiles);
    const int features = kOutput == Output::kSwiglu ? g.w.n / 2 : g.w.n;
    const auto row_of = [&](int token) {
      return kRows == Rows::kScattered ? targets[token] : tile.begin + token;
    };
    write_tile<T, kRowTiles, kTokens, kOutput, kRows == Rows::kDense>(acc, staging, g.residual, g.y, feature,
                                                                      features, tile.count, row_of);
  }
}

template <int kWarps, int kRowTiles, int kTokens, Output kOutput, Rows kRows>
__global__ void __launch_bounds__(Launched<Tile<kWarps, kRowTiles, kTokens, kOutput>>::kThreads,
                                  Tile<kWarps, kRowTiles, kTokens, kOutput>::kBlocks)
    multiply(const __grid_constant__ Arguments g) {
  using T = Tile<kWarps, kRowTiles, kTokens, kOutput>;
  QWEN_DYNAMIC_SHARED(unaligned);
  uint32_t padding = -static_cast<uint32_t>(reinterpret_cast<uintptr_t>(unaligned)) & 1023;
#ifndef QWEN_CUDA_EMULATION
  asm volatile("" : "+r"(padding));  // or it is computed again in every step
#endif
  unsigned char* const shared = unaligned + padding;
#if QWEN_WGMMA
  if constexpr (T::kPipelined) {
    multiply_pipelined<T, kRowTiles, kOutput, kRows>(g, shared);
  } else {
    multiply_in_step<T, kRowTiles, kOutput, kRows>(g, shared);
  }
#else
  if (threadIdx.x < T::kThreads) {
    multiply_in_step<T, kRowTiles, kOutput, kRows>(g, shared);
  } else {
    wait_for_previous_kernel();
  }
#endif
}

// Whether a block fits on this GPU: one of the largest tiles takes more than some have, and as much as has
// any on which that of a pipeline is what those take without it.
template <typename T>
bool fits() {
  return T::kSharedBytes + 1024 <= max_shared_bytes();
}

// How a product's tiles are shared out.
struct Order {
  int together;    // see Arguments
  bool tile_each;  // a block a tile, not as many blocks as the machine holds at once
};

// Enqueues the product. `token_tiles`: at least as many tiles as there are of kTokens tokens.
template <int kRowTiles, int kTokens, Output kOutput, Rows kRows>
cudaError_t launch_multiply(Arguments arguments, int64_t token_tiles, Order order, cudaStream_t stream) {
  constexpr int kWarps = 8;
  using T = Tile<kWarps, kRowTiles, kTokens, kOutput>;
  const Int4Matrix& w = arguments.w;
  if (!w.is_valid() || (kOutput == Output::kSwiglu && w.n % 16 != 0)) return cudaErrorInvalidValue;
  // The kernel's offsets into the weights and their scales, of which there are fewer, are 32 bits wide.
  const int64_t tiles = int64_t{w.row_tiles()} * w.column_tiles();
  const int64_t experts = kRows == Rows::kDense ? 1 : arguments.experts;
  if (experts * tiles * kWeightBytes > int64_t{1} << 32) return cudaErrorInvalidValue;
  arguments.feature_blocks = (w.row_tiles() + T::kTileRows - 1) / T::kTileRows;
  const int64_t blocks = arguments.feature_blocks * token_tiles;
  if (blocks >= int64_t{1} << 30) return cudaErrorInvalidValue;
  arguments.token_tiles = static_cast<int>(token_tiles);
  arguments.together = static_cast<int>(std::clamp<int64_t>(order.together, 1, token_tiles));
  arguments.tiles = static_cast<int>(blocks);
  const int64_t at_once = order.tile_each ? blocks : int64_t{multiprocessors()} * T::kBlocks;
  const dim3 grid(static_cast<unsigned>(std::min(blocks, at_once)));
  return launch(multiply<kWarps, kRowTiles, kTokens, kOutput, kRows>,
                {grid, dim3(Launched<T>::kThreads), Launched<T>::kSharedBytes}, stream, arguments);
}

}  // namespace qwen::cuda::gemm
