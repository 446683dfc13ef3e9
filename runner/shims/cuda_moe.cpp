// qwen::moe_block: norm, routed and shared experts, and residual of a layer's second half.

#include <algorithm>

#include "kernels/linear/cuda.h"
#include "kernels/moe/cuda.h"
#include "kernels/norm/cuda.h"
#include "shims/cuda_arguments.h"

namespace qwen {
namespace {

using cuda::bf16;

struct Experts {
  const bf16* x;  // [rows, D]
  int64_t rows;
  cuda::RmsNorm norm;
  const bf16* router;
  const bf16* shared_gate;
  cuda::Int4Experts gate_up;
  cuda::Int4Experts down;
  cuda::Int4Matrix shared_gate_up;
  cuda::Int4Matrix shared_down;
  cuda::MoeShape shape;
};

void decode(const Experts& moe, bf16* y) {
  const int rows = static_cast<int>(moe.rows);
  const cuda::MoeShape& shape = moe.shape;
  const Scratch<float> logits(moe.rows * (shape.experts + 1));
  const Scratch<bf16> act(moe.rows * (shape.top_k * shape.intermediate + shape.shared_intermediate));
  QWEN_LAUNCH(router_decode, moe.x, moe.norm, moe.router, moe.shared_gate, logits, shape, rows);
  QWEN_LAUNCH(moe_gate_up_decode, moe.x, moe.norm, logits, moe.gate_up, moe.shared_gate_up, act, shape, rows);
  QWEN_LAUNCH(moe_down_decode, act, logits, moe.down, moe.shared_down, moe.x, y, shape, rows);
}

void prefill(const Experts& moe, bf16* y) {
  const int64_t tokens = moe.rows;
  const cuda::MoeShape& shape = moe.shape;
  const int64_t choices = tokens * shape.top_k;
  const Scratch<bf16> normed(tokens * shape.hidden);
  const Scratch<float> logits(tokens * shape.experts);
  const Scratch<float> shared_logit(tokens);
  const Scratch<int32_t> ids(choices);
  const Scratch<float> weights(choices);
  const Scratch<int32_t> order(choices);
  const Scratch<int32_t> offsets(shape.experts + 1);
  const cuda::ExpertActivations kind = cuda_scope().expert_activations;
  const bool is_8bit = kind != cuda::ExpertActivations::kBfloat16;
  const Scratch<std::byte> scratch(static_cast<int64_t>(
      std::max(cuda::moe_sort_scratch(shape, tokens), is_8bit ? cuda::moe_8bit_scratch(shape, tokens) : 0)));
  const Scratch<bf16> act(choices * shape.intermediate);
  const Scratch<bf16> chosen(choices * shape.hidden);
  const Scratch<bf16> shared_act(tokens * shape.shared_intermediate);
  const Scratch<bf16> shared(tokens * shape.hidden);
  QWEN_LAUNCH(rms_norm, moe.x, moe.norm, normed, tokens, shape.hidden);
  QWEN_LAUNCH(router_logits_prefill, normed, moe.router, moe.shared_gate, logits, shared_logit, tokens,
              shape.hidden, shape.experts);
  QWEN_LAUNCH(moe_route, logits, ids, weights, order, offsets, scratch, shape, tokens);
  if (is_8bit) {
    QWEN_LAUNCH(moe_gate_up_prefill_8bit, kind, normed, order, offsets, moe.gate_up, act, scratch, shape,
                tokens);
    QWEN_LAUNCH(moe_down_prefill_8bit, kind, act, order, offsets, moe.down, chosen, scratch, shape, tokens);
  } else {
    QWEN_LAUNCH(moe_gate_up_prefill, normed, order, offsets, moe.gate_up, act, shape, tokens);
    QWEN_LAUNCH(moe_down_prefill, act, order, offsets, moe.down, chosen, shape, tokens);
  }
  QWEN_LAUNCH(int4_swiglu_prefill, normed, moe.shared_gate_up, shared_act, tokens);
  QWEN_LAUNCH(int4_linear_prefill, shared_act, moe.shared_down, nullptr, shared, tokens);
  QWEN_LAUNCH(moe_combine, weights, chosen, shared, shared_logit, moe.x, y, shape, tokens);
}

}  // namespace
}  // namespace qwen

using namespace qwen;  // NOLINT(google-build-using-namespace): the function below is outside for its C name

QWEN_SHIM AOTITorchError qwen_aoti_torch_cuda_moe_block(
    AtenTensorHandle x_handle, AtenTensorHandle norm, AtenTensorHandle router_handle,
    AtenTensorHandle shared_gate, AtenTensorHandle gate_up_tiles, AtenTensorHandle gate_up_scales,
    AtenTensorHandle down_tiles, AtenTensorHandle down_scales, AtenTensorHandle shared_gate_up_tiles,
    AtenTensorHandle shared_gate_up_scales, AtenTensorHandle shared_down_tiles,
    AtenTensorHandle shared_down_scales, int64_t top_k, double eps, AtenTensorHandle* result) {
  return guarded("moe_block", [&] {
    const Tensor& x = dense(x_handle, 2, kBFloat, "x");
    const Tensor& router = dense(router_handle, 2, kBFloat, "router");
    const int64_t hidden = x.sizes[1];
    const int64_t experts = router.sizes[0];
    require(router.sizes[1] == hidden, "router is not [E, D]");
    require(top_k > 0 && top_k <= experts, "top_k is not in [1, E]");
    // A row of tiles is eight gate rows and eight up rows.
    const int64_t intermediate = dense(gate_up_tiles, 4, kByte, "gate_up").sizes[1] * 8;
    const int64_t shared_intermediate = dense(shared_gate_up_tiles, 3, kByte, "shared_gate_up").sizes[0] * 8;
    auto y = allocate({x.sizes[0], hidden}, ScalarType::kBFloat16);
    const Experts moe = {
        .x = bf16_data(x),
        .rows = x.sizes[0],
        .norm = {bf16_argument(norm, {hidden}, "norm is not [D]"), static_cast<float>(eps)},
        .router = bf16_data(router),
        .shared_gate = bf16_argument(shared_gate, {1, hidden}, "shared_gate is not [1, D]"),
        .gate_up = int4_argument(gate_up_tiles, gate_up_scales, 2 * intermediate, hidden, "gate_up", experts),
        .down = int4_argument(down_tiles, down_scales, hidden, intermediate, "down", experts),
        .shared_gate_up = int4_argument(shared_gate_up_tiles, shared_gate_up_scales, 2 * shared_intermediate,
                                        hidden, "shared_gate_up"),
        .shared_down =
            int4_argument(shared_down_tiles, shared_down_scales, hidden, shared_intermediate, "shared_down"),
        .shape = {.hidden = static_cast<int>(hidden),
                  .experts = static_cast<int>(experts),
                  .top_k = static_cast<int>(top_k),
                  .intermediate = static_cast<int>(intermediate),
                  .shared_intermediate = static_cast<int>(shared_intermediate)}};
    // Rows do not meet here, so a short prefill is a decode step of as many rows.
    if (moe.rows <= cuda::kMaxDecodeRows) {
      decode(moe, bf16_data(*y));
    } else {
      prefill(moe, bf16_data(*y));
    }
    *result = y.release()->handle();
  });
}
