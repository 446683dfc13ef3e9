// Prefill's products in large tiles, where there are warpgroup products: two warpgroups that multiply, and
// four warps that only copy for them, in a ring of stages. Barriers in shared memory are all that connects
// them, so that each warpgroup goes on as soon as its next stage is there: while one dequantizes, waits or
// writes, the other's products run.
//
// A tile has many features and few tokens: the tokens' copies cost more instructions than the weights'.
#pragma once

#include "kernels/linear/barrier.cuh"
#include "kernels/linear/gemm_fragments.cuh"
#include "kernels/linear/gemm_loader.cuh"
#include "kernels/linear/gemm_output.cuh"

namespace qwen::cuda::gemm {

template <typename T>
struct Pipeline {
  static constexpr int kThreads = 128;  // that copy
  static constexpr int kMaxStages = 8;
  static constexpr int kTargetBytes = T::kWarps * T::kTokens * static_cast<int>(sizeof(int32_t));
  static constexpr int kFixedBytes =
      1024 + T::kWarps * T::kStagingBytes + kTargetBytes + kMaxStages * (sizeof(int4) + 2 * sizeof(uint64_t));
  static constexpr int kFit = (227 * 1024 - kFixedBytes) / T::kStageBytes;
  static constexpr int kStages = kFit < kMaxStages ? kFit : kMaxStages;
  static constexpr int kSharedBytes = kFixedBytes + kStages * T::kStageBytes;
  // A thread's; together as many as the 168 that each of the block's begins with.
  static constexpr int kCopyRegisters = 72;
  static constexpr int kMultiplyRegisters = (3 * 168 - kCopyRegisters) / 2;
};

#if QWEN_WGMMA

// What both sides have of the ring.
template <typename T>
struct Ring {
  using P = Pipeline<T>;
  __device__ __forceinline__ explicit Ring(unsigned char* shared)
      : stages(shared),
        staging(stages + P::kStages * T::kStageBytes),
        targets(reinterpret_cast<int32_t*>(staging + T::kWarps * T::kStagingBytes)),
        tiles(reinterpret_cast<int4*>(targets + T::kWarps * T::kTokens)),
        full(shared_address(tiles + P::kMaxStages)),
        empty(full + P::kMaxStages * sizeof(uint64_t)) {}

  __device__ __forceinline__ void init() const {
    if (threadIdx.x == 0) {
      for (int i = 0; i < P::kStages; ++i) {
        barrier_init(full + 8 * i, P::kThreads + 1);
        barrier_init(empty + 8 * i, T::kWarps);
      }
      fence_barrier_init();
    }
    __syncthreads();
  }

