// The short convolution of consecutive tokens, from qkvz [T, C + Z] and the state of the tokens before.
#pragma once

#include "kernels/cuda/primitives.cuh"
#include "kernels/gated_delta/cuda.h"
#include "kernels/gated_delta/gates.cuh"

namespace qwen::cuda {

struct Convolution {
  const bf16* qkvz;    // [T, C + Z]
  const bf16* weight;  // [C, W]
  bf16* state;         // [S, C, W - 1]
  const int64_t* slot;
  int64_t tokens;
};

__device__ __forceinline__ bf16* state_of(const Convolution& in, const DeltaShape& shape, int channel) {
  return in.state + (in.slot[0] * shape.channels() + channel) * (shape.taps - 1);
}

// What a row is multiplied with kMaxTaps - 1 rows later, ..., and in its own, of four channels.
struct ConvolutionWeights {
  float4 of[kMaxTaps];

  __device__ __forceinline__ ConvolutionWeights(const Convolution& in, const DeltaShape& shape, int channel) {
    if (shape.taps == kMaxTaps) {
      const auto* packed = reinterpret_cast<const uint4*>(in.weight + channel * kMaxTaps);
      const uint4 first = packed[0];
      const uint4 second = packed[1];
      of[0] = {low_bf16(first.x), low_bf16(first.z), low_bf16(second.x), low_bf16(second.z)};
      of[1] = {high_bf16(first.x), high_bf16(first.z), high_bf16(second.x), high_bf16(second.z)};
      of[2] = {low_bf16(first.y), low_bf16(first.w), low_bf16(second.y), low_bf16(second.w)};
      of[3] = {high_bf16(first.y), high_bf16(first.w), high_bf16(second.y), high_bf16(second.w)};
      return;
    }
#pragma unroll
    for (int j = 0; j < kMaxTaps; ++j) {
      const int tap = j - (kMaxTaps - shape.taps);
      const auto value = [&](int c) {
        return tap < 0 ? 0.0F : __bfloat162float(in.weight[(channel + c) * shape.taps + tap]);
      };
      of[j] = {value(0), value(1), value(2), value(3)};
    }
  }
};

// The inputs of kRows rows from `begin`, a multiple of kRows >= 3, of four channels: rows begin - 3 and on,
// zero past the last token.
template <int kRows>
struct ConvolutionRows {
  static constexpr int kBefore = kMaxTaps - 1;
  uint2 of[kBefore + kRows];

  __device__ __forceinline__ void load(const Convolution& in, const DeltaShape& shape, int channel,
                                       int64_t begin) {
    const int stride = shape.channels() + shape.value_size();
    const int64_t left = in.tokens - begin;
    const bf16* const from = in.qkvz + begin * stride + channel;
    const auto row = [&](int i) { return *reinterpret_cast<const uint2*>(from + i * stride); };
    if (left >= kRows && begin > 0) {
#pragma unroll
      for (int i = 0; i < kBefore + kRows; ++i) of[i] = row(i - kBefore);
      return;
    }
#pragma unroll
    for (int i = 0; i < kRows; ++i) {
      of[kBefore + i] = {0, 0};
      if (i < left) of[kBefore + i] = row(i);
    }
#pragma unroll
    for (int i = 0; i < kBefore; ++i) {
      of[i] = {0, 0};
      if (begin > 0 && i - kBefore < left) of[i] = row(i - kBefore);
    }
    if (begin > 0) return;
    // Rows before the first come from the state, which keeps taps - 1 of them.
    const auto* const state = reinterpret_cast<const uint16_t*>(state_of(in, shape, channel));
    const int kept = shape.taps - 1;
    uint32_t before[4][kBefore];  // all loads before the first use
#pragma unroll
    for (int c = 0; c < 4; ++c) {
#pragma unroll
      for (int i = 0; i < kBefore; ++i) {
        before[c][i] = i < kBefore - kept ? 0 : state[c * kept + i - (kBefore - kept)];
      }
    }
#pragma unroll
    for (int i = 0; i < kBefore; ++i) {
      of[i] = {before[0][i] | before[1][i] << 16, before[2][i] | before[3][i] << 16};
    }
  }
};

// x: silu of the convolution of the rows; zero where there are no more tokens than `left`.
template <int kRows>
__device__ __forceinline__ void convolve(const ConvolutionRows<kRows>& rows,
                                         const ConvolutionWeights& weights, int64_t left,
                                         float4 (&x)[kRows]) {
#pragma unroll
  for (int i = 0; i < kRows; ++i) {
    float4 sum = {};
#pragma unroll
    for (int j = 0; j < kMaxTaps; ++j) {
      sum.x += weights.of[j].x * low_bf16(rows.of[i + j].x);
      sum.y += weights.of[j].y * high_bf16(rows.of[i + j].x);
      sum.z += weights.of[j].z * low_bf16(rows.of[i + j].y);
      sum.w += weights.of[j].w * high_bf16(rows.of[i + j].y);
    }
    x[i] = {fast_silu(sum.x), fast_silu(sum.y), fast_silu(sum.z), fast_silu(sum.w)};
  }
  if (left >= kRows) return;
#pragma unroll
  for (int i = 0; i < kRows; ++i) {
    if (i >= left) x[i] = {};
  }
}

// Leaves the last taps - 1 rows of a channel in its state. One thread a channel, when no one needs the old
// state.
__device__ __forceinline__ void advance_convolution(const Convolution& in, const DeltaShape& shape,
                                                    int channel) {
  bf16* state = state_of(in, shape, channel);
  const int64_t stride = shape.channels() + shape.value_size();
  const int kept = shape.taps - 1;
  for (int j = 0; j < kept; ++j) {
    const int64_t row = in.tokens - kept + j;
    state[j] = row >= 0 ? in.qkvz[row * stride + channel] : state[j + in.tokens];
  }
}

}  // namespace qwen::cuda
