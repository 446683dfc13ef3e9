// The core of prefill's products with int4 weights: y^T = W x^T on tensor cores.
//
// The weights are the A operand. A lane's 16 bytes of a tile are its fragments of 16 rows by 64 columns, so
// that they go from shared memory to registers in one load and are dequantized there: bf16(code * scale), as
// a dequantized bfloat16 model has them. Tokens are the B operand, from shared memory that asynchronous
// copies fill kStages deep.
//
// A block of eight warps makes 8 kRowTiles tile rows (of 16) by kTokens tokens; a warp has kRowTiles tile
// rows and all tokens. Both ways of multiplying have the accumulators in the same lanes:
//   sm_90a: wgmma, which reads the tokens from shared memory once for four warps. While one group of products
//     runs, the next weights are dequantized into the other of two sets of registers.
//   elsewhere (and in emulation): mma.sync.
#pragma once

#include "kernels/linear/gemm_output.cuh"
#include "kernels/linear/gemm_tile.cuh"
#include "kernels/linear/warpgroup.cuh"

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
  int tokens;           // dense only
  int feature_blocks;   // blocks of features: the grid is as many times the token tiles
  int tiles_per_block;  // tiles of 8 kRowTiles tile rows that a block makes one after the other; dense: 1
};

// Codes p and p + 4 of a word, times their row's scale.
__device__ __forceinline__ uint32_t dequantize(uint32_t word, int p, __nv_bfloat162 scale) {
  const uint32_t biased = biased_codes(word, p);
  const uint32_t bias = 0x43084308U;  // 136, 136
  const __nv_bfloat162 codes =
      __hsub2(reinterpret_cast<const __nv_bfloat162&>(biased), reinterpret_cast<const __nv_bfloat162&>(bias));
  const __nv_bfloat162 product = __hmul2(codes, scale);
  return reinterpret_cast<const uint32_t&>(product);
}

// A lane's fragments of 16 rows by 32 columns: a[k / 16] as mma_bf16 takes them. Words of row r, of row r + 8
// (of the lane), and their scales.
__device__ __forceinline__ void dequantize_half(uint32_t (&a)[2][4], uint32_t first, uint32_t eighth,
                                                uint32_t scales) {
  const __nv_bfloat162 both = reinterpret_cast<const __nv_bfloat162&>(scales);
  const __nv_bfloat162 low = __low2bfloat162(both);
  const __nv_bfloat162 high = __high2bfloat162(both);
#pragma unroll
  for (int block = 0; block < 2; ++block) {
    a[block][0] = dequantize(first, 2 * block, low);
    a[block][1] = dequantize(eighth, 2 * block, high);
    a[block][2] = dequantize(first, 2 * block + 1, low);
    a[block][3] = dequantize(eighth, 2 * block + 1, high);
  }
}

#if !QWEN_WGMMA
// acc += a x^T for 32 columns of a stage of tokens [kTokens][64], chunks of 16 bytes swizzled by the row.
template <int kRowTiles, int kTokens>
__device__ __forceinline__ void multiply_half(float (&acc)[kRowTiles][kTokens / 8][4],
                                              const uint32_t (&a)[kRowTiles][2][4],
                                              const unsigned char* tokens, int half) {
  const int lane = threadIdx.x % 32;
  const int row = lane % 8 + lane / 16 * 8;  // of sixteen tokens
#pragma unroll
  for (int block = 0; block < 2; ++block) {
    const int chunk = (4 * half + 2 * block + lane / 8 % 2) ^ (lane % 8);
#pragma unroll
    for (int j = 0; j < kTokens / 16; ++j) {
      uint32_t b[4];
      load_matrix_x4(b, tokens + (16 * j + row) * kRowBytes + chunk * 16);
      const uint32_t first[2] = {b[0], b[1]};
      const uint32_t second[2] = {b[2], b[3]};
#pragma unroll
      for (int i = 0; i < kRowTiles; ++i) {
        mma_bf16(acc[i][2 * j], a[i][block], first);
        mma_bf16(acc[i][2 * j + 1], a[i][block], second);
      }
    }
  }
}
#endif

