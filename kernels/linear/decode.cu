// Int4 products of a decode step: a layer's projections and the head.
#include "kernels/linear/cuda.h"
#include "kernels/linear/decode_kernel.cuh"

namespace qwen::cuda {
namespace {

struct HeadOutput {
  float* y;  // [B, N]
  int n;

  static constexpr bool kExtra = false;
  struct Prepared {};

  __device__ Prepared begin(int /*row*/, int /*out*/) const { return {}; }
  __device__ void prepare(Prepared& /*prepared*/, int /*row*/, int /*out*/) const {}
  __device__ void store(int row, int out, float sum, Prepared /*prepared*/) const {
    y[static_cast<int64_t>(row) * n + out] = round_bf16(sum);
  }
};

}  // namespace

cudaError_t int4_linear_decode(const bf16* x, RmsNorm norm, Int4Matrix w, const bf16* residual, bf16* y,
                               int rows, cudaStream_t stream) {
  const ResidualOutput output = {residual, y, w.n};
  if (norm.weight == nullptr) return launch_decode(kLinearDecode, PlainInput{x}, w, output, rows, stream);
  return launch_decode(kLinearDecode, NormedInput{x, norm}, w, output, rows, stream);
}

cudaError_t int4_head(const bf16* x, RmsNorm norm, Int4Matrix w, float* y, int rows, cudaStream_t stream) {
  const HeadOutput output = {y, w.n};
  if (norm.weight == nullptr) return launch_decode(kHead, PlainInput{x}, w, output, rows, stream);
  return launch_decode(kHead, NormedInput{x, norm}, w, output, rows, stream);
}

}  // namespace qwen::cuda
