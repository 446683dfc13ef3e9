// How prefill's products write their accumulators.
#pragma once

#include "kernels/linear/gemm_tile.cuh"

namespace qwen::cuda::gemm {

// Stores 8x8 matrices (a register each, features by tokens as the accumulators have them) token by token:
// matrix m at token 8 (m / kAcross) and feature 8 (m % kAcross) of `staging`, rows `pitch` bytes apart.
template <int kCount, int kAcross>
__device__ __forceinline__ void store_transposed(unsigned char* staging, int pitch,
                                                 const uint32_t (&m)[kCount]) {
  const int lane = threadIdx.x % 32;
#if __CUDA_ARCH__ >= 900
  const int matrix = lane / 8 % kCount;
  const uint32_t row =
      shared_address(staging + (8 * (matrix / kAcross) + lane % 8) * pitch + 16 * (matrix % kAcross));
  if constexpr (kCount == 4) {
    asm volatile("stmatrix.sync.aligned.m8n8.x4.trans.shared.b16 [%0], {%1, %2, %3, %4};" ::"r"(row),
                 "r"(m[0]), "r"(m[1]), "r"(m[2]), "r"(m[3])
                 : "memory");
  } else {
    asm volatile("stmatrix.sync.aligned.m8n8.x2.trans.shared.b16 [%0], {%1, %2};" ::"r"(row), "r"(m[0]),
                 "r"(m[1])
                 : "memory");
  }
#else
#pragma unroll
  for (int i = 0; i < kCount; ++i) {
    unsigned char* to =
        staging + (8 * (i / kAcross) + lane % 4 * 2) * pitch + 16 * (i % kAcross) + lane / 4 * 2;
    *reinterpret_cast<uint16_t*>(to) = static_cast<uint16_t>(m[i]);
    *reinterpret_cast<uint16_t*>(to + pitch) = static_cast<uint16_t>(m[i] >> 16);
  }
#endif
}

__device__ __forceinline__ float swiglu(float gate, float up) {
#ifdef QWEN_CUDA_EMULATION
  return __fdividef(gate, 1 + __expf(-gate)) * up;
#else
  // Denormal numbers are zeros here: to keep them takes more instructions than all the rest.
  float power;
  float sigmoid;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(power) : "f"(gate * -1.4426950408889634F));
  asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(sigmoid) : "f"(1 + power));
  return gate * sigmoid * up;
#endif
}

// The 16 bytes of `a` plus those of `b`, as bfloat16.
__device__ __forceinline__ uint4 add_bf16(uint4 a, uint4 b) {
  const auto add = [](uint32_t p, uint32_t q) {
    return pack_bf16(low_bf16(p) + low_bf16(q), high_bf16(p) + high_bf16(q));
  };
  return {add(a.x, b.x), add(a.y, b.y), add(a.z, b.z), add(a.w, b.w)};
}

