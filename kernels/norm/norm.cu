#include "kernels/cuda/primitives.cuh"
#include "kernels/norm/cuda.h"

namespace qwen::cuda {
namespace {

constexpr int kWarps = 4;
constexpr int kThreads = 32 * kWarps;
// A lane keeps the vectors of rows of up to 2048 elements in registers, all loads in flight at once; of
// longer rows it reads the rest twice.
constexpr int kHeld = 8;
constexpr int kFours = 2;

__device__ float sum_of_squares(uint4 v) {
  const uint32_t words[4] = {v.x, v.y, v.z, v.w};
  float sum = 0;
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    const float low = low_bf16(words[i]), high = high_bf16(words[i]);
    sum += low * low + high * high;
  }
  return sum;
}

__device__ uint4 normed(uint4 v, uint4 weight, float scale) {
  const uint32_t words[4] = {v.x, v.y, v.z, v.w}, weights[4] = {weight.x, weight.y, weight.z, weight.w};
  uint32_t out[4];
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    out[i] = pack_bf16(low_bf16(words[i]) * scale * (1.0F + low_bf16(weights[i])),
                       high_bf16(words[i]) * scale * (1.0F + high_bf16(weights[i])));
  }
  return {out[0], out[1], out[2], out[3]};
}

// A warp a row. x and y may be the same.
__global__ void __launch_bounds__(kThreads)
    norm_rows(const uint4* x, const uint4* weight, float eps, uint4* y, int64_t tokens, int d) {
  let_next_kernel_start();
  const int vectors = d / 8, lane = threadIdx.x % 32;
  uint4 weights[kHeld];
#pragma unroll
  for (int i = 0; i < kHeld; ++i) {
    const int v = lane + 32 * i;
    weights[i] = v < vectors ? __ldg(weight + v) : uint4{0, 0, 0, 0};
  }
  wait_for_previous_kernel();
  const int64_t row = blockIdx.x * int64_t{kWarps} + threadIdx.x / 32;
  if (row >= tokens) return;
  x += row * vectors;
  y += row * vectors;
  uint4 held[kHeld];
#pragma unroll
  for (int i = 0; i < kHeld; ++i) {
    const int v = lane + 32 * i;
    held[i] = v < vectors ? x[v] : uint4{0, 0, 0, 0};
  }
  float sum = 0;
#pragma unroll
  for (int i = 0; i < kHeld; ++i) sum += sum_of_squares(held[i]);
  for (int v = lane + 32 * kHeld; v < vectors; v += 32) sum += sum_of_squares(x[v]);
  const float scale = rsqrtf(warp_sum(sum) / static_cast<float>(d) + eps);
#pragma unroll
  for (int i = 0; i < kHeld; ++i) {
    const int v = lane + 32 * i;
    if (v < vectors) y[v] = normed(held[i], weights[i], scale);
  }
  for (int v = lane + 32 * kHeld; v < vectors; v += 32) y[v] = normed(x[v], __ldg(weight + v), scale);
}

__device__ float gated(float value, float scale, float weight, float gate) {
  const float weighted = round_bf16(weight * round_bf16(value * scale));
  return weighted * (gate / (1.0F + __expf(-gate)));
}

__device__ uint2 gated(const float4& v, float scale, uint2 weight, uint2 gate) {
  return {pack_bf16(gated(v.x, scale, low_bf16(weight.x), low_bf16(gate.x)),
                    gated(v.y, scale, high_bf16(weight.x), high_bf16(gate.x))),
          pack_bf16(gated(v.z, scale, low_bf16(weight.y), low_bf16(gate.y)),
                    gated(v.w, scale, high_bf16(weight.y), high_bf16(gate.y)))};
}