template <int kRowTiles, int kTokens, Output kOutput, Rows kRows>
__global__ void __launch_bounds__(kThreads, Tile<kRowTiles, kTokens, kOutput>::kBlocks)
    multiply(Arguments g) {
  using T = Tile<kRowTiles, kTokens, kOutput>;
  constexpr int kCopies = kTokens < 32 ? 1 : kTokens / 32;  // of 16 bytes of tokens, a thread's a stage

  QWEN_DYNAMIC_SHARED(unaligned);
  unsigned char* const tokens_shared = unaligned + (-reinterpret_cast<uintptr_t>(unaligned) & 1023);
  const int lane = threadIdx.x % 32;
  const int warp = threadIdx.x / 32;
  unsigned char* const weights_shared =
      tokens_shared + T::kStages * T::kTokenBytes + warp * kRowTiles * kWeightBytes;
  unsigned char* const scales_shared = tokens_shared +
                                       T::kStages * (T::kTokenBytes + T::kTileRows * kWeightBytes) +
                                       warp * kRowTiles * kScaleBytes;
  unsigned char* const staging = tokens_shared + T::kStages * T::kStageBytes + warp * T::kStagingBytes;
  __shared__ int targets[kTokens];  // scattered: rows of y

  const Int4Matrix w = g.w;
  const int steps = w.column_tiles();
  const int row_tiles = w.row_tiles();
  const int tiles_per_block = kRows == Rows::kScattered ? g.tiles_per_block : 1;
  RoutedTile tile;
  int feature_block;
  if constexpr (kRows == Rows::kDense) {
    const int token_tiles = (g.tokens + kTokens - 1) / kTokens;  // next to each other: they share weights
    feature_block = blockIdx.x / token_tiles;
    tile = {0, static_cast<int>(blockIdx.x % token_tiles) * kTokens, 0};
    tile.count = min(kTokens, g.tokens - tile.begin);
  } else {
    wait_for_previous_kernel();
    feature_block = blockIdx.x % g.feature_blocks;
    tile = find_tile<kTokens>(g.offsets, g.experts, blockIdx.x / g.feature_blocks);
    if (tile.count == 0) return;
  }
  const int first_tile = feature_block * tiles_per_block * T::kTileRows + warp * kRowTiles;
  const int my_tiles = kRows == Rows::kScattered
                           ? min(tiles_per_block, (row_tiles + T::kTileRows - 1) / T::kTileRows -
                                                      feature_block * tiles_per_block)
                           : 1;

  // What is copied next. Offsets are bytes from where the step begins in the lane's first row. Tiles past the
  // last are copies of the last, and not written.
  int load_step = 0;
  int load_block = 0;
  uint32_t weights_at[kRowTiles];
  uint32_t scales_at = 0;
  const int group_shift = w.group == 32 ? 0 : w.group == 64 ? 1 : 2;
  const int scale_chunks = w.group == 32 ? 4 : 2;  // of 16 bytes, a tile's a step
  const auto find_weights = [&] {
    const auto tile_of = [&](int i) {
      const int row_tile = min(first_tile + load_block * T::kTileRows + i, row_tiles - 1);
      return static_cast<uint32_t>(tile.expert * row_tiles + row_tile);
    };
#pragma unroll
    for (int i = 0; i < kRowTiles; ++i) weights_at[i] = tile_of(i) * steps * kWeightBytes + lane * 16;
    scales_at = tile_of(lane / scale_chunks) * w.groups() * 32 + lane % scale_chunks * 16;
  };
  find_weights();
  unsigned char* const scales_to =
      scales_shared + lane / scale_chunks * kScaleBytes + lane % scale_chunks * 16;
  const auto copy_weights = [&](int slot) {
    const char* const from = reinterpret_cast<const char*>(w.tiles) + load_step * kWeightBytes;
#pragma unroll
    for (int i = 0; i < kRowTiles; ++i) {
      copy_async_16(weights_shared + slot * T::kTileRows * kWeightBytes + i * kWeightBytes + lane * 16,
                    from + weights_at[i]);
    }
    if (lane < kRowTiles * scale_chunks) {
      const char* const scales =
          reinterpret_cast<const char*>(w.scales) + ((2 * load_step) >> group_shift) * 32;
      copy_async_16(scales_to + slot * T::kTileRows * kScaleBytes, scales + scales_at);
    }
  };

  // Rows past the last are not copied: a token's products do not depend on the others.
  constexpr uint32_t kNone = ~0U;
  uint32_t tokens_at[kCopies];
  const int token_column = threadIdx.x % 8 * 8;
  unsigned char* const tokens_to =
      tokens_shared + threadIdx.x / 8 * kRowBytes + (threadIdx.x % 8 ^ threadIdx.x / 8 % 8) * 16;
  const auto copy_tokens = [&](int slot) {
    const char* const from = reinterpret_cast<const char*>(g.x) + load_step * kRowBytes;
    const bool inside = load_step * kDepth + token_column < w.k;
#pragma unroll
    for (int i = 0; i < kCopies; ++i) {
      if (tokens_at[i] == kNone) continue;
      copy_async_16(tokens_to + slot * T::kTokenBytes + i * 32 * kRowBytes, from + tokens_at[i], inside);
    }
  };
  const auto next_copy = [&] {
    ++load_step;
    if constexpr (kRows == Rows::kScattered) {
      if (load_step < steps) return;
      load_step = 0;
      ++load_block;
      find_weights();
    }
  };
  const auto more_to_copy = [&] {
    return kRows == Rows::kScattered ? load_block < my_tiles : load_step < steps;
  };

  if constexpr (kRows == Rows::kDense) {
    for (; load_step < min(T::kAhead, steps); ++load_step) copy_weights(load_step);
    load_step = 0;
    wait_for_previous_kernel();
  }
#pragma unroll
  for (int i = 0; i < kCopies; ++i) {
    const int t = threadIdx.x / 8 + 32 * i;
    tokens_at[i] = kNone;
    if (t >= tile.count) continue;
    const int row = kRows == Rows::kGathered ? g.order[tile.begin + t] / g.top_k : tile.begin + t;
    tokens_at[i] = (static_cast<uint32_t>(row) * static_cast<uint32_t>(w.k) + token_column) * 2;
  }
  if constexpr (kRows == Rows::kScattered) {
    if (static_cast<int>(threadIdx.x) < tile.count) targets[threadIdx.x] = g.order[tile.begin + threadIdx.x];
  }
  for (int slot = 0; slot < T::kAhead; ++slot) {
    if (more_to_copy()) {
      if constexpr (kRows != Rows::kDense) copy_weights(slot);
      copy_tokens(slot);
      next_copy();
    }
    copy_async_commit();
  }
  let_next_kernel_start();

  float acc[kRowTiles][kTokens / 8][4];
  const int second =
      w.group == 32 ? 8 : 0;  // from the scales of a step's first 32 columns to those of the others
  int slot = 0;
#if QWEN_WGMMA
  uint32_t a[2][2][4];
  const uint64_t tokens_operand = swizzled_tile(tokens_shared);
#endif
  for (int block = 0; block < my_tiles; ++block) {
#pragma unroll
    for (int i = 0; i < kRowTiles; ++i) {
#pragma unroll
      for (int j = 0; j < kTokens / 8; ++j) {
#pragma unroll
        for (int e = 0; e < 4; ++e) acc[i][j][e] = 0;
      }
    }
#pragma unroll 1
    for (int step = 0; step < steps; ++step) {
      // The stage in `slot` is what this thread's oldest copies fill. The barrier makes the others' visible,
      // and says that all have left the stage before last, which is copied to next.
      copy_async_wait<T::kAhead - 1>();
#if QWEN_WGMMA
      warpgroup_wait<1>();
      fence_shared_for_products();
#endif
      __syncthreads();
      if (more_to_copy()) {
        const int target = slot + T::kAhead - (slot + T::kAhead < T::kStages ? 0 : T::kStages);
        copy_weights(target);
        copy_tokens(target);
        next_copy();
      }
      copy_async_commit();
      const auto weights = [&](int i) {
        return reinterpret_cast<const uint4*>(weights_shared +
                                              (slot * T::kTileRows + i) * kWeightBytes)[lane];
      };
      const auto scales = [&](int i, int half) {
        const unsigned char* row = scales_shared + (slot * T::kTileRows + i) * kScaleBytes;
        return reinterpret_cast<const uint32_t*>(row)[lane / 4 + half * second];
      };
#if QWEN_WGMMA
      const uint64_t operand = tokens_operand + slot * (T::kTokenBytes / 16);
#pragma unroll
      for (int i = 0; i < kRowTiles; ++i) {
        const uint4 words = weights(i);
#pragma unroll
        for (int half = 0; half < 2; ++half) {
          if (i + half > 0) warpgroup_wait<1>();  // the products that read a[half] before
          dequantize_half(a[half], half == 0 ? words.x : words.y, half == 0 ? words.z : words.w,
                          scales(i, half));
          warpgroup_fence();
          warpgroup_mma(acc[i], a[half][0], operand + 4 * half);
          warpgroup_mma(acc[i], a[half][1], operand + 4 * half + 2);
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
        multiply_half<kRowTiles, kTokens>(acc, a, tokens_shared + slot * T::kTokenBytes, half);
      }
#endif
      slot = slot + 1 < T::kStages ? slot + 1 : 0;
    }
#if QWEN_WGMMA
    warpgroup_wait<0>();
#endif
    const int feature = (first_tile + block * T::kTileRows) * (T::kFeatures / kRowTiles);
    const int features = kOutput == Output::kSwiglu ? w.n / 2 : w.n;
    const auto row_of = [&](int token) {
      return kRows == Rows::kScattered ? targets[token] : tile.begin + token;
    };
    write_tile<kRowTiles, kTokens, kOutput, kRows == Rows::kDense>(acc, staging, g.residual, g.y, feature,
                                                                   features, tile.count, row_of);
  }
}

// Enqueues the product. `token_tiles`: at least as many tiles as there are of kTokens tokens.
template <int kRowTiles, int kTokens, Output kOutput, Rows kRows>
cudaError_t launch_multiply(Arguments arguments, int token_tiles, int tiles_per_block, cudaStream_t stream) {
  using T = Tile<kRowTiles, kTokens, kOutput>;
  const Int4Matrix& w = arguments.w;
  if (!w.is_valid() || (kOutput == Output::kSwiglu && w.n % 16 != 0)) return cudaErrorInvalidValue;
  // The kernel's offsets into the weights and their scales, of which there are fewer, are 32 bits wide.
  const int64_t tiles = int64_t{w.row_tiles()} * w.column_tiles();
  const int64_t experts = kRows == Rows::kDense ? 1 : arguments.experts;
  if (experts * tiles * kWeightBytes > int64_t{1} << 32) return cudaErrorInvalidValue;
  arguments.tiles_per_block = tiles_per_block;
  const int rows = T::kTileRows * tiles_per_block;
  arguments.feature_blocks = (arguments.w.row_tiles() + rows - 1) / rows;
  const dim3 grid(static_cast<unsigned>(arguments.feature_blocks) * static_cast<unsigned>(token_tiles));
  return launch(multiply<kRowTiles, kTokens, kOutput, kRows>, {grid, dim3(kThreads), T::kSharedBytes}, stream,
                arguments);
}

}  // namespace qwen::cuda::gemm
