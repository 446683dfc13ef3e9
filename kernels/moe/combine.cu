// The end of prefill's mixture of experts: the weighted sum of a token's choices, bound by reading them.
#include "kernels/moe/choice.cuh"

namespace qwen::cuda {

namespace {

constexpr int kThreads = 256;
constexpr int kUnroll = 8;  // choices whose 16 bytes are in flight at once

__device__ __forceinline__ void add_scaled(float (&sum)[8], const uint4& v, float scale) {
  const uint32_t words[4] = {v.x, v.y, v.z, v.w};
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    sum[2 * i] += low_bf16(words[i]) * scale;
    sum[2 * i + 1] += high_bf16(words[i]) * scale;
  }
}

// A thread has eight columns of a token.
__global__ void __launch_bounds__(kThreads)
    combine(const float* weights, const bf16* choices, const bf16* shared, const float* shared_logit,
            const bf16* residual, bf16* y, int hidden, int top_k, int64_t chunks) {
  wait_for_previous_kernel();
  let_next_kernel_start();
  const int64_t at = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x;
  if (at >= chunks) return;
  const int per_token = hidden / 8;
  const int64_t token = at / per_token;
  const auto load = [](const bf16* p) { return *reinterpret_cast<const uint4*>(p); };
  const uint4 residual_chunk = load(residual + at * 8);
  const uint4 shared_chunk = load(shared + at * 8);
  const float logit = shared_logit[token];
  const bf16* from = choices + token * top_k * hidden + at % per_token * 8;
  const float* scale = weights + token * top_k;
  float sum[8] = {};
  for (int first = 0; first < top_k; first += kUnroll) {
    uint4 values[kUnroll];
    float scales[kUnroll];
#pragma unroll
    for (int i = 0; i < kUnroll; ++i) {
      if (first + i >= top_k) continue;
      values[i] = load(from + static_cast<int64_t>(first + i) * hidden);
      scales[i] = scale[first + i];
    }
#pragma unroll
    for (int i = 0; i < kUnroll; ++i) {
      if (first + i < top_k) add_scaled(sum, values[i], scales[i]);
    }
  }
  add_scaled(sum, shared_chunk, shared_weight(logit));
  add_scaled(sum, residual_chunk, 1.0F);
  *reinterpret_cast<uint4*>(y + at * 8) = {pack_bf16(sum[0], sum[1]), pack_bf16(sum[2], sum[3]),
                                           pack_bf16(sum[4], sum[5]), pack_bf16(sum[6], sum[7])};
}

}  // namespace

cudaError_t moe_combine(const float* weights, const bf16* choices, const bf16* shared,
                        const float* shared_logit, const bf16* residual, bf16* y, MoeShape shape,
                        int64_t tokens, cudaStream_t stream) {
  if (tokens == 0) return cudaSuccess;
  if (shape.hidden < 1 || shape.hidden % 8 != 0 || shape.top_k < 1) return cudaErrorInvalidValue;
  const int64_t chunks = tokens * (shape.hidden / 8);
  const dim3 grid(static_cast<unsigned>((chunks + kThreads - 1) / kThreads));
  return launch(combine, {grid, dim3(kThreads)}, stream, weights, choices, shared, shared_logit, residual, y,
                shape.hidden, shape.top_k, chunks);
}

}  // namespace qwen::cuda
