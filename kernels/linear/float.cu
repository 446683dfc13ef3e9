// Prefill's products with small bfloat16 matrices: the router, the shared expert's gate, the gates of the
// delta rule.
//
// A block of four warps makes 32 tokens by 64 features; a warp has 16 features and all tokens. Small, because
// N is: 64 features by 1642 tokens are 52 blocks.
#include "kernels/cuda/primitives.cuh"
#include "kernels/linear/cuda.h"

namespace qwen::cuda {

namespace {

constexpr int kTokens = 32;
constexpr int kFeatures = 64;
constexpr int kThreads = 128;
constexpr int kDepth = 64;  // columns a step
constexpr int kRowBytes = 2 * kDepth;
constexpr int kStageBytes = (kTokens + kFeatures) * kRowBytes;
constexpr int kStages = 6;
constexpr int kRowsPerPass = kThreads / 8;  // eight threads copy a row's 128 bytes

__global__ void __launch_bounds__(kThreads)
    multiply_float(const bf16* x, const bf16* w, float* y, int tokens, int k, int n) {
  QWEN_DYNAMIC_SHARED(shared);
  const int token_tiles = (tokens + kTokens - 1) / kTokens;
  const int first_token = static_cast<int>(blockIdx.x % token_tiles) * kTokens;
  const int first_feature = static_cast<int>(blockIdx.x / token_tiles) * kFeatures;
  const int lane = threadIdx.x % 32;
  const int warp = threadIdx.x / 32;
  const int steps = (k + kDepth - 1) / kDepth;

  // A stage is rows of 128 bytes, weights then tokens, whose 16-byte chunk i lies at i ^ (row % 8).
  const int chunk = threadIdx.x % 8;
  const int row = threadIdx.x / 8;
  const auto copy = [&](const bf16* from, int first, int rows, int step, unsigned char* to, int passes) {
    const int column = step * kDepth + chunk * 8;
    for (int i = 0; i < passes; ++i) {
      const int r = row + i * kRowsPerPass;
      const bool valid = first + r < rows && column < k;
      copy_async_16(to + r * kRowBytes + (chunk ^ (r % 8)) * 16,
                    valid ? from + static_cast<size_t>(first + r) * k + column : from, valid);
    }
  };
  const auto stage = [&](int step) { return shared + step % kStages * kStageBytes; };
  const auto copy_weights = [&](int step) {
    copy(w, first_feature, n, step, stage(step), kFeatures / kRowsPerPass);
  };
  const auto copy_tokens = [&](int step) {
    copy(x, first_token, tokens, step, stage(step) + kFeatures * kRowBytes, kTokens / kRowsPerPass);
  };
  for (int s = 0; s < min(kStages - 1, steps); ++s) copy_weights(s);
  wait_for_previous_kernel();
  for (int s = 0; s < kStages - 1; ++s) {
    if (s < steps) copy_tokens(s);
    copy_async_commit();
  }
  let_next_kernel_start();

  float acc[kTokens / 8][4] = {};
  for (int s = 0; s < steps; ++s) {
    copy_async_wait<kStages - 2>();
    __syncthreads();
    if (s + kStages - 1 < steps) {
      copy_weights(s + kStages - 1);
      copy_tokens(s + kStages - 1);
    }
    copy_async_commit();
    const unsigned char* weights = stage(s) + warp * 16 * kRowBytes;
    const unsigned char* xs = stage(s) + kFeatures * kRowBytes;
#pragma unroll
    for (int block = 0; block < kDepth / 16; ++block) {
      // Matrices: rows 0-7 and 8-15 of the first 8 columns, then of the others.
      uint32_t a[4];
      const int weight_chunk = (2 * block + lane / 16) ^ (lane % 8);
      load_matrix_x4(a, weights + lane % 16 * kRowBytes + weight_chunk * 16);
#pragma unroll
      for (int j = 0; j < kTokens / 16; ++j) {
        uint32_t b[4];
        const int token_chunk = (2 * block + lane / 8 % 2) ^ (lane % 8);
        load_matrix_x4(b, xs + (16 * j + lane % 8 + lane / 16 * 8) * kRowBytes + token_chunk * 16);
        const uint32_t first[2] = {b[0], b[1]};
        const uint32_t second[2] = {b[2], b[3]};
        mma_bf16(acc[2 * j], a, first);
        mma_bf16(acc[2 * j + 1], a, second);
      }
    }
  }
#pragma unroll
  for (int j = 0; j < kTokens / 8; ++j) {
#pragma unroll
    for (int e = 0; e < 4; ++e) {
      const int feature = first_feature + warp * 16 + lane / 4 + e / 2 * 8;
      const int token = first_token + 8 * j + lane % 4 * 2 + e % 2;
      if (feature >= n || token >= tokens) continue;
      y[static_cast<size_t>(token) * n + feature] = round_bf16(acc[j][e]);
    }
  }
}

}  // namespace

cudaError_t float_linear_prefill(const bf16* x, const bf16* w, float* y, int64_t tokens, int k, int n,
                                 cudaStream_t stream) {
  if (tokens == 0) return cudaSuccess;
  if (tokens < 0 || tokens >= int64_t{1} << 31 || k < 1 || k % 8 != 0 || n < 1) return cudaErrorInvalidValue;
  const int64_t blocks = (tokens + kTokens - 1) / kTokens * ((n + kFeatures - 1) / kFeatures);
  return launch(multiply_float, {dim3(static_cast<unsigned>(blocks)), dim3(kThreads), kStages * kStageBytes},
                stream, x, w, y, static_cast<int>(tokens), k, n);
}

}  // namespace qwen::cuda
