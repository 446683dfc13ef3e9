#include "kernels/cuda/bindings.h"
#include "kernels/moe/cuda.h"

namespace qwen::cuda {

namespace {

// Without weights to bring to L2.
cudaError_t down_alone(const bf16* act, const float* logits, Int4Experts down, Int4Matrix shared_down,
                       const bf16* residual, bf16* y, MoeShape shape, int rows, cudaStream_t stream) {
  return moe_down_decode(act, logits, down, shared_down, residual, y, shape, rows, {}, stream);
}

}  // namespace

void bind_moe_decode(pybind11::module_& m) {
  bind(m, "router_decode", router_decode);
  bind(m, "moe_gate_up_decode", moe_gate_up_decode);
  bind(m, "moe_down_decode", down_alone);
}

}  // namespace qwen::cuda
