// Prefill's attention on Hopper (sm_90a). A block is two warpgroups of 64 rows each and a warp that copies
// keys and values ahead of them. A warpgroup's products of one tile's queries and keys run beside those of
// the tile before with its values, and its softmax under the other's products.
#pragma once

#include "kernels/attention/prefill_parts.cuh"

namespace qwen::cuda::prefill_attention {

// What a block sees of a context.
struct PartOfContext {
  int last_key;  // that a row of its tile sees, the end
  int tiles;     // of kKeys, of the whole context
  int size;      // of a part, in tiles
  int first;     // of this block's part
  int end;
};

// grid: for each tile of kRows rows and key head, the blocks of a cluster.
template <typename P>
#if QWEN_WGMMA
__global__ void __launch_bounds__(P::kThreads, 1)
#else
__global__ void __launch_bounds__(32)  // what is_pipelined() looks at
#endif
    attend_pipelined(const __grid_constant__ PipelineArguments p) {
#if QWEN_WGMMA
  constexpr int kDim = P::kDim;
  constexpr int kKeys = P::kKeys;
  constexpr int kRows = P::kRows;
  constexpr int kOperand = 8;  // elements of a descriptor's unit
  using Rows = Tile<kDim, kRows>;
  using At = Tile<kDim, kKeys>;
  QWEN_DYNAMIC_SHARED(unaligned);
  __shared__ uint64_t full[P::kSlots];
  __shared__ uint64_t empty[P::kSlots];
  __shared__ uint64_t landed;
  __shared__ float2 scales[kRows];
  const uint32_t padding = -static_cast<uint32_t>(reinterpret_cast<uintptr_t>(unaligned)) & 1023;
  bf16* const queries = reinterpret_cast<bf16*>(unaligned + padding);
  bf16* const ring = queries + Rows::kSize;
  const Arguments& a = p.a;
  const AttentionShape& shape = a.shape;
  const int thread = static_cast<int>(threadIdx.x);
  const int lane = thread % 32;
  const int warp = __shfl_sync(~0U, thread / 32, 0);
  const int heads = shape.query_heads / shape.key_heads;  // of a key head
  if (thread == 0) {
    for (int i = 0; i < P::kSlots; ++i) {
      barrier_init(full + i, 1);
      barrier_init(empty + i, P::kWarps);
    }
    barrier_init(&landed, 1);
    fence_barriers();
    prefetch_map(&p.keys);
    prefetch_map(&p.values);
  }
  __syncthreads();
  const int blocks = 1 << p.part_bits;  // of the cluster
  if (blocks > 1) cluster_begin();

  // What needs no memory comes before the wait for it. The longest contexts first, the shortest fill the gaps
  // at the end.
  const int rank = static_cast<int>(blockIdx.x) & (blocks - 1);
  const int index = static_cast<int>(blockIdx.x) >> p.part_bits;
  const int key_head = index % shape.key_heads;
  const int row_tiles = static_cast<int>(gridDim.x >> p.part_bits) / shape.key_heads;
  const int first_row = (row_tiles - 1 - index / shape.key_heads) * kRows;
  const int end_row = min(first_row + kRows, a.tokens * heads);
  const int first_token = first_row / heads;
  const int end_token = (end_row - 1) / heads + 1;
  const auto part = [&](int position) {
    const int tiles = (position + end_token + kKeys - 1) / kKeys;
    const int size = max((tiles + blocks - 1) >> p.part_bits, P::kLeastTiles);
    return PartOfContext{position + end_token, tiles, size, rank * size, min((rank + 1) * size, tiles)};
  };

  if (warp >= P::kWarps) {
    give_registers<24>();
    wait_for_previous_kernel();
    let_next_kernel_start();
    if (warp == P::kWarps) {
      const PartOfContext mine = part(static_cast<int>(a.position[0]));
      const int matrix = static_cast<int>(a.slot[0]) * shape.key_heads + key_head;
      fence_global_for_copies();
      fill_ring<P>(p, ring, full, empty, &landed, matrix, mine.first, mine.end, mine.last_key, lane);
    } else {
      prefetch_gates(a, first_row, end_row, key_head, heads, thread - 32 * (P::kWarps + 1), 96);
    }
    return;
  }
  take_registers<240>();
  const int r = lane / 4;
  const int q = lane % 4;
  const int group = warp / 4;
  const int warp_row = 16 * warp;
  const auto group_barrier = [&] { named_barrier(1 + group, 128); };
  const int row_token[2] = {(first_row + warp_row + r) / heads, (first_row + warp_row + r + 8) / heads};
  wait_for_previous_kernel();
  let_next_kernel_start();
  const int position = static_cast<int>(a.position[0]);
  copy_queries<kRows, kDim>(queries, a, first_row, warp_row, end_row, key_head, heads, lane);
  copy_async_commit();
  const PartOfContext mine = part(position);
  const int first = mine.first;
  const int end = mine.end;
  // Tiles before see the keys of no row masked.
  const int first_masked = (position + first_token + 1) / kKeys;
  copy_async_wait<0>();
  if (mine.size >= mine.tiles && rank > 0) {
    cluster_wait();
    return;
  }
  fence_shared_for_products();
  group_barrier();

  float result[kDim / 8][4];
#pragma unroll
  for (auto& c : result) c[0] = c[1] = c[2] = c[3] = 0;
  float scores[kKeys / 8][4];
  uint32_t weights[kKeys / 16][4];
  // Of rows r and r + 8, what was subtracted of scores times log2(e): about the maximum, and finite where a
  // row has seen no key.
  float maximum[2] = {-1e30F, -1e30F};
  float sum[2] = {0, 0};  // this lane's columns'
  const float score_scale = p.score_scale;
  const uint64_t query_operand = swizzled_tile(queries + group * 64 * 64);
  const uint64_t key_operand = swizzled_tile(ring);
  const uint64_t value_operand = swizzled_columns<kKeys>(ring);
  Place<P::kSlots> place;

  const auto multiply_keys = [&]() __attribute__((always_inline)) {
    barrier_wait(full + place.slot, place.parity);
    const uint64_t keys = key_operand + place.slot * (At::kSize / kOperand);
    warpgroup_fence();
#pragma unroll
    for (int k = 0; k < kDim / 16; ++k) {
      multiply_tiles(scores, query_operand + k / 4 * (Rows::kBlock / kOperand) + 2 * (k % 4),
                     keys + k / 4 * (At::kBlock / kOperand) + 2 * (k % 4), k > 0);
    }
    warpgroup_commit();
  };
  const auto multiply_values = [&]() __attribute__((always_inline)) {
    barrier_wait(full + place.slot, place.parity);
    const uint64_t values = value_operand + place.slot * (At::kSize / kOperand);
    warpgroup_fence();
#pragma unroll
    for (int k = 0; k < kKeys / 16; ++k) {
      warpgroup_mma<true>(result, weights[k], values + k * (16 * 64 / kOperand));
    }
    warpgroup_commit();
  };
  const auto release = [&](int slot) __attribute__((always_inline)) {
    if (lane == 0) barrier_arrive(empty + slot);
  };
  // Makes scores weights, and says by what the results before are to be multiplied.
  const auto weigh = [&](int t, float (&rescale)[2]) __attribute__((always_inline)) {
    if (t >= first_masked) {
      int last[2];  // of this lane's columns, from its first
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        last[i] = position + row_token[i] - t * kKeys - 2 * q;
      }
#pragma unroll
      for (int n = 0; n < kKeys / 8; ++n) {
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          if (8 * n + i % 2 > last[i / 2]) scores[n][i] = -INFINITY;
        }
      }
    }
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      float top = scores[0][2 * i];
#pragma unroll
      for (auto& c : scores) top = fmaxf(top, fmaxf(c[2 * i], c[2 * i + 1]));
      top = warp_max(top, 4) * score_scale;
      // Weights may be as large as 2^8, so that what they are relative to rarely changes.
      const float next = top > maximum[i] + 8.0F ? top : maximum[i];
      rescale[i] = power_of_2(maximum[i] - next);
      maximum[i] = next;
      float added = 0;
#pragma unroll
      for (auto& c : scores) {
        c[2 * i] = power_of_2(fmaf(c[2 * i], score_scale, -next));
        c[2 * i + 1] = power_of_2(fmaf(c[2 * i + 1], score_scale, -next));
        added += c[2 * i] + c[2 * i + 1];
      }
      sum[i] = fmaf(sum[i], rescale[i], added);
    }
  };
  const auto pack = [&]() __attribute__((always_inline)) {
#pragma unroll
    for (int k = 0; k < kKeys / 16; ++k) {
      const auto& low = scores[2 * k];
      const auto& high = scores[2 * k + 1];
      weights[k][0] = pack_bf16(low[0], low[1]);
      weights[k][1] = pack_bf16(low[2], low[3]);
      weights[k][2] = pack_bf16(high[0], high[1]);
      weights[k][3] = pack_bf16(high[2], high[3]);
    }
  };

  if (first < end) {
    float rescale[2];
    multiply_keys();
    warpgroup_wait<0>();
    settle_products(scores);
    release(place.slot);
    place.advance();
    weigh(first, rescale);
    pack();
#pragma unroll 1
    for (int t = first + 1; t < end; ++t) {
      multiply_keys();
      const int keys_slot = place.slot;
      place.advance();
      multiply_values();
      warpgroup_wait<1>();
      settle_products(scores);
      release(keys_slot);
      weigh(t, rescale);
      warpgroup_wait<0>();
      settle_products(result);
      release(place.slot);
      place.advance();
      if (__any_sync(~0U, rescale[0] != 1.0F || rescale[1] != 1.0F)) {
#pragma unroll
        for (auto& c : result) {
          c[0] *= rescale[0];
          c[1] *= rescale[0];
          c[2] *= rescale[1];
          c[3] *= rescale[1];
        }
      }
      pack();
    }
    multiply_values();
    warpgroup_wait<0>();
    settle_products(result);
  }
#pragma unroll
  for (float& all : sum) all = warp_sum(all, 4);

  if (blocks > 1) cluster_wait();  // all its blocks have begun
  if (mine.size < mine.tiles) {
    float* const results = reinterpret_cast<float*>(ring);
    named_barrier(3, 32 * P::kWarps);  // the ring is used up
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const int row = warp_row + r + 8 * i;
      if (q == 0) scales[row] = {maximum[i], sum[i]};
#pragma unroll
      for (int n = 0; n < kDim / 8; ++n) {
        *reinterpret_cast<float2*>(results + part_offset<P>(row, n) + 2 * q) = {result[n][2 * i],
                                                                                result[n][2 * i + 1]};
      }
    }
    cluster_arrive();
    cluster_wait();
    const int parts = (mine.tiles + mine.size - 1) / mine.size;
    add_parts<P>(a, results, scales, parts, blocks, first_row, end_row, key_head, heads, warp, lane);
    cluster_arrive();
    cluster_wait();  // none reads this block's memory any more
    return;
  }

  // Through the warp's own rows of shared memory, so that it stores whole rows.
  group_barrier();  // the queries are used up
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    const float scale = __fdividef(1.0F, sum[i]);
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
