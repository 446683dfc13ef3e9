// What one warp does in decode: a tile of 16 keys against up to 8 query heads.
//   scores^T [16 keys, 8 heads] = K [16, Dh] q^T,   result^T [Dh, 8 heads] += V^T [Dh, 16] weights^T
// Tiles go from global memory directly into tensor-core fragments. The order of the elements along a
// product's inner dimension is free, as long as both sides agree: it is chosen so that a lane's fragments are
// 16 consecutive bytes of a row. kDim is Dh padded to a multiple of 64; r = lane / 4 and q = lane % 4.
#pragma once

#include "kernels/attention/heads.cuh"

namespace qwen::cuda {

inline constexpr int kTileKeys = 16;
inline constexpr float kMasked = -INFINITY;

// Of queries in shared memory: free of bank conflicts.
template <int kDim>
inline constexpr int kQueryStride = kDim + 32;

// Out of L2, in the order of the calls; 16 bytes, zeros where `valid` is false: one predicated load, where a
// branch each would keep the loads of a tile from being issued together.
#ifdef QWEN_CUDA_EMULATION
inline int64_t load_past_l1(const int64_t* p) { return *p; }
inline uint4 load_past_l1(const bf16* p, bool valid) { return valid ? load_16(p) : uint4{0, 0, 0, 0}; }
#else
__device__ __forceinline__ int64_t load_past_l1(const int64_t* p) {
  int64_t v;
  asm volatile("ld.global.cg.s64 %0, [%1];" : "=l"(v) : "l"(p));
  return v;
}
__device__ __forceinline__ uint4 load_past_l1(const bf16* p, bool valid) {
  uint4 v;
  asm volatile(
      "{\n\t.reg .pred valid;\n\tsetp.ne.s32 valid, %5, 0;\n\t"
      "mov.b32 %0, 0;\n\tmov.b32 %1, 0;\n\tmov.b32 %2, 0;\n\tmov.b32 %3, 0;\n\t"
      "@valid ld.global.cg.v4.u32 {%0, %1, %2, %3}, [%4];\n\t}"
      : "=&r"(v.x), "=&r"(v.y), "=&r"(v.z), "=&r"(v.w)
      : "l"(p), "r"(static_cast<int>(valid)));
  return v;
}
#endif

__device__ __forceinline__ uint32_t word(const uint4& v, int i) {
  return i == 0 ? v.x : i == 1 ? v.y : i == 2 ? v.z : v.w;
}

// A tile's keys, lane 4 r + q: row r + 8 i, elements 32 s + 8 q to + 7.
template <int kDim>
struct KeyTile {
  uint4 v[2][kDim / 32];

  // Rows from `end` on are zero.
  __device__ __forceinline__ void load(const bf16* cache, int first, int end, int head_dim, int r, int q) {
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const int key = first + r + 8 * i;
      const bf16* from = cache + static_cast<int64_t>(key) * head_dim + 8 * q;
      const int elements = key < end ? head_dim - 8 * q : 0;
#pragma unroll
      for (int s = 0; s < kDim / 32; ++s) v[i][s] = load_past_l1(from + 32 * s, 32 * s < elements);
    }
  }
  __device__ __forceinline__ void replace(int row, const bf16* key, int r, int q) {
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      if (row != r + 8 * i) continue;
#pragma unroll
      for (int s = 0; s < kDim / 32; ++s) v[i][s] = load_16(key + 32 * s + 8 * q);
    }
  }
};

// A tile's values: rows q, q + 8, q + 4, q + 12, elements 64 b + 8 r to + 7.
template <int kDim>
struct ValueTile {
  uint4 v[4][kDim / 64];

  __device__ __forceinline__ static int row(int i, int q) { return q + 8 * (i % 2) + 4 * (i / 2); }

  __device__ __forceinline__ void load(const bf16* cache, int first, int end, int head_dim, int r, int q) {
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const int key = first + row(i, q);
      const bf16* from = cache + static_cast<int64_t>(key) * head_dim + 8 * r;
      const int elements = key < end ? head_dim - 8 * r : 0;
#pragma unroll
      for (int b = 0; b < kDim / 64; ++b) v[i][b] = load_past_l1(from + 64 * b, 64 * b < elements);
    }
  }
  __device__ __forceinline__ void replace(int replaced, const bf16* value, int r, int q) {
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      if (replaced != row(i, q)) continue;
#pragma unroll
      for (int b = 0; b < kDim / 64; ++b) v[i][b] = load_16(value + 64 * b + 8 * r);
    }
  }
};

