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
cudaError_t multiply_dense(gemm::Arguments arguments, PrefillConfig config, cudaStream_t stream) {
  int64_t token_tiles = blocks_of(arguments.tokens, kTokens);
  arguments.width = kTokens;
  if (gemm::Tile<8, kRowTiles, kTokens, kOutput>::kPipelined) {
    // Alike, as a narrower tile takes less time.
    arguments.width = static_cast<int>(blocks_of(blocks_of(arguments.tokens, token_tiles), 8) * 8);
    token_tiles = blocks_of(arguments.tokens, arguments.width);
  }
  // Few enough for their rows to stay in L2.
  const gemm::Order order = {config.together > 0 ? config.together : 8, config.tile_each};
  return gemm::launch_multiply<kRowTiles, kTokens, kOutput, Rows::kDense>(arguments, token_tiles, order,
                                                                          stream);
}

template <int kRowTiles, int kTokens>
bool narrow_fits() {
  return gemm::fits<gemm::NarrowTile<kRowTiles, kTokens>>();
}

// As many row tiles a block as make a block a multiprocessor. Tokens are most of what such a block reads:
// where there are few row tiles, it has more of them, of half as many tokens.
template <Output kOutput>
cudaError_t multiply_narrow(const gemm::Arguments& arguments, cudaStream_t stream) {
  const auto share = [&](int64_t tokens) {
    return blocks_of(blocks_of(arguments.tokens, tokens) * arguments.w.row_tiles(), multiprocessors());
  };
  const int64_t of_16 = share(16);
  if (arguments.tokens > 16 && of_16 > 2) {
    const int64_t of_32 = share(32);
    if (of_32 > 5 && narrow_fits<6, 32>()) return gemm::launch_narrow<6, 32, kOutput>(arguments, stream);
    if (of_32 > 4 && narrow_fits<5, 32>()) return gemm::launch_narrow<5, 32, kOutput>(arguments, stream);
    if (of_32 > 2 && narrow_fits<4, 32>()) return gemm::launch_narrow<4, 32, kOutput>(arguments, stream);
    if (narrow_fits<2, 32>()) return gemm::launch_narrow<2, 32, kOutput>(arguments, stream);
  }
  if (of_16 > 5 && narrow_fits<6, 16>()) return gemm::launch_narrow<6, 16, kOutput>(arguments, stream);
  if (of_16 > 2 && narrow_fits<5, 16>()) return gemm::launch_narrow<5, 16, kOutput>(arguments, stream);
  if (of_16 > 1 && narrow_fits<2, 16>()) return gemm::launch_narrow<2, 16, kOutput>(arguments, stream);
  return gemm::launch_narrow<1, 16, kOutput>(arguments, stream);
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
  if (config.rows == 1 && narrow_fits<1, 16>()) return multiply_narrow<kOutput>(arguments, stream);
  switch (config.tokens) {
    case 16:
      return multiply_dense<1, 16, kOutput>(arguments, config, stream);
    case 32:
      return multiply_dense<1, 32, kOutput>(arguments, config, stream);
    case 128:
      return config.rows == 16 && gemm::fits<gemm::Tile<8, 2, 128, kOutput>>()
                 ? multiply_dense<2, 128, kOutput>(arguments, config, stream)
                 : multiply_dense<1, 128, kOutput>(arguments, config, stream);
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
