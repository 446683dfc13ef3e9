// The routed experts of prefill with activations of 8 bits: twice the rate of bfloat16's tensor cores, and
// weights that become operands in a few instructions.
//
// Rows are quantized once: int8 each group of 128 columns on its own, e4m3 each row. The sums of a weight's
// group are added to float32 accumulators times the scales.
#include <algorithm>

#include "kernels/cuda/tuning.h"
#include "kernels/moe/cuda.h"
#include "kernels/moe/gemm_8bit.cuh"
#include "kernels/moe/gemm_8bit_sync.cuh"
#include "kernels/moe/quantize_rows.cuh"

namespace qwen::cuda {

namespace {

using gemm::Output;
using gemm::Rows;
using moe8::Arguments;
using moe8::QuantizedRows;

size_t codes_bytes(int64_t rows, int k) {
  const QuantizedRows layout = {nullptr, nullptr, k};
  return static_cast<size_t>(rows) * layout.pitch();
}
size_t scratch_bytes(int64_t rows, int k) {
  const QuantizedRows layout = {nullptr, nullptr, k};
  return codes_bytes(rows, k) + (static_cast<size_t>(rows) * layout.groups() * sizeof(float) + 15) / 16 * 16;
}

template <ExpertActivations kKind, Output kOutput, Rows kRows>
cudaError_t experts(const bf16* x, int64_t rows, Arguments arguments, void* scratch, int64_t choices,
                    cudaStream_t stream) {
  using namespace moe8;
  const int k = arguments.w.k;
  arguments.x = {static_cast<uint8_t*>(scratch), nullptr, k};
  arguments.x.scales = reinterpret_cast<float*>(arguments.x.codes + codes_bytes(rows, k));
  QWEN_RETURN_IF_CUDA_ERROR((launch_quantize<kKind, kGroupScales<kKind>>(x, arguments.x, rows, stream)));
  const int64_t expected = choices / arguments.experts;  // rows of an expert
  if (pipeline_fits<kKind, kOutput, kRows>(arguments.w)) {
    constexpr int kWide = kKind == ExpertActivations::kInt8 ? 96 : 128;
    return expected > 72 ? launch_pipeline<kKind, kWide, kOutput, kRows>(arguments, choices, stream)
                         : launch_pipeline<kKind, 64, kOutput, kRows>(arguments, choices, stream);
  }
  return expected > 10 ? launch_sync<kKind, 64, kOutput, kRows>(arguments, choices, stream)
                       : launch_sync<kKind, 16, kOutput, kRows>(arguments, choices, stream);
}

template <Output kOutput, Rows kRows>
cudaError_t experts(ExpertActivations kind, const bf16* x, const int32_t* order, const int32_t* offsets,
                    Int4Experts w, bf16* y, void* scratch, const MoeShape& shape, int64_t tokens,
                    cudaStream_t stream) {
  const int64_t choices = tokens * shape.top_k;
  if (choices == 0) return cudaSuccess;
  const int64_t rows = kRows == Rows::kGathered ? tokens : choices;  // of x
  if (!w.is_valid() || (kOutput == Output::kSwiglu && w.n % 16 != 0) || shape.experts < 1 ||
      choices >= int64_t{1} << 31 || codes_bytes(rows, w.k) >= size_t{1} << 32) {
    return cudaErrorInvalidValue;
  }
  const Arguments arguments = {{}, w, y, order, offsets, shape.experts, shape.top_k, 0};
  switch (kind) {
    case ExpertActivations::kInt8:
      return experts<ExpertActivations::kInt8, kOutput, kRows>(x, rows, arguments, scratch, choices, stream);
    case ExpertActivations::kFloat8:
#ifndef QWEN_CUDA_EMULATION
      if (gpu_architecture() < 89) return cudaErrorNotSupported;
#endif
      return experts<ExpertActivations::kFloat8, kOutput, kRows>(x, rows, arguments, scratch, choices,
                                                                 stream);
    default:
      return cudaErrorInvalidValue;
  }
}

}  // namespace

cudaError_t moe_gate_up_prefill_8bit(ExpertActivations kind, const bf16* x, const int32_t* order,
                                     const int32_t* offsets, Int4Experts gate_up, bf16* act, void* scratch,
                                     MoeShape shape, int64_t tokens, cudaStream_t stream) {
  return experts<Output::kSwiglu, Rows::kGathered>(kind, x, order, offsets, gate_up, act, scratch, shape,
                                                   tokens, stream);
}

cudaError_t moe_down_prefill_8bit(ExpertActivations kind, const bf16* act, const int32_t* order,
                                  const int32_t* offsets, Int4Experts down, bf16* choices, void* scratch,
                                  MoeShape shape, int64_t tokens, cudaStream_t stream) {
  return experts<Output::kPlain, Rows::kScattered>(kind, act, order, offsets, down, choices, scratch, shape,
                                                   tokens, stream);
}

size_t moe_8bit_scratch(MoeShape shape, int64_t tokens) {
  return std::max(scratch_bytes(tokens, shape.hidden),
                  scratch_bytes(tokens * shape.top_k, shape.intermediate));
}

}  // namespace qwen::cuda
