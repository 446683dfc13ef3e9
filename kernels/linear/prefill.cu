// The dense products of prefill.
#include "kernels/linear/cuda.h"
#include "kernels/linear/gemm.cuh"
#include "kernels/linear/gemm_narrow.cuh"
#include "kernels/linear/prefill_configs.h"

namespace qwen::cuda {

namespace {

using gemm::Output;
using gemm::Rows;

int64_t blocks_of(int64_t count, int64_t each) { return (count + each - 1) / each; }

template <int kRowTiles, int kTokens, Output kOutput>
cudaError_t multiply_dense(const gemm::Arguments& arguments, cudaStream_t stream) {
  return gemm::launch_multiply<8, kRowTiles, kTokens, kOutput, Rows::kDense>(
      arguments, blocks_of(arguments.tokens, kTokens), stream);
}

// As many row tiles a block as leave blocks for most of the machine.
template <Output kOutput>
cudaError_t multiply_narrow(const gemm::Arguments& arguments, cudaStream_t stream) {
  const int64_t blocks = blocks_of(arguments.tokens, 32) * arguments.w.row_tiles();  // of one row tile
  const int64_t most = blocks * 4 / (3 * int64_t{multiprocessors()});
  if (most >= 4 && gemm::fits<gemm::NarrowTile<4>>())
    return gemm::launch_narrow<4, kOutput>(arguments, stream);
  if (most >= 2 && gemm::fits<gemm::NarrowTile<2>>())
    return gemm::launch_narrow<2, kOutput>(arguments, stream);
  return gemm::launch_narrow<1, kOutput>(arguments, stream);
}

template <Output kOutput>
cudaError_t dense(PrefillKernel kernel, const bf16* x, Int4Matrix w, const bf16* residual, bf16* y,
                  int64_t tokens, cudaStream_t stream) {
  if (tokens == 0) return cudaSuccess;
  if (!w.is_valid() || (kOutput == Output::kSwiglu && w.n % 16 != 0)) return cudaErrorInvalidValue;
  if (tokens * w.k >= int64_t{1} << 31) {
    return cudaErrorInvalidValue;  // the kernel's offsets are 32 bits wide
  }
  gemm::Arguments arguments = {};
  arguments.x = x;
  arguments.w = w;
  arguments.residual = residual;
  arguments.y = y;
  arguments.tokens = static_cast<int>(tokens);
  const PrefillConfig config = prefill_config(kernel, w.n, w.k, w.group, tokens);
  if (config.rows == 1 && gemm::fits<gemm::NarrowTile<1>>())
    return multiply_narrow<kOutput>(arguments, stream);
  switch (config.tokens) {
    case 16:
      return multiply_dense<1, 16, kOutput>(arguments, stream);
    case 32:
      return multiply_dense<1, 32, kOutput>(arguments, stream);
    case 128:
      return config.rows == 16 && gemm::fits<gemm::Tile<8, 2, 128, kOutput>>()
                 ? multiply_dense<2, 128, kOutput>(arguments, stream)
                 : multiply_dense<1, 128, kOutput>(arguments, stream);
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
