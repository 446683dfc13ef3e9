// Prefill's attention where there are no warpgroup products (prefill_pipeline.cuh has them): tile by tile
// with an online softmax on tensor cores.
#pragma once

#include "kernels/attention/prefill_rows.cuh"
#include "kernels/linear/warpgroup.cuh"

namespace qwen::cuda::prefill_attention {

inline constexpr int kKeys = 64;

// Keys or values first to first + kKeys of the head at head_offset; rows from `end` on are zero: they may
// hold anything.
template <int kDim, int kThreads>
__device__ __forceinline__ void copy_rows(bf16* to, const bf16* cache, int64_t head_offset, int first,
                                          int end, int head_dim, int thread) {
  using At = Tile<kDim, kKeys>;
  constexpr int kRowsAtOnce = kThreads / At::kChunks;
  const int chunk = thread % At::kChunks;
  const int first_row = thread / At::kChunks;
  const int rows = 8 * chunk < head_dim ? end - first : 0;
  const bf16* from = cache + head_offset + static_cast<int64_t>(first + first_row) * head_dim + 8 * chunk;
#pragma unroll
  for (int i = 0; i < kKeys / kRowsAtOnce; ++i) {
    const int row = first_row + i * kRowsAtOnce;
    copy_async_16(to + At::offset(row, chunk), row < rows ? from : cache, row < rows);
    from += kRowsAtOnce * head_dim;
  }
}

// A block's shape. Of eight warps, whose keys and values come a tile ahead, one fits on a multiprocessor; of
// four, two, so that one's products hide the other's softmax.
template <int kDim, int kWarpCount>
struct Shape {
  static constexpr int kWarps = kWarpCount;
  static constexpr int kThreads = 32 * kWarps;
  static constexpr int kRows = 16 * kWarps;
  static constexpr int kBlocks = kWarps == 4 ? 2 : 1;
  static constexpr int kStages = kWarps == 4 ? 1 : 2;
  static constexpr int kSharedBytes =
      1024 + (kRows + 2 * kStages * kKeys) * kDim * static_cast<int>(sizeof(bf16));
};

// grid: (key heads, tiles of kRows rows). Lane 4 r + q of a warp holds rows r and r + 8 of its 16, columns 2
// q and 2 q + 1 of each 8.
template <int kDim, int kWarpCount>
__global__ void __launch_bounds__(Shape<kDim, kWarpCount>::kThreads, Shape<kDim, kWarpCount>::kBlocks)
    attend(const __grid_constant__ Arguments a) {
#if !QWEN_WGMMA
  using S = Shape<kDim, kWarpCount>;
  using Rows = Tile<kDim, S::kRows>;
  using At = Tile<kDim, kKeys>;
  constexpr int kRows = S::kRows;
  constexpr int kThreads = S::kThreads;
  QWEN_DYNAMIC_SHARED(unaligned);
  uint32_t padding = -static_cast<uint32_t>(reinterpret_cast<uintptr_t>(unaligned)) & 1023;
#ifndef QWEN_CUDA_EMULATION
  asm volatile("" : "+r"(padding));  // or it is computed again for every tile
#endif
  bf16* const queries = reinterpret_cast<bf16*>(unaligned + padding);
  bf16* const first_keys = queries + Rows::kSize;  // then values, then those of the other stage
  const AttentionShape& shape = a.shape;
  const int thread = static_cast<int>(threadIdx.x);
  const int lane = thread % 32;
  const int warp = thread / 32;
  const int r = lane / 4;
  const int q = lane % 4;
  const int dim = shape.head_dim;
  const int key_head = static_cast<int>(blockIdx.x);
  const int heads = shape.query_heads / shape.key_heads;  // of this key head
  // The longest contexts first, the shortest fill the gaps at the end.
  const int first_row = static_cast<int>(gridDim.y - 1 - blockIdx.y) * kRows;
  const int end_row = min(first_row + kRows, a.tokens * heads);

  wait_for_previous_kernel();
  let_next_kernel_start();
  const int position = static_cast<int>(a.position[0]);
  const int64_t cache_offset = (a.slot[0] * shape.key_heads + key_head) * shape.cache_length * dim;
  const int end = position + (end_row - 1) / heads + 1;  // of the keys that a row of the tile sees
  const int tiles = (end + kKeys - 1) / kKeys;
  // Tiles before see the keys of no row masked.
  const int first_masked = (position + first_row / heads + 1) / kKeys;

  copy_queries<kRows, kDim>(queries, a, first_row, 16 * warp, end_row, key_head, heads, lane);
  const auto keys_of = [&](int t) { return first_keys + t % S::kStages * 2 * At::kSize; };
  const auto values_of = [&](int t) { return keys_of(t) + At::kSize; };
  const auto copy_keys = [&](int t) {
    if (t < tiles)
      copy_rows<kDim, kThreads>(keys_of(t), a.key_cache, cache_offset, t * kKeys, end, dim, thread);
    copy_async_commit();
  };
  const auto copy_values = [&](int t) {
    if (t < tiles)
      copy_rows<kDim, kThreads>(values_of(t), a.value_cache, cache_offset, t * kKeys, end, dim, thread);
    copy_async_commit();
  };
  // What was copied is there, for products of warpgroups too, and all have left what is copied to next.
  const auto arrive = [&] {
    copy_async_wait<0>();
    __syncthreads();
  };
  copy_keys(0);
  if constexpr (S::kStages == 1) arrive();
  copy_values(0);

  float result[kDim / 8][4];
#pragma unroll
  for (auto& c : result) c[0] = c[1] = c[2] = c[3] = 0;
  float maximum[2] = {-INFINITY, -INFINITY};  // of rows r and r + 8, of scores times log2(e)
  float sum[2] = {0, 0};                      // this lane's columns'
  const float score_scale = kLog2E / sqrtf(static_cast<float>(dim));
  const int warp_row = 16 * warp;
  const int query_offset = Rows::offset(warp_row + lane % 16, lane / 16);
  const int key_offset = At::offset(lane % 8 + lane / 16 * 8, lane / 8 % 2);
  const int value_offset = At::offset(lane % 16, lane / 16);

  for (int t = 0; t < tiles; ++t) {
    const int first_key = t * kKeys;
    if constexpr (S::kStages == 2) {
      arrive();
      copy_keys(t + 1);
      copy_values(t + 1);
    }
    float scores[kKeys / 8][4];
    const bf16* const keys = keys_of(t);
#pragma unroll
    for (auto& c : scores) c[0] = c[1] = c[2] = c[3] = 0;
#pragma unroll
    for (int k = 0; k < kDim / 16; ++k) {
      uint32_t query[4];
      load_matrix_x4(query, queries + Rows::advance(query_offset, k));
#pragma unroll
      for (int n = 0; n < kKeys / 16; ++n) {
        uint32_t key[4];
        load_matrix_x4(key, keys + 16 * n * 64 + At::advance(key_offset, k));
        mma_bf16(scores[2 * n], query, {key[0], key[1]});
        mma_bf16(scores[2 * n + 1], query, {key[2], key[3]});
      }
    }
    if constexpr (S::kStages == 1) {
      arrive();  // the values are here, the keys are used up
      copy_keys(t + 1);
    }

    if (t >= first_masked) {
      int last_key[2];
#pragma unroll
      for (int i = 0; i < 2; ++i) last_key[i] = position + (first_row + warp_row + r + 8 * i) / heads;
#pragma unroll
      for (int n = 0; n < kKeys / 8; ++n) {
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          if (first_key + 8 * n + 2 * q + i % 2 > last_key[i / 2]) scores[n][i] = -INFINITY;
        }
      }
    }
    // Every row sees key 0, so its maximum is finite from the first tile on.
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      float top = scores[0][2 * i];
#pragma unroll
      for (auto& c : scores) top = fmaxf(top, fmaxf(c[2 * i], c[2 * i + 1]));
      top = fmaxf(warp_max(top, 4) * score_scale, maximum[i]);
      const float rescale = exp2f(maximum[i] - top);
      maximum[i] = top;
      sum[i] *= rescale;
#pragma unroll
      for (auto& c : scores) {
        c[2 * i] = exp2f(fmaf(c[2 * i], score_scale, -top));
        c[2 * i + 1] = exp2f(fmaf(c[2 * i + 1], score_scale, -top));
        sum[i] += c[2 * i] + c[2 * i + 1];
      }
      // Once the maximum has settled, it rarely changes.
      if (__any_sync(~0U, rescale != 1.0F)) {
#pragma unroll
        for (auto& c : result) {
          c[2 * i] *= rescale;
          c[2 * i + 1] *= rescale;
        }
      }
    }