// Writes a warp's accumulators: features `feature` and on of the tile's first `count` tokens, token t to row
// row_of(t) of y, sixteen tokens at a time through `staging` so that a store is 16 bytes of a row. kDense:
// there may be a residual, and rows of y need not be a multiple of 16 bytes.
template <typename T, int kRowTiles, int kTokens, Output kOutput, bool kDense, typename RowOf>
__device__ __forceinline__ void write_tile(const float (&acc)[kRowTiles][kTokens / 8][4],
                                           unsigned char* staging, const bf16* residual, bf16* y, int feature,
                                           int features, int count, RowOf row_of) {
  constexpr int kChunks = T::kFeatures / 8;  // of 16 bytes, a token's
  constexpr int kPieces = 16 * kChunks;      // of sixteen tokens
  constexpr int kPerLane = (kPieces + 31) / 32;
  constexpr bool kPlainDense = kDense && kOutput == Output::kPlain;
  int lane = threadIdx.x % 32;
  settle(lane);  // or what follows from it is computed, and kept, before the products
  if (feature >= features) return;
  const bool narrow = kPlainDense && features % 8 != 0;
  const bool add = kPlainDense && residual != nullptr && !narrow;
  // The lane's i-th chunk of the j-th sixteen tokens: where it is in y, and in staging. False: it has none.
  const auto place = [&](int j, int i, size_t& at, int& staged) {
    const int piece = lane + 32 * i;
    const int token = 16 * j + piece / kChunks;
    const int chunk = piece % kChunks;
    if (piece >= kPieces || token >= count || feature + 8 * chunk >= features) return false;
    at = static_cast<size_t>(row_of(token)) * features + feature + 8 * chunk;
    staged = piece / kChunks * T::kStagingPitch + 16 * chunk;
    return true;
  };
  // Of an odd number of eights, the last is there twice.
  constexpr int kEights = kTokens / 8;
  const auto eight = [](int j) { return j < kEights ? j : kEights - 1; };
  size_t at;
  int staged;
  constexpr int kBatch = kRowTiles > 1 ? 2 : kTokens < 64 ? kTokens / 16 : 4;  // as registers are left
  uint4 added[kPlainDense ? kBatch : 1][kPerLane];
#pragma unroll
  for (int j = 0; j < (kTokens + 15) / 16; ++j) {
    if (16 * j >= count) break;
    if constexpr (kPlainDense) {
      if (j % kBatch == 0) {  // several at once: each would be a round trip of its own
#pragma unroll
        for (int b = 0; b < kBatch; ++b) {
#pragma unroll
          for (int i = 0; i < kPerLane; ++i) {
            added[b][i] = {};
            if (add && place(j + b, i, at, staged)) {
              added[b][i] = *reinterpret_cast<const uint4*>(residual + at);
            }
          }
        }
      }
    }
    if constexpr (kOutput == Output::kPlain) {
#pragma unroll
      for (int i = 0; i < kRowTiles; ++i) {
        const float (&c)[4] = acc[i][2 * j];
        const float (&d)[4] = acc[i][eight(2 * j + 1)];
        const uint32_t m[4] = {pack_bf16(c[0], c[1]), pack_bf16(c[2], c[3]), pack_bf16(d[0], d[1]),
                               pack_bf16(d[2], d[3])};
        store_transposed<4, 2>(staging + 32 * i, T::kStagingPitch, m);
      }
    } else {
      uint32_t m[2 * kRowTiles];
#pragma unroll
      for (int i = 0; i < 2 * kRowTiles; ++i) {
        const float (&c)[4] = acc[i % kRowTiles][eight(2 * j + i / kRowTiles)];
        m[i] = pack_bf16(swiglu(c[0], c[2]), swiglu(c[1], c[3]));
      }
      if constexpr (kRowTiles <= 2) {
        store_transposed<2 * kRowTiles, kRowTiles>(staging, T::kStagingPitch, m);
      } else {
        static_assert(kRowTiles == 4);
        const uint32_t first[4] = {m[0], m[1], m[2], m[3]};
        const uint32_t second[4] = {m[4], m[5], m[6], m[7]};
        store_transposed<4, 4>(staging, T::kStagingPitch, first);
        store_transposed<4, 4>(staging + 8 * T::kStagingPitch, T::kStagingPitch, second);
      }
    }
    __syncwarp();
#pragma unroll
    for (int i = 0; i < kPerLane; ++i) {
      if (!place(j, i, at, staged)) continue;
      if (!narrow) {
        uint4 value = *reinterpret_cast<const uint4*>(staging + staged);
        if constexpr (kPlainDense) {
          if (add) value = add_bf16(value, added[j % kBatch][i]);
        }
        *reinterpret_cast<uint4*>(y + at) = value;
        continue;
      }
      const bf16* const values = reinterpret_cast<const bf16*>(staging + staged);
      const int last = features - feature - (lane + 32 * i) % kChunks * 8;
#pragma unroll 1
      for (int e = 0; e < min(8, last); ++e) {
        float value = __bfloat162float(values[e]);
        if (residual != nullptr) value += __bfloat162float(residual[at + e]);
        y[at + e] = __float2bfloat16(value);
      }
    }
    __syncwarp();
  }
}

}  // namespace qwen::cuda::gemm
