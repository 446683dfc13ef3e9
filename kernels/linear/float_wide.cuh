// The product of many tokens: wide tiles through shared memory, kStages steps deep, since what binds there is
// what L2 delivers.
#pragma once

#include "kernels/cuda/cluster.cuh"
#include "kernels/linear/float.cuh"
#include "kernels/linear/warpgroup.cuh"

namespace qwen::cuda::small {

#if QWEN_WGMMA
#define QWEN_SUMS(j) "+f"(c[j][0]), "+f"(c[j][1]), "+f"(c[j][2]), "+f"(c[j][3])
#define QWEN_SUMS_8(j)                                                                          \
  QWEN_SUMS(j), QWEN_SUMS((j) + 1), QWEN_SUMS((j) + 2), QWEN_SUMS((j) + 3), QWEN_SUMS((j) + 4), \
      QWEN_SUMS((j) + 5), QWEN_SUMS((j) + 6), QWEN_SUMS((j) + 7)

// c [64, 8 J] += a [64, 16] b [8 J, 16]^T, a and b tiles of rows of 64 columns (swizzled_tile).
__device__ __forceinline__ void warpgroup_mma(float (&c)[9][4], uint64_t a, uint64_t b) {
  asm volatile(
      "{\n.reg .pred accumulate;\nsetp.eq.u32 accumulate, 0, 0;\n"
      "wgmma.mma_async.sync.aligned.m64n72k16.f32.bf16.bf16 {"
      "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, %16, %17, "
      "%18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31, %32, %33, "
      "%34, %35}, %36, %37, accumulate, 1, 1, 0, 0;\n}"
      : QWEN_SUMS_8(0), QWEN_SUMS(8)
      : "l"(a), "l"(b));
}
__device__ __forceinline__ void warpgroup_mma(float (&c)[17][4], uint64_t a, uint64_t b) {
  asm volatile(
      "{\n.reg .pred accumulate;\nsetp.eq.u32 accumulate, 0, 0;\n"
      "wgmma.mma_async.sync.aligned.m64n136k16.f32.bf16.bf16 {"
      "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, %16, %17, "
      "%18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31, %32, %33, "
      "%34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47, %48, %49, "
      "%50, %51, %52, %53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63, %64, %65, "
      "%66, %67}, %68, %69, accumulate, 1, 1, 0, 0;\n}"
      : QWEN_SUMS_8(0), QWEN_SUMS_8(8), QWEN_SUMS(16)
      : "l"(a), "l"(b));
}

#undef QWEN_SUMS_8
#undef QWEN_SUMS
#endif  // QWEN_WGMMA

// 64 kGroups tokens by 8 kN features, 64 columns a step. Four warps have 64 tokens, each 16 of them. kSplit
// blocks, a cluster, share out the columns of a tile.
template <int kGroups, int kN, int kStages, int kSplit>
struct WideTile {
  static constexpr int kThreads = 128 * kGroups;
  static constexpr int kTokens = 64 * kGroups;
  static constexpr int kFeatures = 8 * kN;
  static constexpr int kDepth = 64;
  static constexpr int kRowBytes = 2 * kDepth;
  static constexpr int kStageBytes = (kFeatures + kTokens) * kRowBytes;
  static constexpr int kAhead = kStages - 2;                 // the products of the step before may still run
  static constexpr int kShare = (kN + kSplit - 1) / kSplit;  // 8-feature columns that a block adds up
  static constexpr int kSumBytes = kSplit == 1 ? 0 : kSplit * kShare * kThreads * 16;
  static constexpr int kSharedBytes = kStages * kStageBytes + kSumBytes + 1024;
};

template <int kGroups, int kN, int kStages, int kSplit>
__global__ void __launch_bounds__(128 * kGroups) multiply_float_wide(Arguments g) {
  using T = WideTile<kGroups, kN, kStages, kSplit>;
  constexpr int kRowsAtOnce = T::kThreads / 8;
  constexpr int kFeatureRows = (T::kFeatures + kRowsAtOnce - 1) / kRowsAtOnce;  // a thread's
  constexpr int kTokenRows = T::kTokens / kRowsAtOnce;
  QWEN_DYNAMIC_SHARED(unaligned);
  unsigned char* const shared =
      unaligned + (-static_cast<uint32_t>(reinterpret_cast<uintptr_t>(unaligned)) & 1023);
  const int token_tiles = (g.tokens - 1) / T::kTokens + 1;  // next to each other: they share weights
  const int tile = static_cast<int>(blockIdx.x) / kSplit;
  const int rank = static_cast<int>(blockIdx.x) % kSplit;
  const int first_token = tile % token_tiles * T::kTokens;
  const int first_feature = tile / token_tiles * T::kFeatures;
  const int lane = threadIdx.x % 32;
  const int warp = threadIdx.x / 32;
  if constexpr (kSplit > 1) cluster_begin();
  const int share = ((g.k - 1) / T::kDepth + kSplit) / kSplit;
  const int first_column = rank * share * T::kDepth;
  const int columns = g.k - first_column;  // that are left
  const int steps = max(0, min(share, (columns + T::kDepth - 1) / T::kDepth));

  // A stage is rows of kDepth columns, weights then tokens, whose 16-byte chunk i lies at i ^ (row % 8). Rows
  // that do not exist are another's, or stay what they are: nobody uses their products.
  const int chunk = threadIdx.x % 8;
  const int own_row = threadIdx.x / 8;
  const int features = min(T::kFeatures, g.rows() - first_feature);
  const bf16* weights[kFeatureRows];
  const bf16* tokens[kTokenRows];
#pragma unroll
  for (int i = 0; i < kFeatureRows; ++i) {
    const int row = min(own_row + i * kRowsAtOnce, features - 1);
    weights[i] = g.weight_row(first_feature + row) + first_column + chunk * 8;
  }
#pragma unroll
  for (int i = 0; i < kTokenRows; ++i) {
    const int token = min(first_token + own_row + i * kRowsAtOnce, g.tokens - 1);
    tokens[i] = g.x + static_cast<size_t>(token) * g.k + first_column + chunk * 8;
  }
  unsigned char* const own_place = shared + own_row * T::kRowBytes + (chunk ^ (own_row % 8)) * 16;
  // to: a stage, as an offset. first: its first column.
  const auto copy_weights = [&](int to, int first) {
    const bool valid = first + chunk * 8 < columns;
    const int from = valid ? first : -chunk * 8 - first_column;
#pragma unroll
    for (int i = 0; i < kFeatureRows; ++i) {
      if (i * kRowsAtOnce >= features) continue;
      // The last rows of all threads may be more than the tile has.
      if (T::kFeatures % kRowsAtOnce != 0 && i + 1 == kFeatureRows &&
          own_row + i * kRowsAtOnce >= T::kFeatures)
        continue;
      copy_async_16(own_place + to + i * kRowsAtOnce * T::kRowBytes, weights[i] + from, valid);
    }
  };
  const auto copy_tokens = [&](int to, int first) {
    const bool valid = first + chunk * 8 < columns;
    const int from = valid ? first : -chunk * 8 - first_column;
#pragma unroll
    for (int i = 0; i < kTokenRows; ++i) {
      copy_async_16(own_place + to + (T::kFeatures + i * kRowsAtOnce) * T::kRowBytes, tokens[i] + from,
                    valid);
    }
  };
  // Not unrolled: a kernel of few steps takes as long to read its instructions as its operands.
#pragma unroll 1
  for (int s = 0; s < min(T::kAhead, steps); ++s) copy_weights(s * T::kStageBytes, s * T::kDepth);
  wait_for_previous_kernel();
#pragma unroll 1
  for (int s = 0; s < T::kAhead; ++s) {
    if (s < steps) copy_tokens(s * T::kStageBytes, s * T::kDepth);
    copy_async_commit();
  }
  let_next_kernel_start();

  float acc[kN][4];
#pragma unroll
  for (int j = 0; j < kN; ++j) {
#pragma unroll
    for (int e = 0; e < 4; ++e) acc[j][e] = 0;
  }
  constexpr int kEnd = kStages * T::kStageBytes;
  int from = 0;                         // the stage that is next, as an offset
  int to = T::kAhead * T::kStageBytes;  // and the one that is copied to next
#pragma unroll 1
  for (int s = 0; s < steps; ++s) {
    copy_async_wait<T::kAhead - 1>();
#if QWEN_WGMMA
    warpgroup_wait<1>();
    fence_shared_for_products();
#endif
    __syncthreads();
    if (s + T::kAhead < steps) {
      copy_weights(to, (s + T::kAhead) * T::kDepth);
      copy_tokens(to, (s + T::kAhead) * T::kDepth);
    }
    copy_async_commit();
    to = to + T::kStageBytes < kEnd ? to + T::kStageBytes : 0;
    const unsigned char* const stage = shared + from;
    from = from + T::kStageBytes < kEnd ? from + T::kStageBytes : 0;
    const unsigned char* const rows = stage + (T::kFeatures + warp / 4 * 64) * T::kRowBytes;
#if QWEN_WGMMA
    const uint32_t a = swizzled_tile_low(rows);
    const uint32_t b = swizzled_tile_low(stage);
    warpgroup_fence();
#pragma unroll
    for (int i = 0; i < 4; ++i) warpgroup_mma(acc, swizzled_tile(a + 2 * i), swizzled_tile(b + 2 * i));
    warpgroup_commit();
#else
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      uint32_t a[4];
      load_matrix_x4(
          a, rows + (warp % 4 * 16 + lane % 16) * T::kRowBytes + ((2 * i + lane / 16) ^ (lane % 8)) * 16);
#pragma unroll
      for (int j = 0; j < kN; j += 2) {  // of an odd number, the last loads a tile of tokens too
        uint32_t b[4];
        load_matrix_x4(b, stage + (8 * j + lane % 8 + lane / 16 * 8) * T::kRowBytes +
                              ((2 * i + lane / 8 % 2) ^ (lane % 8)) * 16);
        const uint32_t first[2] = {b[0], b[1]};
        mma_bf16(acc[j], a, first);
        if (j + 1 == kN) continue;
        const uint32_t second[2] = {b[2], b[3]};
        mma_bf16(acc[j + 1], a, second);
      }
    }
#endif
  }
#if QWEN_WGMMA
  warpgroup_wait<0>();
#endif

