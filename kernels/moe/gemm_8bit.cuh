// Prefill's routed experts with 8-bit activations on sm_90a: y^T = W x^T by warpgroup products.
//
// A block is two warpgroups that multiply and four warps that copy (pipeline_8bit.cuh), which are ahead of
// them. Nothing makes the two wait for each other: while one dequantizes or adds up, the other's products
// run.
//
// The weights are the A operand, from registers. The sums of a tile row's group (int32, or float32 of short
// accumulation) are added to float32 accumulators times the scales: an instruction or three for each, which
// is what limits a wide tile, not the tensor cores. To have the warpgroups take turns, or to add up one half
// of the tokens while the other is multiplied, gained nothing on an H200.
#pragma once

#include <algorithm>

#include "kernels/linear/gemm_output.cuh"
#include "kernels/linear/warpgroup_8bit.cuh"
#include "kernels/moe/operands_8bit.cuh"
#include "kernels/moe/pipeline_8bit.cuh"

namespace qwen::cuda::moe8 {

#if QWEN_WGMMA

// Has the compiler neither use registers earlier nor change them later.
template <typename T, int kCount>
__device__ __forceinline__ void settle(T (&c)[kCount][4]) {
#pragma unroll
  for (int j = 0; j < kCount; ++j) {
#pragma unroll
    for (int e = 0; e < 4; ++e) {
      if constexpr (std::is_same_v<T, float>) {
        asm volatile("" : "+f"(c[j][e])::"memory");
      } else {
        asm volatile("" : "+r"(c[j][e])::"memory");
      }
    }
  }
}

// Waits for a warpgroup's threads.
__device__ __forceinline__ void warpgroup_barrier(int warpgroup) {
  asm volatile("bar.sync %0, 128;" ::"r"(1 + warpgroup) : "memory");
}

// The narrowest product that `count` tokens fit. None is narrower than 64: with one, the compiler finds too
// few registers for int8's.
template <int kTokens, typename Action>
__device__ __forceinline__ void with_width(int count, const Action& action) {
  if constexpr (kTokens > 64) {
    if (count <= 64) return action.template operator()<64>();
  }
  if constexpr (kTokens > 96) {
    if (count <= 96) return action.template operator()<96>();
  }
  action.template operator()<kTokens>();
}

#endif  // QWEN_WGMMA

template <ExpertActivations kKind, int kTokens, int kGroup, Output kOutput, Rows kRows>
__global__ void __launch_bounds__(384, 1)
    multiply_8bit([[maybe_unused]] const __grid_constant__ Arguments g) {
#if QWEN_WGMMA
  using P = Pipeline<kTokens, kGroup, kOutput>;
  constexpr bool kGroups = kGroupScales<kKind>;
  QWEN_DYNAMIC_SHARED(unaligned);
  uint32_t padding = -static_cast<uint32_t>(reinterpret_cast<uintptr_t>(unaligned)) & 1023;
  asm volatile("" : "+r"(padding));
  unsigned char* const stages = unaligned + padding;
  __shared__ Barriers<P> barriers;
  __shared__ int targets[2][kTokens];          // scattered: rows of y
  __shared__ float token_factors[2][kTokens];  // of rows that have one scale
  if (threadIdx.x == 0) barriers.init();
  __syncthreads();
  wait_for_previous_kernel();
  let_next_kernel_start();
  if (threadIdx.x >= P::kMultipliers) {
    leave_registers<P::kCopyRegisters>();
    copy_tiles<P, kGroups, kRows>(g, stages, barriers);
    return;
  }
  take_registers<P::kRegisters>();

  const int lane = threadIdx.x % 32;
  const int warp = threadIdx.x / 32;
  const int warpgroup = warp / 4;
  const int thread = threadIdx.x % 128;  // of the warpgroup
  unsigned char* const staging = stages + P::kStages * P::kStageBytes + warp * P::Base::kStagingBytes;
  const int steps = g.x.groups();
  // From the scales of a stage's first 64 columns to those of the others, and of these's first 32.
  const int half_scales = g.w.group == 32 ? 64 : g.w.group == 64 ? 32 : 0;
  const int quarter_scales = g.w.group == 32 ? 32 : 0;
  const int weights_at = P::kWeightsAt + warp * 2 * P::kTileRowBytes + lane * 16;
  const int scales_at = P::kScalesAt + warp * 2 * P::kScaleBytes + lane / 4 * 4;
  int slot = 0;
  uint32_t parity = 0;
  for (;;) {
    barrier_wait(barriers.full(slot), parity);
    const StageTile tile = barriers.tiles[slot];
    if (tile.count == 0) return;
    int target = 0;
    float factor = 0;
    if ((!kGroups || kRows == Rows::kScattered) && thread < tile.count) {
      const int chosen = g.order[tile.begin + thread];
      if (kRows == Rows::kScattered) target = chosen;
      if (!kGroups) factor = g.x.scales[kRows == Rows::kGathered ? chosen / g.top_k : tile.begin + thread];
    }
    with_width<kTokens>(tile.count, [&]<int kWidth>() {
      constexpr int kPieces = kWidth / 8;
      constexpr int kGroupsAStage = kColumns / kGroup;
      constexpr int kSteps = 4 / kGroupsAStage;  // products of 32 columns, of a group
      float acc[2][kPieces][4];
#pragma unroll
      for (int i = 0; i < 2; ++i) {
#pragma unroll
        for (int j = 0; j < kPieces; ++j) {
#pragma unroll
          for (int e = 0; e < 4; ++e) acc[i][j][e] = 0;
        }
      }
#pragma unroll 1
      for (int step = 0; step < steps; ++step) {
        barrier_wait(barriers.full(slot), parity);
        fence_shared_for_products();
        const unsigned char* const stage = stages + slot * P::kStageBytes;
        const uint32_t tokens = swizzled_tile_low(stage);
        [[maybe_unused]] const auto* const factors =
            reinterpret_cast<const float*>(stage + P::kTokenScalesAt) + lane % 4 * 2;
#pragma unroll
        for (int c = 0; c < 2 * kGroupsAStage; ++c) {
          const int i = c % 2;  // tile row
          const int group = c / 2;
          uint32_t a[kSteps][4];
          const unsigned char* const from = stage + weights_at + i * P::kTileRowBytes;
          if constexpr (kGroupsAStage == 1) {
            const uint4 u = *reinterpret_cast<const uint4*>(from);
            const uint4 v = *reinterpret_cast<const uint4*>(from + gemm::kWeightBytes);
            operand_8bit<kKind>(a[0], u.x, u.z);
            operand_8bit<kKind>(a[1], u.y, u.w);
            operand_8bit<kKind>(a[2], v.x, v.z);
            operand_8bit<kKind>(a[3], v.y, v.w);
          } else {
            const unsigned char* const word = from + group / 2 * gemm::kWeightBytes + group % 2 * 4;
            operand_8bit<kKind>(a[0], *reinterpret_cast<const uint32_t*>(word),
                                *reinterpret_cast<const uint32_t*>(word + 8));
          }
          const uint32_t pair = *reinterpret_cast<const uint32_t*>(
              stage + scales_at + i * P::kScaleBytes + group / 2 * half_scales + group % 2 * quarter_scales);
          Sum<kKind> sums[kPieces][4];
          settle(a);
          warpgroup_fence();
#pragma unroll
          for (int k = 0; k < kSteps; ++k) {
            warpgroup_mma_8bit(sums, a[k], swizzled_tile(tokens + 2 * (group * kSteps + k)), k > 0);
          }
          warpgroup_commit();
          warpgroup_wait<0>();
          settle(sums);
          const float low = low_bf16(pair);
          const float high = high_bf16(pair);
#pragma unroll
          for (int j = 0; j < kPieces; ++j) {
            float (&to)[4] = acc[i][j];
            float2 f = {1, 1};
            if constexpr (kGroups) f = *reinterpret_cast<const float2*>(factors + 8 * j);
            to[0] += static_cast<float>(sums[j][0]) * (low * f.x);
            to[1] += static_cast<float>(sums[j][1]) * (low * f.y);
            to[2] += static_cast<float>(sums[j][2]) * (high * f.x);
            to[3] += static_cast<float>(sums[j][3]) * (high * f.y);
          }
        }
        __syncwarp();
        if (lane == 0) barrier_arrive(barriers.empty(slot));
        if (++slot == P::kStages) slot = 0, parity ^= 1;
      }

      if constexpr (!kGroups || kRows == Rows::kScattered) {
        warpgroup_barrier(warpgroup);  // those of the last tile are read
        if (thread < kTokens) {
          targets[warpgroup][thread] = target;
          token_factors[warpgroup][thread] = factor;
        }
        warpgroup_barrier(warpgroup);
      }
      if constexpr (!kGroups) {
#pragma unroll
        for (int j = 0; j < kPieces; ++j) {
          const float2 f = *reinterpret_cast<const float2*>(token_factors[warpgroup] + 8 * j + lane % 4 * 2);
#pragma unroll
          for (int i = 0; i < 2; ++i) {
            acc[i][j][0] *= f.x, acc[i][j][1] *= f.y, acc[i][j][2] *= f.x, acc[i][j][3] *= f.y;
          }
        }
      }
      const int feature = (tile.feature_block * 16 + warp * 2) * (P::kFeatures / 2);
      const int features = kOutput == Output::kSwiglu ? g.w.n / 2 : g.w.n;
      const auto row_of = [&](int token) {
        return kRows == Rows::kScattered ? targets[warpgroup][token] : tile.begin + token;
      };
      gemm::write_tile<P, 2, kWidth, kOutput, false>(acc, staging, nullptr, g.y, feature, features,
                                                     tile.count, row_of);
    });
  }
#endif
}

// Whether these products can be made so: by a GPU and a compilation that have warpgroup products, without
// which the kernel is empty and has no barriers in shared memory.
template <ExpertActivations kKind, Output kOutput, Rows kRows>
bool pipeline_fits([[maybe_unused]] const Int4Matrix& w) {
#ifdef QWEN_CUDA_EMULATION
  return false;
#else
  static const bool compiled = [] {
    cudaFuncAttributes attributes = {};
    const auto* const kernel = reinterpret_cast<const void*>(&multiply_8bit<kKind, 64, 128, kOutput, kRows>);
    if (cudaFuncGetAttributes(&attributes, kernel) != cudaSuccess) {
      cudaGetLastError();
      return false;
    }
    return attributes.sharedSizeBytes > 0;
  }();
  return compiled && w.k % kColumns == 0;
#endif
}

template <ExpertActivations kKind, int kTokens, int kGroup, Output kOutput, Rows kRows>
cudaError_t launch_group(Arguments arguments, int64_t choices, cudaStream_t stream) {
  using P = Pipeline<kTokens, kGroup, kOutput>;
  arguments.feature_blocks = (arguments.w.row_tiles() + 15) / 16;
  const int64_t tiles = choices / kTokens + std::min<int64_t>(arguments.experts, choices);
  const int64_t blocks = tiles * arguments.feature_blocks;
  if (blocks >= int64_t{1} << 30) return cudaErrorInvalidValue;
  const dim3 grid(static_cast<unsigned>(std::min<int64_t>(blocks, multiprocessors())));
  return launch(multiply_8bit<kKind, kTokens, kGroup, kOutput, kRows>,
                {grid, dim3(P::kThreads), static_cast<size_t>(P::kSharedBytes)}, stream, arguments);
}

template <ExpertActivations kKind, int kTokens, Output kOutput, Rows kRows>
cudaError_t launch_pipeline(const Arguments& arguments, int64_t choices, cudaStream_t stream) {
  return arguments.w.group == 128
             ? launch_group<kKind, kTokens, 128, kOutput, kRows>(arguments, choices, stream)
             : launch_group<kKind, kTokens, 32, kOutput, kRows>(arguments, choices, stream);
}

}  // namespace qwen::cuda::moe8