// queries [8, kQueryStride]. Scores of (key r, heads 2 q and 2 q + 1), then of key r + 8.
template <int kDim>
__device__ __forceinline__ void multiply_keys(float (&scores)[4], const KeyTile<kDim>& keys,
                                              const bf16* queries, int r, int q) {
  float odd[4] = {};
#pragma unroll
  for (int i = 0; i < 4; ++i) scores[i] = 0;
#pragma unroll
  for (int s = 0; s < kDim / 32; ++s) {
    const uint4 query = load_16(queries + r * kQueryStride<kDim> + 32 * s + 8 * q);
    const uint4& low = keys.v[0][s];
    const uint4& high = keys.v[1][s];
    mma_bf16(scores, {low.x, high.x, low.y, high.y}, {query.x, query.y});
    mma_bf16(odd, {low.z, high.z, low.w, high.w}, {query.z, query.w});
  }
#pragma unroll
  for (int i = 0; i < 4; ++i) scores[i] += odd[i];
}

// result[4 b + j]: elements 64 b + 8 r + 2 j and + 1, each of heads 2 q and 2 q + 1.
template <int kDim>
__device__ __forceinline__ void multiply_values(float (&result)[kDim / 16][4], const ValueTile<kDim>& values,
                                                const uint32_t (&weights)[2]) {
#pragma unroll
  for (int b = 0; b < kDim / 64; ++b) {
#pragma unroll
    for (int j = 0; j < 4; ++j) {
      const uint32_t rows[4] = {word(values.v[0][b], j), word(values.v[1][b], j), word(values.v[2][b], j),
                                word(values.v[3][b], j)};
      mma_bf16(result[4 * b + j],
               {(rows[0] & 0xffffU) | rows[1] << 16, rows[0] >> 16 | (rows[1] & 0xffff0000U),
                (rows[2] & 0xffffU) | rows[3] << 16, rows[2] >> 16 | (rows[3] & 0xffff0000U)},
               weights);
    }
  }
}

// Of one lane: the two heads 2 q and 2 q + 1.
template <int kDim>
struct Accumulator {
  float result[kDim / 16][4];
  float maximum[2];
  float sum[2];  // this lane's keys'

  __device__ __forceinline__ void clear() {
#pragma unroll
    for (auto& tile : result) tile[0] = tile[1] = tile[2] = tile[3] = 0;
    maximum[0] = maximum[1] = kMasked;
    sum[0] = sum[1] = 0;
  }

  // Turns scores, of which at least one a head is not masked, into weights, and rescales what was there.
  // Returns the weights as the operand of multiply_values.
  __device__ __forceinline__ void weigh(uint32_t (&weights)[2], const float (&scores)[4], int r, int q) {
    uint32_t pairs[2];  // keys r and r + 8 of a head
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      float top = fmaxf(scores[h], scores[h + 2]);
#pragma unroll
      for (int offset = 4; offset < 32; offset *= 2) top = fmaxf(top, __shfl_xor_sync(~0U, top, offset));
      top = fmaxf(top, maximum[h]);
      const float rescale = exp2f(maximum[h] - top);
      maximum[h] = top;
      const float low = exp2f(scores[h] - top);
      const float high = exp2f(scores[h + 2] - top);
      sum[h] = sum[h] * rescale + low + high;
      pairs[h] = pack_bf16(low, high);
#pragma unroll
      for (auto& tile : result) {
        tile[h] *= rescale;
        tile[h + 2] *= rescale;
      }
    }
    // Lane 4 r + q needs head r of keys q, q + 8, then q + 4, q + 12.
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const int source = 4 * (q + 4 * i) + r / 2;
      const uint32_t even = __shfl_sync(~0U, pairs[0], source);
      const uint32_t odd = __shfl_sync(~0U, pairs[1], source);
      weights[i] = r % 2 == 0 ? even : odd;
    }
  }
};

}  // namespace qwen::cuda
