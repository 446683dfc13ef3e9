// The end of prefill's mixture of experts: the weighted sum of a token's choices, bound by reading them.
#include "kernels/moe/choice.cuh"

namespace qwen::cuda {

namespace {

constexpr int kThreads = 128;
constexpr int kUnroll = 8;  // choices whose 16 bytes are in flight at once

__device__ __forceinline__ void add_scaled(float (&sum)[8], const uint4& v, float scale) {
  const uint32_t words[4] = {v.x, v.y, v.z, v.w};
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    sum[2 * i] += low_bf16(words[i]) * scale;
    sum[2 * i + 1] += high_bf16(words[i]) * scale;
  }
}

__device__ __forceinline__ uint4 load(const bf16* p) { return *reinterpret_cast<const uint4*>(p); }

// Nobody reads them again: if they are first out of L2, the rest of them, and what the next kernel reads, is
// still there. (ld.cs says as much but keeps less.)
__device__ __forceinline__ uint4 load_once(const bf16* p) {
#ifdef QWEN_CUDA_EMULATION
  return load(p);
#else
  uint4 v;
  uint64_t policy;
  asm("createpolicy.fractional.L2::evict_first.b64 %0, 1.0;" : "=l"(policy));
  asm volatile("ld.global.L1::no_allocate.L2::cache_hint.v4.u32 {%0, %1, %2, %3}, [%4], %5;"
               : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w)
               : "l"(p), "l"(policy)
               : "memory");
  return v;
#endif
}

// A block has one of `parts` parts of a token's columns, a thread eight of them.
__global__ void __launch_bounds__(kThreads)
    combine(const float* weights, const bf16* choices, const bf16* shared, const float* shared_logit,
            const bf16* residual, bf16* y, int hidden, int top_k, unsigned parts) {
  const unsigned token = blockIdx.x / parts;
  const int column = static_cast<int>(blockIdx.x % parts * kThreads + threadIdx.x) * 8;
  const size_t at = static_cast<size_t>(token) * hidden + column;
  const bf16* from = choices + static_cast<size_t>(token) * top_k * hidden + column;
  const float* scale = weights + static_cast<size_t>(token) * top_k;
  settle(from);
  settle(scale);
  wait_for_previous_kernel();
  let_next_kernel_start();
  if (column >= hidden) return;
  const float logit = shared_logit[token];
  uint4 values[kUnroll];
  float scales[kUnroll];
#pragma unroll
  for (int i = 0; i < kUnroll; ++i) {
    if (i >= top_k) continue;
    scales[i] = scale[i];
    values[i] = load_once(from + static_cast<size_t>(i) * hidden);
  }
  const uint4 residual_chunk = load(residual + at);
  const uint4 shared_chunk = load(shared + at);
  float sum[8] = {};
#pragma unroll
  for (int i = 0; i < kUnroll; ++i) {
    if (i < top_k) add_scaled(sum, values[i], scales[i]);
  }
  for (int i = kUnroll; i < top_k; ++i) {
    add_scaled(sum, load_once(from + static_cast<size_t>(i) * hidden), scale[i]);
  }
  add_scaled(sum, shared_chunk, shared_weight(logit));
  add_scaled(sum, residual_chunk, 1.0F);
  *reinterpret_cast<uint4*>(y + at) = {pack_bf16(sum[0], sum[1]), pack_bf16(sum[2], sum[3]),
                                       pack_bf16(sum[4], sum[5]), pack_bf16(sum[6], sum[7])};
}

}  // namespace

cudaError_t moe_combine(const float* weights, const bf16* choices, const bf16* shared,
                        const float* shared_logit, const bf16* residual, bf16* y, MoeShape shape,
                        int64_t tokens, cudaStream_t stream) {
  if (tokens == 0) return cudaSuccess;
  if (shape.hidden < 1 || shape.hidden % 8 != 0 || shape.top_k < 1) return cudaErrorInvalidValue;
  const unsigned parts = (static_cast<unsigned>(shape.hidden) / 8 + kThreads - 1) / kThreads;
  const int64_t blocks = tokens * parts;
  if (tokens < 0 || blocks >= int64_t{1} << 31) return cudaErrorInvalidValue;
  return launch(combine, {dim3(static_cast<unsigned>(blocks)), dim3(kThreads)}, stream, weights, choices,
                shared, shared_logit, residual, y, shape.hidden, shape.top_k, parts);
}

}  // namespace qwen::cuda
