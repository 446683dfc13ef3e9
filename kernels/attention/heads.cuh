// What decode and prefill do with a head besides attending: norm, rotation and output gate, rounded where the
// bfloat16 PyTorch expressions round. A head of Dh elements lies in a warp eight to a lane, lanes past Dh / 8
// hold zeros.
#pragma once

#include <cmath>

#include "kernels/attention/cuda.h"
#include "kernels/cuda/primitives.cuh"

namespace qwen::cuda {

inline constexpr int kMaxHeadDim = 256;
inline constexpr int kMaxRotaryPairs = kMaxHeadDim / 2;
inline constexpr float kLog2E = 1.4426950408889634F;

inline bool is_valid(const AttentionShape& shape) {
  return shape.key_heads > 0 && shape.query_heads > 0 && shape.query_heads % shape.key_heads == 0 &&
         shape.head_dim >= 16 && shape.head_dim <= kMaxHeadDim && shape.head_dim % 16 == 0 &&
         shape.rotary_dim >= 0 && shape.rotary_dim <= shape.head_dim && shape.rotary_dim % 2 == 0 &&
         shape.cache_length > 0;
}

// theta^(-2 i / R). The host computes them as the reference does: an error of one unit in the last place is
// an angle of 0.03 at position 262144.
struct Frequencies {
  float value[kMaxRotaryPairs];
};

inline Frequencies rotary_frequencies(const AttentionShape& shape) {
  Frequencies frequencies = {};
  for (int i = 0; i < shape.rotary_dim / 2; ++i) {
    const float exponent = static_cast<float>(2 * i) / static_cast<float>(shape.rotary_dim);
    frequencies.value[i] = 1.0F / std::pow(shape.rope_theta, exponent);
  }
  return frequencies;
}

__device__ __forceinline__ void unpack_bf16(float (&v)[8], const uint4& packed) {
  v[0] = low_bf16(packed.x), v[1] = high_bf16(packed.x), v[2] = low_bf16(packed.y),
  v[3] = high_bf16(packed.y);
  v[4] = low_bf16(packed.z), v[5] = high_bf16(packed.z), v[6] = low_bf16(packed.w),
  v[7] = high_bf16(packed.w);
}
__device__ __forceinline__ uint4 pack_bf16(const float (&v)[8]) {
  return {pack_bf16(v[0], v[1]), pack_bf16(v[2], v[3]), pack_bf16(v[4], v[5]), pack_bf16(v[6], v[7])};
}

// Two at a time: one alone is converted at an eighth of the rate.
__device__ __forceinline__ void round_all(float (&v)[8]) { unpack_bf16(v, pack_bf16(v)); }

__device__ __forceinline__ uint4 load_16(const bf16* p) { return *reinterpret_cast<const uint4*>(p); }
__device__ __forceinline__ void store_16(bf16* p, const uint4& v) { *reinterpret_cast<uint4*>(p) = v; }

// The lane's eight elements of a head.
__device__ __forceinline__ uint4 load_head(const bf16* head, int head_dim, int lane) {
  return 8 * lane < head_dim ? load_16(head + 8 * lane) : uint4{0, 0, 0, 0};
}

// rotation [R / 2]: cosine and sine of each pair's angle, rounded to bfloat16. Call with `count` threads.
__device__ __forceinline__ void compute_rotation(float2* rotation, const Frequencies& frequencies,
                                                 int rotary_dim, int64_t position, int thread, int count) {
  for (int i = thread; i < rotary_dim / 2; i += count) {
    float sine;
    float cosine;
    sincosf(static_cast<float>(position) * frequencies.value[i], &sine, &cosine);
    rotation[i] = {round_bf16(cosine), round_bf16(sine)};
  }
}

// The lane's eight elements of each of the heads x, normed and rounded to bfloat16. Called by a whole warp.
template <int kCount>
__device__ __forceinline__ void norm_heads(float (&v)[kCount][8], const uint4 (&x)[kCount],
                                           const uint4 (&norm_weights)[kCount], const AttentionShape& shape) {
  const float share = __fdividef(1.0F, static_cast<float>(shape.head_dim));
  float squares[kCount] = {};
#pragma unroll
  for (int h = 0; h < kCount; ++h) {
    unpack_bf16(v[h], x[h]);
#pragma unroll
    for (int i = 0; i < 8; ++i) squares[h] += v[h][i] * v[h][i];
  }
#pragma unroll
  for (int offset = 16; offset > 0; offset /= 2) {
#pragma unroll
    for (int h = 0; h < kCount; ++h) squares[h] += __shfl_xor_sync(~0U, squares[h], offset);
  }
#pragma unroll
  for (int h = 0; h < kCount; ++h) {
    float w[8];
    unpack_bf16(w, norm_weights[h]);
    const float scale = rsqrtf(squares[h] * share + shape.eps);
#pragma unroll
    for (int i = 0; i < 8; ++i) v[h][i] = v[h][i] * scale * (1.0F + w[i]);
    round_all(v[h]);
  }
}

// One warp norms and rotates the head x and leaves it in `row`, shared memory of at least Dh elements.
__device__ __forceinline__ void norm_and_rotate(bf16* row, const uint4& x, const uint4& norm_weight,
                                                const float2* rotation, const AttentionShape& shape,
                                                int lane) {
  float normed[1][8];
  norm_heads<1>(normed, {x}, {norm_weight}, shape);
  auto& v = normed[0];
  if (8 * lane < shape.head_dim) store_16(row + 8 * lane, pack_bf16(v));
  if (shape.rotary_dim == 0) return;
  __syncwarp();
  const int half = shape.rotary_dim / 2;
  const bool rotated = 8 * lane < shape.rotary_dim;
  if (rotated) {
#pragma unroll
    for (int i = 0; i < 8; ++i) {
      const int d = 8 * lane + i;
      if (d >= shape.rotary_dim) continue;
      const bool first = d < half;
      const float2 angle = rotation[first ? d : d - half];
      const float partner = __bfloat162float(row[first ? d + half : d - half]);
      v[i] = round_bf16(v[i] * angle.x) + round_bf16((first ? -partner : partner) * angle.y);
    }
  }
  __syncwarp();
  if (rotated) store_16(row + 8 * lane, pack_bf16(v));
}

// The same in a lane's registers where the lanes' eights of elements are each other's partners, R / 2 being a
// multiple of 8. cosine and sine: 1 and 0 where there is no rotation, and the sine negated in the first half.
struct LaneRotation {
  float cosine[8];
  float sine[8];
  int partner;  // lane