// `width` lanes a head, a power of two up to 32. A lane has four elements at a time, the first kFours times
// in registers; of longer heads it reads the rest twice.
__global__ void __launch_bounds__(kThreads)
    norm_heads(const float* x, const bf16* gate, int64_t gate_stride, const bf16* weight, float eps, bf16* y,
               int64_t tokens, int heads, int dim, int width) {
  let_next_kernel_start();
  wait_for_previous_kernel();
  const int64_t head = (blockIdx.x * int64_t{kThreads} + threadIdx.x) / width;
  const int lane = threadIdx.x % width;
  const bool exists = head < tokens * heads;  // the shuffles below need whole warps
  if (exists) {
    x += head * dim;
    y += head * dim;
    gate += head / heads * gate_stride + head % heads * dim;
  }
  const int end = exists ? dim : 0;
  const auto load = [&](int i) {
    const float4 v = *reinterpret_cast<const float4*>(x + i);
    return float4{round_bf16(v.x), round_bf16(v.y), round_bf16(v.z), round_bf16(v.w)};
  };
  const auto load_gate = [&](int i) { return *reinterpret_cast<const uint2*>(gate + i); };
  const auto load_weight = [&](int i) { return __ldg(reinterpret_cast<const uint2*>(weight + i)); };
  const auto squares = [](const float4& v) { return (v.x * v.x + v.y * v.y) + (v.z * v.z + v.w * v.w); };
  float4 held[kFours];
  uint2 gates[kFours];
  uint2 weights[kFours];
#pragma unroll
  for (int j = 0; j < kFours; ++j) {  // all loads at once
    const int i = 4 * (lane + j * width);
    held[j] = {0, 0, 0, 0};
    gates[j] = weights[j] = {0, 0};
    if (i >= end) continue;
    held[j] = load(i);
    gates[j] = load_gate(i);
    weights[j] = load_weight(i);
  }
  float sum = 0;
#pragma unroll
  for (int j = 0; j < kFours; ++j) sum += squares(held[j]);
  for (int i = 4 * (lane + kFours * width); i < end; i += 4 * width) sum += squares(load(i));
  const float scale = rsqrtf(warp_sum(sum, width) / static_cast<float>(dim) + eps);
#pragma unroll
  for (int j = 0; j < kFours; ++j) {
    const int i = 4 * (lane + j * width);
    if (i < end) *reinterpret_cast<uint2*>(y + i) = gated(held[j], scale, weights[j], gates[j]);
  }
  for (int i = 4 * (lane + kFours * width); i < end; i += 4 * width) {
    *reinterpret_cast<uint2*>(y + i) = gated(load(i), scale, load_weight(i), load_gate(i));
  }
}

unsigned blocks_for(int64_t count, int64_t per_block) {
  return static_cast<unsigned>((count + per_block - 1) / per_block);
}

}  // namespace

cudaError_t rms_norm(const bf16* x, RmsNorm norm, bf16* y, int64_t tokens, int d, cudaStream_t stream) {
  if (norm.weight == nullptr || tokens <= 0 || d <= 0 || d % 8 != 0) return cudaErrorInvalidValue;
  return launch(&norm_rows, {dim3(blocks_for(tokens, kWarps)), dim3(kThreads)}, stream,
                reinterpret_cast<const uint4*>(x), reinterpret_cast<const uint4*>(norm.weight), norm.eps,
                reinterpret_cast<uint4*>(y), tokens, d);
}

cudaError_t gated_rms_norm(const float* x, const bf16* gate, int64_t gate_stride, const bf16* weight,
                           float eps, bf16* y, int64_t tokens, int heads, int dim, cudaStream_t stream) {
  if (tokens <= 0 || heads <= 0 || dim <= 0 || dim % 4 != 0 || gate_stride % 4 != 0)
    return cudaErrorInvalidValue;
  int width = 32;
  while (width > 1 && 4 * kFours * (width / 2) >= dim) width /= 2;
  return launch(&norm_heads, {dim3(blocks_for(tokens * heads, kThreads / width)), dim3(kThreads)}, stream, x,
                gate, gate_stride, weight, eps, y, tokens, heads, dim, width);
}

}  // namespace qwen::cuda
