// The routed experts of prefill: every expert's product with the rows that chose it.
//
// There are as many tiles as any routing can need; a block finds a tile's expert in `offsets` and leaves
// where there is none. Tiles of one expert follow each other: its weights and its rows are read from memory
// once.
#include <algorithm>

#include "kernels/linear/gemm.cuh"
#include "kernels/linear/gemm_few.cuh"
#include "kernels/linear/prefill_configs.h"
#include "kernels/moe/cuda.h"

namespace qwen::cuda {

namespace {

using gemm::Output;
using gemm::Rows;

template <int kRowTiles, int kTokens, Output kOutput, Rows kRows>
cudaError_t multiply_experts(const gemm::Arguments& arguments, int64_t choices, PrefillConfig config,
                             cudaStream_t stream) {
  const int64_t most = choices / kTokens + std::min<int64_t>(arguments.experts, choices);
  // An expert's weights are read once anyway, so that neighbours share rows.
  const gemm::Order order = {std::max(1, config.together), config.tile_each};
  return gemm::launch_multiply<kRowTiles, kTokens, kOutput, kRows>(arguments, most, order, stream);
}

// One or two times eight tokens a tile.
template <int kPieces, Output kOutput, Rows kRows>
cudaError_t multiply_few_rows(const gemm::Arguments& arguments, int64_t choices, PrefillConfig config,
                              cudaStream_t stream) {
  if (!gemm::few_fit<kPieces>(arguments.w)) {
    return multiply_experts<1, 16, kOutput, kRows>(arguments, choices, config, stream);
  }
  const int64_t most = choices / (8 * kPieces) + std::min<int64_t>(arguments.experts, choices);
  return gemm::multiply_few<kPieces, kOutput, kRows>(arguments, most, stream);
}

template <Output kOutput, Rows kRows>
cudaError_t experts(PrefillKernel kernel, gemm::Arguments arguments, const MoeShape& shape, int64_t tokens,
                    cudaStream_t stream) {
  const int64_t choices = tokens * shape.top_k;
  if (choices == 0) return cudaSuccess;
  if (shape.experts < 1 || !arguments.w.is_valid() ||
      (kOutput == Output::kSwiglu && arguments.w.n % 16 != 0)) {
    return cudaErrorInvalidValue;
  }
  const int64_t rows = kRows == Rows::kGathered ? tokens : choices;  // of x
  if (rows * arguments.w.k >= int64_t{1} << 31 || choices >= int64_t{1} << 31)
    return cudaErrorInvalidValue;  // 32-bit offsets in the kernel
  arguments.experts = shape.experts;
  arguments.top_k = shape.top_k;
  const PrefillConfig config =
      prefill_config(kernel, arguments.w.n, arguments.w.k, arguments.w.group, choices / shape.experts);
  switch (config.tokens) {
    case 8:
      return multiply_few_rows<1, kOutput, kRows>(arguments, choices, config, stream);
    case 16:
      return config.rows == 16 ? multiply_few_rows<2, kOutput, kRows>(arguments, choices, config, stream)
                               : multiply_experts<1, 16, kOutput, kRows>(arguments, choices, config, stream);
    case 32:
      return multiply_experts<1, 32, kOutput, kRows>(arguments, choices, config, stream);
    case 64:
      return config.rows == 32 && gemm::fits<gemm::Tile<8, 4, 64, kOutput>>()
                 ? multiply_experts<4, 64, kOutput, kRows>(arguments, choices, config, stream)
                 : multiply_experts<2, 64, kOutput, kRows>(arguments, choices, config, stream);
    case 128:
      return gemm::fits<gemm::Tile<8, 2, 128, kOutput>>()
                 ? multiply_experts<2, 128, kOutput, kRows>(arguments, choices, config, stream)
                 : multiply_experts<2, 64, kOutput, kRows>(arguments, choices, config, stream);
    default:
      return cudaErrorInvalidValue;
  }
}

}  // namespace

cudaError_t moe_gate_up_prefill(const bf16* x, const int32_t* order, const int32_t* offsets,
                                Int4Experts gate_up, bf16* act, MoeShape shape, int64_t tokens,
                                cudaStream_t stream) {
  gemm::Arguments arguments = {};
  arguments.x = x;
  arguments.w = gate_up;
  arguments.y = act;
  arguments.order = order;
  arguments.offsets = offsets;
  return experts<Output::kSwiglu, Rows::kGathered>(kMoeGateUpPrefill, arguments, shape, tokens, stream);
}

cudaError_t moe_down_prefill(const bf16* act, const int32_t* order, const int32_t* offsets, Int4Experts down,
                             bf16* choices, MoeShape shape, int64_t tokens, cudaStream_t stream) {
  gemm::Arguments arguments = {};
  arguments.x = act;
  arguments.w = down;
  arguments.y = choices;
  arguments.order = order;
  arguments.offsets = offsets;
  return experts<Output::kPlain, Rows::kScattered>(kMoeDownPrefill, arguments, shape, tokens, stream);
}

}  // namespace qwen::cuda