  unsigned char* const stages;
  unsigned char* const staging;
  int32_t* const targets;  // scattered: rows of y, a warp's own
  int4* const tiles;       // of each stage: first row, rows (0: the end), block of features
  const uint32_t full;
  const uint32_t empty;
};

// A place in the ring.
template <typename T>
struct Stage {
  int index = 0;
  uint32_t parity = 0;
  __device__ __forceinline__ void advance() {
    if (++index < Pipeline<T>::kStages) return;
    index = 0;
    parity ^= 1;
  }
};

// The copies of all of the block's tiles, step after step.
template <typename T, int kRowTiles, Rows kRows>
__device__ __forceinline__ void copy_tiles(const Arguments& g, const Ring<T>& ring) {
  constexpr int kRowsAtOnce = Pipeline<T>::kThreads / 8;
  constexpr int kCopies = T::kTokens / kRowsAtOnce;  // of 16 bytes, a thread's
  constexpr int kPointers = kRows == Rows::kGathered ? kCopies : 1;
  constexpr int kWarpTiles = T::kTileRows / 4;  // tile rows whose weights a warp has copied, a lane each
  const int thread = static_cast<int>(threadIdx.x) - T::kThreads;
  const int weight_row = thread / 32 * kWarpTiles + thread % 32;  // of the tile, if among the warp's
  const int row = thread / 8;
  const int column = thread % 8 * 8;
  const int steps = g.w.column_tiles();
  const int row_tiles = g.w.row_tiles();
  const int ragged = g.w.k % kDepth;  // columns of the last step, where they are not all
  const int ragged_step = ragged != 0 && column >= ragged ? steps - 1 : -1;
  const int tokens_to = row * kRowBytes + (thread % 8 ^ row % 8) * 16;
  const int scale_chunks = g.w.group == 32 ? 4 : 2;  // of 16 bytes, a tile's a step
  const int scale_shift = g.w.group == 128 ? 4 : g.w.group == 64 ? 5 : 6;
  const int scales_to = T::kScalesAt + thread / scale_chunks * kScaleBytes + thread % scale_chunks * 16;
  static_assert(4 * T::kTileRows <= Pipeline<T>::kThreads);  // a chunk a thread

  Stage<T> stage;
  bool waited = kRows != Rows::kDense;
  for (int index = static_cast<int>(blockIdx.x);; index += static_cast<int>(gridDim.x)) {
    int feature_block;
    const TokenTile tile = next_tile<T, kRows>(g, index, feature_block);
    if (tile.count == 0) break;
    const int first = feature_block * T::kTileRows;
    const int present = min(T::kTileRows, row_tiles - first);  // tile rows; what others hold is not written
    const bool copies_weights = thread % 32 < kWarpTiles && weight_row < present;
    const int64_t tile_row = int64_t{tile.expert} * row_tiles + first;
    const unsigned char* weights =
        reinterpret_cast<const unsigned char*>(g.w.tiles) + (tile_row + weight_row) * steps * kWeightBytes;
    const unsigned char* const scales =
        reinterpret_cast<const unsigned char*>(g.w.scales) +
        (tile_row + min(thread / scale_chunks, present - 1)) * g.w.groups() * 32 + thread % scale_chunks * 16;
    if (!waited) wait_for_previous_kernel();
    waited = true;
    const unsigned char* tokens[kPointers];
#pragma unroll
    for (int i = 0; i < kPointers; ++i) {
      const int t = row + kRowsAtOnce * i;
      int from = tile.begin + t;
      if constexpr (kRows == Rows::kGathered) from = t < tile.count ? g.order[from] / g.top_k : 0;
      tokens[i] = reinterpret_cast<const unsigned char*>(g.x + static_cast<int64_t>(from) * g.w.k + column);
    }

#pragma unroll 1
    for (int step = 0; step < steps; ++step) {
      unsigned char* const to = ring.stages + stage.index * T::kStageBytes;
      const uint32_t full = ring.full + 8 * stage.index;
      barrier_wait(ring.empty + 8 * stage.index, stage.parity ^ 1);
      if (thread == 0) {
        ring.tiles[stage.index] = make_int4(tile.begin, tile.count, feature_block, 0);
        barrier_expect(full, present * kWeightBytes);
      }
      if (copies_weights) {
        copy_bulk(to + T::kWeightsAt + weight_row * kWeightBytes, weights, kWeightBytes, full);
      }
      weights += kWeightBytes;
      if (thread < T::kTileRows * scale_chunks) {
        // A multiple of 32 bytes: of a group of 128, every second step's.
        copy_async_16(to + scales_to, scales + (step << scale_shift & ~31));
      }
      // Rows past the last are not copied: a token's products do not depend on the others.
#pragma unroll
      for (int i = 0; i < kCopies; ++i) {
        if (row + kRowsAtOnce * i >= tile.count) continue;
        const unsigned char* const from =
            kRows == Rows::kGathered ? tokens[i % kPointers] : tokens[0] + i * kRowsAtOnce * 2 * g.w.k;
        copy_async_16(to + tokens_to + i * kRowsAtOnce * kRowBytes, from, step != ragged_step);
      }
#pragma unroll
      for (auto& from : tokens) from += kRowBytes;
      barrier_arrive_after_copies(full);
      stage.advance();
    }
  }
  if (!waited) wait_for_previous_kernel();
  barrier_wait(ring.empty + 8 * stage.index, stage.parity ^ 1);
  if (thread == 0) {
    ring.tiles[stage.index] = {};
    barrier_arrive(ring.full + 8 * stage.index);
  }
  barrier_arrive_after_copies(ring.full + 8 * stage.index);
}

// The narrowest product that `count` tokens fit: action.operator()<tokens>(). Each has registers of its own
// for its accumulators.
template <int kTokens, int kWidth = kTokens == 64 ? 16 : kTokens / 2, typename Action>
__device__ __forceinline__ void with_width(int count, const Action& action) {
  if constexpr (kWidth < kTokens) {
    if (count > kWidth) return with_width<kTokens, kWidth + 16>(count, action);
  }
  action.template operator()<kWidth>();
}

// The products and results of all of the block's tiles.
template <typename T, int kRowTiles, Output kOutput, Rows kRows>
__device__ __forceinline__ void multiply_tiles(const Arguments& g, const Ring<T>& ring) {
  const int lane = threadIdx.x % 32;
  const int warp = threadIdx.x / 32;
  const int steps = g.w.column_tiles();
  const int weights_at = T::kWeightsAt + warp * kRowTiles * kWeightBytes + lane * 16;
  const int scales_at = T::kScalesAt + warp * kRowTiles * kScaleBytes + lane / 4 * 4;
  // From the scales of a step's first 32 columns to those of the others.
  const int second = g.w.group == 32 ? 32 : 0;
  int32_t* const targets = ring.targets + warp * T::kTokens;
  wait_for_previous_kernel();
  Stage<T> stage;
  for (;;) {
    barrier_wait(ring.full + 8 * stage.index, stage.parity);
    const int4 tile = ring.tiles[stage.index];
    const int count = tile.y;
    if (count == 0) break;
    if constexpr (kRows == Rows::kScattered) {
#pragma unroll
      for (int t = lane; t < T::kTokens; t += 32) {
        if (t < count) copy_async_4(targets + t, g.order + tile.x + t);
      }
      copy_async_commit();
    }

    with_width<T::kTokens>(count, [&]<int kWidth>() {
      float acc[kRowTiles][kWidth / 8][4];
#pragma unroll
      for (int i = 0; i < kRowTiles; ++i) {
#pragma unroll
        for (int j = 0; j < kWidth / 8; ++j) {
#pragma unroll
          for (int e = 0; e < 4; ++e) acc[i][j][e] = 0;
        }
      }
      uint32_t a[2][2][4];
      uint4 words;
      uint32_t scales[2];
      const auto load = [&](int i) {
        const unsigned char* const from = ring.stages + stage.index * T::kStageBytes;
        words = *reinterpret_cast<const uint4*>(from + weights_at + i * kWeightBytes);
        scales[0] = *reinterpret_cast<const uint32_t*>(from + scales_at + i * kScaleBytes);
        scales[1] = *reinterpret_cast<const uint32_t*>(from + scales_at + i * kScaleBytes + second);
      };
      load(0);
      uint32_t before = 0;  // the barrier of the stage before
#pragma unroll 1
      for (int step = 0; step < steps; ++step) {
        fence_shared_for_products();
        // The same in all lanes, which the compiler does not see: products take it from other registers.
        const uint32_t operand =
            __shfl_sync(~0U, swizzled_tile_low(ring.stages + stage.index * T::kStageBytes), 0);
        const uint32_t here = ring.empty + 8 * stage.index;
#pragma unroll
        for (int i = 0; i < kRowTiles; ++i) {
#pragma unroll
          for (int half = 0; half < 2; ++half) {
            dequantize_half_less(a[half], half == 0 ? words.x : words.y, half == 0 ? words.z : words.w,
                                 Scales(scales[half]));
            warpgroup_fence();
            warpgroup_mma(acc[i], a[half][0], swizzled_tile(operand + 4 * half));
            warpgroup_mma(acc[i], a[half][1], swizzled_tile(operand + 4 * half + 2));
            warpgroup_commit();
            if (half == 1 && i + 1 < kRowTiles) {
              load(i + 1);
            } else if (half == 1) {
              stage.advance();
              if (step + 1 < steps) {
                barrier_wait(ring.full + 8 * stage.index, stage.parity);
                load(0);
              }
            }
            warpgroup_wait<1>();  // the products that read a[1 - half], and what was before them
            if (i + half == 0 && step > 0 && lane == 0) barrier_arrive(before);
          }
        }
        before = here;
      }
      warpgroup_wait<0>();
      if (lane == 0) barrier_arrive(before);

#pragma unroll
      for (int i = 0; i < kRowTiles; ++i) {
#pragma unroll
        for (int j = 0; j < kWidth / 8; ++j) {
#pragma unroll
          for (int e = 0; e < 4; ++e) acc[i][j][e] *= kDequantizedLess;
        }
      }
      if constexpr (kRows == Rows::kScattered) {
        copy_async_wait<0>();
        __syncwarp();
      }
      int begin = tile.x;
      int feature_block = tile.z;
      settle(begin);  // or addresses are computed, and kept, before the products
      settle(feature_block);
      const int feature = (feature_block * T::kTileRows + warp * kRowTiles) * (T::kFeatures / kRowTiles);
      const int features = kOutput == Output::kSwiglu ? g.w.n / 2 : g.w.n;
      const auto row_of = [&](int token) {
        return kRows == Rows::kScattered ? targets[token] : begin + token;
      };
      write_tile<T, kRowTiles, kWidth, kOutput, kRows == Rows::kDense>(
          acc, ring.staging + warp * T::kStagingBytes, g.residual, g.y, feature, features, count, row_of);
    });
  }
}

template <typename T, int kRowTiles, Output kOutput, Rows kRows>
__device__ __forceinline__ void multiply_pipelined(const Arguments& g, unsigned char* shared) {
  using P = Pipeline<T>;
  const Ring<T> ring(shared);
  ring.init();
  // The second of the experts' products may read the routing before it waits: see cuda/launch.h.
  if constexpr (kRows != Rows::kDense) wait_for_previous_kernel();
  let_next_kernel_start();
  if (threadIdx.x >= T::kThreads) {
    leave_registers<P::kCopyRegisters>();
    copy_tiles<T, kRowTiles, kRows>(g, ring);
  } else {
    take_registers<P::kMultiplyRegisters>();
    multiply_tiles<T, kRowTiles, kOutput, kRows>(g, ring);
  }
}

#endif  // QWEN_WGMMA

}  // namespace qwen::cuda::gemm