  // Every block gets all blocks' sums of its share of the columns, and adds them up in order of rank.
  if constexpr (kSplit > 1) {
    unsigned char* const sums = shared + kStages * T::kStageBytes;  // float4 [kSplit][kShare][kThreads]
    cluster_wait();
#pragma unroll
    for (int r = 0; r < kSplit; ++r) {
      const BlockMemory memory(sums, r);
#pragma unroll
      for (int j = r; j < kN; j += kSplit) {
        const int at = ((rank * T::kShare + j / kSplit) * T::kThreads + static_cast<int>(threadIdx.x)) * 16;
        memory.store(at, float2{acc[j][0], acc[j][1]});
        memory.store(at + 8, float2{acc[j][2], acc[j][3]});
      }
    }
    cluster_arrive();
    cluster_wait();
#pragma unroll
    for (int i = 0; i < T::kShare; ++i) {
      if (i * kSplit + rank >= kN) continue;
      float4 sum = {0, 0, 0, 0};
#pragma unroll
      for (int r = 0; r < kSplit; ++r) {
        const float4 part =
            reinterpret_cast<const float4*>(sums)[(r * T::kShare + i) * T::kThreads + threadIdx.x];
        sum.x += part.x, sum.y += part.y, sum.z += part.z, sum.w += part.w;
      }
      acc[i][0] = sum.x, acc[i][1] = sum.y, acc[i][2] = sum.z, acc[i][3] = sum.w;
    }
  }

