// The memory of a block of prefill's attention on Hopper: queries, and a ring of tiles of keys and values
// that one warp fills.
#pragma once

#include "kernels/attention/copy_engine.cuh"
#include "kernels/attention/prefill_rows.cuh"

namespace qwen::cuda::prefill_attention {

struct PipelineArguments {
  CUtensorMap keys;  // [S Hkv, L, Dh]
  CUtensorMap values;
  Arguments a;
  int part_bits;  // a context has at most 2^part_bits parts: the blocks of a cluster
  float score_scale;
};

template <int kHeadDim>
struct Pipeline {
  static constexpr int kDim = kHeadDim;
  // 80 keys make tiles four of which fit beside the queries, and scores that fit beside the results.
  static constexpr int kKeys = 80;
  static constexpr int kSlots = 4;
  static constexpr int kWarps = 8;  // that multiply
  static constexpr int kRows = 16 * kWarps;
  static constexpr int kThreads = 32 * kWarps + 128;
  static constexpr int kMostParts = 8;
  static constexpr int kLeastTiles = 3;  // of a part
  static constexpr int kSlotBytes = kKeys * kDim * static_cast<int>(sizeof(bf16));
  static constexpr int kSharedBytes =
      1024 + kRows * kDim * static_cast<int>(sizeof(bf16)) + kSlots * kSlotBytes;
  static_assert(kSlots * kSlotBytes >= kRows * kDim * static_cast<int>(sizeof(float)));  // a part's results
};

#if QWEN_WGMMA

// Tile after tile of the ring, for the warp that fills it and for those that use it.
template <int kSlots>
struct Place {
  int slot = 0;
  uint32_t parity = 0;
  __device__ __forceinline__ void advance() {
    if (++slot < kSlots) return;
    slot = 0;
    parity ^= 1;
  }
};

// One warp's work: copies keys and values of tiles first to end in the order in which they are used. Keys and
// values from last_key on may be anything; zero times it need not be zero, so these values become zeros.
template <typename P>
__device__ __forceinline__ void fill_ring(const PipelineArguments& p, bf16* ring, uint64_t* full,
                                          uint64_t* empty, uint64_t* landed, int matrix, int first, int end,
                                          int last_key, int lane) {
  using At = Tile<P::kDim, P::kKeys>;
  Place<P::kSlots> place;
  const auto copy = [&](const CUtensorMap* map, int t, bool ragged) {
    barrier_wait(empty + place.slot, place.parity ^ 1);
    bf16* const to = ring + place.slot * At::kSize;
    uint64_t* const barrier = ragged ? landed : full + place.slot;
    if (lane == 0) {
      barrier_expect(barrier, P::kSlotBytes);
#pragma unroll
      for (int c = 0; c < P::kDim / 64; ++c) {
        copy_box(to + c * At::kBlock, map, matrix, t * P::kKeys, 64 * c, barrier);
      }
    }
    __syncwarp();
    if (ragged) {
      barrier_wait(landed, 0);
      for (int i = (last_key - t * P::kKeys) * At::kChunks + lane; i < P::kKeys * At::kChunks; i += 32) {
        store_16(to + At::offset(i / At::kChunks, i % At::kChunks), {0, 0, 0, 0});
      }
      fence_shared_for_products();
      __syncwarp();
      if (lane == 0) barrier_arrive(full + place.slot);
    }
    place.advance();
  };
  if (first >= end) return;
  copy(&p.keys, first, false);
#pragma unroll 1
  for (int t = first + 1; t < end; ++t) {
    copy(&p.keys, t, false);
    copy(&p.values, t - 1, false);
  }
  copy(&p.values, end - 1, end * P::kKeys > last_key);
}

// Has what write_rows() reads in L2, for it waits for that with nothing else to do.
__device__ __forceinline__ void prefetch_gates(const Arguments& a, int first_row, int end_row, int key_head,
                                               int heads, int thread, int threads) {
  const int dim = a.shape.head_dim;
  const int lines = (dim + 63) / 64;  // of 128 bytes
  for (int i = thread; i < (end_row - first_row) * lines; i += threads) {
    const int row = first_row + i / lines;
    const int head = key_head * heads + row % heads;
    const bf16* const gate = a.qkv + static_cast<int64_t>(row / heads) * a.shape.row_size() +
                             (2 * head + 1) * dim + i % lines * 64;
    asm volatile("prefetch.global.L2 [%0];" ::"l"(gate));
  }
}

#endif  // QWEN_WGMMA

}  // namespace qwen::cuda::prefill_attention
