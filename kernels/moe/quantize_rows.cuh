// Activations of 8 bits: rows quantized once, outside the products' loop over the columns.
#pragma once

#include <cuda_fp8.h>

#include "kernels/moe/rows_8bit.cuh"

namespace qwen::cuda::moe8 {

template <ExpertActivations kKind>
__device__ __forceinline__ uint32_t quantize_four(float a, float b, float c, float d) {
  if constexpr (kKind == ExpertActivations::kInt8) {
    const auto code = [](float v) {
      return static_cast<uint32_t>(max(-127, min(127, __float2int_rn(v)))) & 0xffU;
    };
    return code(a) | code(b) << 8 | code(c) << 16 | code(d) << 24;
  } else {
    const uint32_t low = __nv_cvt_float2_to_fp8x2({a, b}, __NV_SATFINITE, __NV_E4M3);
    const uint32_t high = __nv_cvt_float2_to_fp8x2({c, d}, __NV_SATFINITE, __NV_E4M3);
    return low | high << 16;
  }
}

inline constexpr int kQuantizeThreads = 256;

// `lanes` threads a row, a power of two, at least eight: each has sixteen columns, of 32 two eights 16 apart,
// of every 16 lanes. kGroups: a scale a group of 128, which eight lanes have.
template <ExpertActivations kKind, bool kGroups>
__global__ void __launch_bounds__(kQuantizeThreads)
    quantize_rows(const bf16* x, QuantizedRows out, int64_t rows, int lanes) {
  __shared__ float of_warp[kQuantizeThreads / 32];
  wait_for_previous_kernel();
  let_next_kernel_start();
  const int lane = threadIdx.x % lanes;
  const int64_t row = static_cast<int64_t>(blockIdx.x) * (kQuantizeThreads / lanes) + threadIdx.x / lanes;
  const bool exists = row < rows;
  const auto* const from = reinterpret_cast<const uint4*>(x + (exists ? row : 0) * out.k);
  const int first = lane / 2 * 32 + lane % 2 * 8;
  const int columns = 16 * lanes;  // at once
  const auto load = [&](int column) { return column < out.k ? from[column / 8] : uint4{}; };
  const auto largest_of = [](float largest, const uint4& low, const uint4& high) {
    const uint32_t pairs[8] = {low.x, low.y, low.z, low.w, high.x, high.y, high.z, high.w};
#pragma unroll
    for (const uint32_t pair : pairs) {
      largest = fmaxf(largest, fmaxf(fabsf(low_bf16(pair)), fabsf(high_bf16(pair))));
    }
    return largest;
  };
  uint4 low = load(first);
  uint4 high = load(first + 16);
  float largest = largest_of(0, low, high);
  if constexpr (!kGroups) {
    for (int at = columns; at < out.k; at += columns) {
      largest = largest_of(largest, load(at + first), load(at + first + 16));
    }
    largest = warp_max(largest, min(lanes, 32));
    if (lanes > 32) {
      if (threadIdx.x % 32 == 0) of_warp[threadIdx.x / 32] = largest;
      __syncthreads();
      const int warps = lanes / 32;
      const int first_warp = static_cast<int>(threadIdx.x) / lanes * warps;
      for (int i = 0; i < warps; ++i) largest = fmaxf(largest, of_warp[first_warp + i]);
    }
    if (lane == 0 && exists) out.scales[row] = largest * (kOperand<kKind> / kLargest<kKind>);
  }
  for (int at = 0; at < out.pitch(); at += columns) {
    if (at > 0) {
      low = load(at + first);
      high = load(at + first + 16);
    }
    if constexpr (kGroups) {
      largest = warp_max(largest_of(0, low, high), 8);
      const int group = (at + lane * 16) / kColumns;
      if (lane % 8 == 0 && exists && group < out.groups()) {
        out.scales[row * out.groups() + group] = largest * (kOperand<kKind> / kLargest<kKind>);
      }
    }
    const float inverse = largest > 1e-30F ? kLargest<kKind> / largest : 0;
    const auto four = [&](uint32_t p, uint32_t q) {
      return quantize_four<kKind>(low_bf16(p) * inverse, low_bf16(q) * inverse, high_bf16(p) * inverse,
                                  high_bf16(q) * inverse);
    };
    if (exists && at + lane * 16 < out.pitch()) {
      *reinterpret_cast<uint4*>(out.codes + row * out.pitch() + at + lane * 16) = {
          four(low.x, high.x), four(low.y, high.y), four(low.z, high.z), four(low.w, high.w)};
    }
  }
}

template <ExpertActivations kKind, bool kGroups>
cudaError_t launch_quantize(const bf16* x, const QuantizedRows& out, int64_t rows, cudaStream_t stream) {
  int lanes = 8;
  while (lanes * 16 < out.k && lanes < kQuantizeThreads) lanes *= 2;
  const int64_t at_once = kQuantizeThreads / lanes;
  const dim3 grid(static_cast<unsigned>((rows + at_once - 1) / at_once));
  return launch(quantize_rows<kKind, kGroups>, {grid, dim3(kQuantizeThreads)}, stream, x, out, rows, lanes);
}

}  // namespace qwen::cuda::moe8