  const int lane_feature = first_feature + lane % 4 * 2;
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    const int token = first_token + warp * 16 + half * 8 + lane / 4;
    if (token >= g.tokens) continue;
    if (g.n % 2 == 0) {
      float* const row = g.y + static_cast<size_t>(token) * g.n;
      float last = 0;
#pragma unroll
      for (int i = 0; i < T::kShare; ++i) {
        const int feature = lane_feature + 8 * (i * kSplit + rank);
        if (kN % kSplit != 0 && i * kSplit + rank >= kN) continue;
        const uint32_t pair = pack_bf16(acc[i][2 * half], acc[i][2 * half + 1]);
        const float2 both = {low_bf16(pair), high_bf16(pair)};
        if (feature < g.n) *reinterpret_cast<float2*>(row + feature) = both;
        last = feature == g.n ? both.x : last;
      }
      const int column = g.n - lane_feature;  // of row N, if the lane has it
      const bool has_last =
          column >= 0 && column < T::kFeatures && column % 8 == 0 && column / 8 % kSplit == rank;
      if (g.last_w != nullptr && has_last) g.last_y[token] = last;
    } else {
#pragma unroll
      for (int i = 0; i < T::kShare; ++i) {
        const int feature = lane_feature + 8 * (i * kSplit + rank);
        if (kN % kSplit != 0 && i * kSplit + rank >= kN) continue;
        g.write(token, feature, acc[i][2 * half]);
        g.write(token, feature + 1, acc[i][2 * half + 1]);
      }
    }
  }
}

}  // namespace qwen::cuda::small
