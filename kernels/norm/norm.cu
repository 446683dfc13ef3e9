#include "kernels/cuda/primitives.cuh"
#include "kernels/norm/cuda.h"

namespace qwen::cuda {
namespace {

constexpr int kWarps = 4;
constexpr int kThreads = 32 * kWarps;
// A thread keeps the vectors of rows of up to 2048 elements in registers, all loads in flight at once; of
// longer rows it reads the rest twice.
constexpr int kHeld = 2;

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

// A block a row. x and y may be the same.
__global__ void __launch_bounds__(kThreads)
    norm_rows(const uint4* x, const uint4* weight, float eps, uint4* y, int d) {
  __shared__ float sums[kWarps];
  let_next_kernel_start();
  const int vectors = d / 8, thread = threadIdx.x;
  uint4 weights[kHeld];
#pragma unroll
  for (int i = 0; i < kHeld; ++i) {
    const int v = thread + kThreads * i;
    weights[i] = v < vectors ? __ldg(weight + v) : uint4{0, 0, 0, 0};
  }
  x += static_cast<size_t>(blockIdx.x) * vectors;
  y += static_cast<size_t>(blockIdx.x) * vectors;
  wait_for_previous_kernel();
  uint4 held[kHeld];
#pragma unroll
  for (int i = 0; i < kHeld; ++i) {
    const int v = thread + kThreads * i;
    held[i] = v < vectors ? x[v] : uint4{0, 0, 0, 0};
  }
  float sum = 0;
#pragma unroll
  for (int i = 0; i < kHeld; ++i) sum += sum_of_squares(held[i]);
  for (int v = thread + kThreads * kHeld; v < vectors; v += kThreads) sum += sum_of_squares(x[v]);
  sum = warp_sum(sum);
  if (thread % 32 == 0) sums[thread / 32] = sum;
  __syncthreads();
  sum = (sums[0] + sums[1]) + (sums[2] + sums[3]);
  const float scale = rsqrtf(sum / static_cast<float>(d) + eps);
#pragma unroll
  for (int i = 0; i < kHeld; ++i) {
    const int v = thread + kThreads * i;
    if (v < vectors) y[v] = normed(held[i], weights[i], scale);
  }
  for (int v = thread + kThreads * kHeld; v < vectors; v += kThreads) {
    y[v] = normed(x[v], __ldg(weight + v), scale);
  }
}

// Values times a scale, rounded to bfloat16.
__device__ uint32_t scaled(uint32_t pair, float scale) {
  return pack_bf16(low_bf16(pair) * scale, high_bf16(pair) * scale);
}
__device__ uint32_t product(uint32_t a, uint32_t b) {
  return pack_bf16(low_bf16(a) * low_bf16(b), high_bf16(a) * high_bf16(b));
}
__device__ float silu(float v) { return __fdividef(v, 1.0F + __expf(-v)); }
__device__ uint32_t gated(uint32_t pair, uint32_t gate) {
  return pack_bf16(low_bf16(pair) * silu(low_bf16(gate)), high_bf16(pair) * silu(high_bf16(gate)));
}

__device__ uint4 gated(uint4 v, float scale, uint4 weight, uint4 gate) {
  return {gated(product(scaled(v.x, scale), weight.x), gate.x),
          gated(product(scaled(v.y, scale), weight.y), gate.y),
          gated(product(scaled(v.z, scale), weight.z), gate.z),
          gated(product(scaled(v.w, scale), weight.w), gate.w)};
}

// Eight elements, which nobody reads again.
__device__ uint4 load_once(const bf16* p) { return __ldcs(reinterpret_cast<const uint4*>(p)); }
__device__ uint4 load_once(const float* p) {  // rounded to bfloat16
  const float4 low = __ldcs(reinterpret_cast<const float4*>(p));
  const float4 high = __ldcs(reinterpret_cast<const float4*>(p) + 1);
  return {pack_bf16(low.x, low.y), pack_bf16(low.z, low.w), pack_bf16(high.x, high.y),
          pack_bf16(high.z, high.w)};
}

// `width` lanes a head, a power of two up to 32. A lane has eight elements at a time, the first in registers;
// of heads of more than 256 it reads the rest twice. The last tokens come first: what was written last is
// still in L2.
__global__ void __launch_bounds__(kThreads)
    norm_heads(const float* x, const bf16* gate, int64_t gate_stride, const bf16* weight, float eps, bf16* y,
               unsigned all_heads, unsigned heads, int dim, int width) {
  let_next_kernel_start();
  const unsigned head = ((gridDim.x - 1 - blockIdx.x) * kThreads + threadIdx.x) / width;
  const int first = static_cast<int>(threadIdx.x) % width * 8;
  const int end = head < all_heads ? dim : 0;  // the shuffles below need whole warps
  const unsigned token = head / heads;
  x += static_cast<size_t>(head) * dim;
  y += static_cast<size_t>(head) * dim;
  gate += token * gate_stride + static_cast<size_t>(head - token * heads) * dim;
  const auto load_weight = [&](int i) { return __ldg(reinterpret_cast<const uint4*>(weight + i)); };
  uint4 held = {0, 0, 0, 0}, gates = held, weights = held;
  if (first < dim) weights = load_weight(first);
  const float* own = x + first;
  const bf16* own_gate = gate + first;
  settle(own);
  settle(own_gate);
  wait_for_previous_kernel();
  if (first < end) {
    gates = load_once(own_gate);
    held = load_once(own);
  }
  float sum = sum_of_squares(held);
  for (int i = first + 8 * width; i < end; i += 8 * width) sum += sum_of_squares(load_once(x + i));
  const float scale = rsqrtf(warp_sum(sum, width) / static_cast<float>(dim) + eps);
  const auto store = [&](int i, uint4 v) { *reinterpret_cast<uint4*>(y + i) = v; };
  if (first < end) store(first, gated(held, scale, weights, gates));
  for (int i = first + 8 * width; i < end; i += 8 * width) {
    store(i, gated(load_once(x + i), scale, load_weight(i), load_once(gate + i)));
  }
}

}  // namespace

cudaError_t rms_norm(const bf16* x, RmsNorm norm, bf16* y, int64_t tokens, int d, cudaStream_t stream) {
  if (norm.weight == nullptr || tokens <= 0 || tokens >= int64_t{1} << 31 || d <= 0 || d % 8 != 0) {
    return cudaErrorInvalidValue;
  }
  return launch(&norm_rows, {dim3(static_cast<unsigned>(tokens)), dim3(kThreads)}, stream,
                reinterpret_cast<const uint4*>(x), reinterpret_cast<const uint4*>(norm.weight), norm.eps,
                reinterpret_cast<uint4*>(y), d);
}

cudaError_t gated_rms_norm(const float* x, const bf16* gate, int64_t gate_stride, const bf16* weight,
                           float eps, bf16* y, int64_t tokens, int heads, int dim, cudaStream_t stream) {
  if (tokens <= 0 || heads <= 0 || dim <= 0 || dim % 8 != 0 || gate_stride % 8 != 0 ||
      tokens * heads >= int64_t{1} << 27) {
    return cudaErrorInvalidValue;
  }
  unsigned width = 32;
  while (width > 1 && 8 * (width / 2) >= static_cast<unsigned>(dim)) width /= 2;
  const unsigned all = static_cast<unsigned>(tokens * heads);
  const unsigned per_block = kThreads / width;
  return launch(&norm_heads, {dim3((all + per_block - 1) / per_block), dim3(kThreads)}, stream, x, gate,
                gate_stride, weight, eps, y, all, static_cast<unsigned>(heads), dim, static_cast<int>(width));
}

}  // namespace qwen::cuda
