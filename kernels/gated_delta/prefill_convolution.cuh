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

// silu of the convolution of kRows rows from `begin`, a multiple of kRows >= 3, of four channels: sink(i,
// float4) for row begin + i, zero past the last token.
template <int kRows, typename Sink>
__device__ __forceinline__ void convolve(const Convolution& in, const DeltaShape& shape, int channel,
                                         int64_t begin, const Sink& sink) {
  constexpr int kBefore = kMaxTaps - 1;
  const int stride = shape.channels() + shape.value_size();
  const int64_t left = in.tokens - begin;
  if (left <= 0) {
#pragma unroll
    for (int i = 0; i < kRows; ++i) sink(i, float4{});
    return;
  }
  const int rows_left = left < kRows ? static_cast<int>(left) : kRows;
  // Rows begin - 3 and on, four channels each. Rows before the first come from the state, which keeps taps -
  // 1 of them.
  uint2 rows[kBefore + kRows];
  const bf16* const from = in.qkvz + begin * stride + channel;
  // The last token again past it: without a condition, all loads go out at once.
  const auto load = [&](int i) {
    return *reinterpret_cast<const uint2*>(from + (i < rows_left ? i : rows_left - 1) * stride);
  };
  if (begin >= kBefore) {
#pragma unroll
    for (int i = 0; i < kBefore; ++i) {
      rows[i] = load(i - kBefore);
    }
  } else {
#pragma unroll
    for (int i = 0; i < kBefore; ++i) {
      const int tap = i - (kMaxTaps - shape.taps);
      if (tap < 0) {
        rows[i] = {0, 0};
        continue;
      }
      const bf16* const before = state_of(in, shape, channel) + tap;
      const auto value = [&](int c) { return __bfloat162float(before[c * (shape.taps - 1)]); };
      rows[i] = {pack_bf16(value(0), value(1)), pack_bf16(value(2), value(3))};
    }
  }
#pragma unroll
  for (int i = 0; i < kRows; ++i) {
    rows[kBefore + i] = load(i);
  }
  float4 weight[kMaxTaps];  // of the row kMaxTaps - 1 before, ..., of the row itself
  if (shape.taps == kMaxTaps) {
    const auto* packed = reinterpret_cast<const uint4*>(in.weight + channel * kMaxTaps);
    const uint4 first = packed[0];
    const uint4 second = packed[1];
    weight[0] = {low_bf16(first.x), low_bf16(first.z), low_bf16(second.x), low_bf16(second.z)};
    weight[1] = {high_bf16(first.x), high_bf16(first.z), high_bf16(second.x), high_bf16(second.z)};
    weight[2] = {low_bf16(first.y), low_bf16(first.w), low_bf16(second.y), low_bf16(second.w)};
    weight[3] = {high_bf16(first.y), high_bf16(first.w), high_bf16(second.y), high_bf16(second.w)};
  } else {
#pragma unroll
    for (int j = 0; j < kMaxTaps; ++j) {
      const int tap = j - (kMaxTaps - shape.taps);
      const auto value = [&](int c) {
        return tap < 0 ? 0.0F : __bfloat162float(in.weight[(channel + c) * shape.taps + tap]);
      };
      weight[j] = {value(0), value(1), value(2), value(3)};
    }
  }
#pragma unroll
  for (int i = 0; i < kRows; ++i) {
    float4 sum = {};
#pragma unroll
    for (int j = 0; j < kMaxTaps; ++j) {
      sum.x += weight[j].x * low_bf16(rows[i + j].x);
      sum.y += weight[j].y * high_bf16(rows[i + j].x);
      sum.z += weight[j].z * low_bf16(rows[i + j].y);
      sum.w += weight[j].w * high_bf16(rows[i + j].y);
    }
    if (i >= rows_left) sum = {};
    sink(i, float4{fast_silu(sum.x), fast_silu(sum.y), fast_silu(sum.z), fast_silu(sum.w)});
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