    const auto pack = [&](uint32_t (&weights)[4], int k) {
      const auto& low = scores[2 * k];
      const auto& high = scores[2 * k + 1];
      weights[0] = pack_bf16(low[0], low[1]);
      weights[1] = pack_bf16(low[2], low[3]);
      weights[2] = pack_bf16(high[0], high[1]);
      weights[3] = pack_bf16(high[2], high[3]);
    };
    const bf16* const values = values_of(t);
#pragma unroll
    for (int k = 0; k < kKeys / 16; ++k) {
      uint32_t weights[4];
      pack(weights, k);
#pragma unroll
      for (int n = 0; n < kDim / 16; ++n) {
        uint32_t value[4];
        load_matrix_x4_transposed(value, values + 16 * k * 64 + At::advance(value_offset, n));
        mma_bf16(result[2 * n], weights, {value[0], value[1]});
        mma_bf16(result[2 * n + 1], weights, {value[2], value[3]});
      }
    }
    if constexpr (S::kStages == 1) {
      arrive();  // the next keys are here, the values are used up
      copy_values(t + 1);
    }
  }
  __syncthreads();  // the queries are used up

  // Through the warp's own rows of shared memory, so that it stores whole rows.
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    const float scale = 1.0F / warp_sum(sum[i], 4);
#pragma unroll
    for (int n = 0; n < kDim / 8; ++n) {
      const uint32_t pair = pack_bf16(result[n][2 * i] * scale, result[n][2 * i + 1] * scale);
      *reinterpret_cast<uint32_t*>(queries + Rows::offset(warp_row + r + 8 * i, n) + 2 * q) = pair;
    }
  }
  __syncwarp();
  write_rows<kRows, kDim>(a, queries, first_row, warp_row, end_row, key_head, heads, lane);
#endif
}

}  // namespace qwen::cuda::prefill_attention
