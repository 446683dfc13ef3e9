// The dense products of prefill.
#include "kernels/linear/cuda.h"
#include "kernels/linear/gemm.cuh"
#include "kernels/linear/prefill_configs.h"

namespace qwen::cuda {

namespace {

using gemm::Output;
using gemm::Rows;

template <int kTokens, Output kOutput>
cudaError_t multiply_dense(const gemm::Arguments& arguments, cudaStream_t stream) {
  const int token_tiles = (arguments.tokens + kTokens - 1) / kTokens;
  return gemm::launch_multiply<1, kTokens, kOutput, Rows::kDense>(arguments, token_tiles, 1, stream);
}

template <Output kOutput>
cudaError_t dense(PrefillKernel kernel, const bf16* x, Int4Matrix w, const bf16* residual, bf16* y,
                  int64_t tokens, cudaStream_t stream) {
  if (tokens == 0) return cudaSuccess;
  if (tokens * w.k >= int64_t{1} << 31)
    return cudaErrorInvalidValue;  // the kernel's offsets are 32 bits wide
  gemm::Arguments arguments = {};
  arguments.x = x;
  arguments.w = w;
  arguments.residual = residual;
  arguments.y = y;
  arguments.tokens = static_cast<int>(tokens);
  switch (prefill_config(kernel, w.n, w.k, w.group, tokens).tokens) {
    case 16:
      return multiply_dense<16, kOutput>(arguments, stream);
    case 32:
      return multiply_dense<32, kOutput>(arguments, stream);
    case 128:
      return multiply_dense<128, kOutput>(arguments, stream);
    default:
      return cudaErrorInvalidValue;
  }
}

}  // namespace

cudaError_t int4_linear_prefill(const bf16* x, Int4Matrix w, const bf16* residual, bf16* y, int64_t tokens,
                                cudaStream_t stream) {
  return dense<Output::kPlain>(kLinearPrefill, x, w, residual, y, tokens, stream);
}

cudaError_t int4_swiglu_prefill(const bf16* x, Int4Matrix w, bf16* y, int64_t tokens, cudaStream_t stream) {
  return dense<Output::kSwiglu>(kSwigluPrefill, x, w, nullptr, y, tokens, stream);
}

}  // namespace qwen::cuda