  __host__ __device__ __forceinline__ static bool fits(const AttentionShape& shape) {
    return shape.rotary_dim % 16 == 0;
  }
  __device__ __forceinline__ LaneRotation(const float2* rotation, const AttentionShape& shape, int lane) {
    const int lanes = shape.rotary_dim / 16;  // of a half
    const bool first = lane < lanes;
    const bool rotated = lane < 2 * lanes;
    partner = first ? lane + lanes : rotated ? lane - lanes : lane;
#pragma unroll
    for (int i = 0; i < 8; ++i) {
      float2 angle = {1, 0};
      if (rotated) angle = rotation[8 * (first ? lane : partner) + i];
      cosine[i] = angle.x;
      sine[i] = first ? -angle.y : angle.y;
    }
  }

  // In place.
  template <int kCount>
  __device__ __forceinline__ void norm_and_rotate(uint4 (&x)[kCount], const uint4 (&norm_weights)[kCount],
                                                  const AttentionShape& shape) const {
    float v[kCount][8];
    norm_heads<kCount>(v, x, norm_weights, shape);
#pragma unroll
    for (int h = 0; h < kCount; ++h) {
      uint4 other = pack_bf16(v[h]);
      other.x = __shfl_sync(~0U, other.x, partner);
      other.y = __shfl_sync(~0U, other.y, partner);
      other.z = __shfl_sync(~0U, other.z, partner);
      other.w = __shfl_sync(~0U, other.w, partner);
      float o[8];
      unpack_bf16(o, other);
#pragma unroll
      for (int i = 0; i < 8; ++i) {
        v[h][i] *= cosine[i];
        o[i] *= sine[i];
      }
      round_all(v[h]);
      round_all(o);
#pragma unroll
      for (int i = 0; i < 8; ++i) v[h][i] += o[i];
      x[h] = pack_bf16(v[h]);
    }
  }
};

__device__ __forceinline__ float gate_factor(float gate) { return __fdividef(1.0F, 1.0F + __expf(-gate)); }

// x * sigmoid(gate), all bfloat16, both roundings included.
__device__ __forceinline__ float gated(float x, float gate) {
  return round_bf16(x) * round_bf16(gate_factor(gate));
}

}  // namespace qwen::cuda
