// qwen::deltanet_block: norm, gated DeltaNet and residual of a linear-attention layer.

#include "kernels/gated_delta/cuda.h"
#include "kernels/linear/cuda.h"
#include "kernels/norm/cuda.h"
#include "shims/cuda_arguments.h"

namespace qwen {
namespace {

using cuda::bf16;

struct DeltaNet {
  const bf16* x;  // [rows, D]
  int64_t rows;
  int hidden;  // D
  cuda::RmsNorm norm;
  cuda::Int4Matrix qkvz;
  const bf16* ab;
  const bf16* conv_weight;
  const bf16* a_log;
  const bf16* dt_bias;
  bf16* conv_state;
  float* recurrent_state;
  const bf16* gated_norm;
  cuda::Int4Matrix out;
  const int64_t* slot;
  cuda::DeltaShape shape;
};

// Three kernels for one row: what is between the products happens in their prologues and epilogues. For more,
// the gated norm is a kernel of its own: every block of the output's product would repeat it for each row.
void decode(const DeltaNet& net, bf16* y) {
  const int rows = static_cast<int>(net.rows);
  const Scratch<float> mixed(net.rows * net.shape.channels());
  const Scratch<bf16> z(net.rows * net.shape.value_size());
  const Scratch<float> gates(net.rows * 2 * net.shape.value_heads);
  const Scratch<float> core(net.rows * net.shape.value_size());
  QWEN_LAUNCH(delta_input_decode, net.x, net.norm, net.qkvz, net.ab, net.conv_weight, net.conv_state,
              net.slot, mixed, z, gates, net.shape, rows);
  QWEN_LAUNCH(delta_step_decode, mixed, gates, net.a_log, net.dt_bias, net.recurrent_state, net.slot, core,
              net.shape, rows);
  if (rows == 1) {
    QWEN_LAUNCH(delta_output_decode, core, z, net.gated_norm, net.norm.eps, net.out, net.x, y, net.shape,
                rows);
    return;
  }
  const Scratch<bf16> normed(net.rows * net.shape.value_size());
  const cuda::RmsNorm no_norm = {nullptr, 0};
  QWEN_LAUNCH(gated_rms_norm, core, z, net.shape.value_size(), net.gated_norm, net.norm.eps, normed, net.rows,
              net.shape.value_heads, net.shape.value_dim);
  QWEN_LAUNCH(int4_linear_decode, normed, no_norm, net.out, net.x, y, rows);
}

void prefill(const DeltaNet& net, bf16* y) {
  const int64_t tokens = net.rows;
  const int64_t channels = net.shape.channels();
  const int64_t width = channels + net.shape.value_size();
  const Scratch<bf16> normed(tokens * net.hidden);
  const Scratch<bf16> qkvz(tokens * width);
  const Scratch<float> gates(tokens * 2 * net.shape.value_heads);
  const Scratch<float> core(tokens * net.shape.value_size());
  const Scratch<bf16> mixed(tokens * net.shape.value_size());
  const Scratch<std::byte> scratch(static_cast<int64_t>(cuda::delta_prefill_scratch(net.shape, tokens)));
  QWEN_LAUNCH(rms_norm, net.x, net.norm, normed, tokens, net.hidden);
  QWEN_LAUNCH(int4_linear_prefill, normed, net.qkvz, nullptr, qkvz, tokens);
  QWEN_LAUNCH(float_linear_prefill, normed, net.ab, gates, tokens, net.hidden, 2 * net.shape.value_heads);
  QWEN_LAUNCH(delta_prefill, qkvz, gates, net.conv_weight, net.a_log, net.dt_bias, net.conv_state,
              net.recurrent_state, net.slot, core, scratch, net.shape, tokens);
  QWEN_LAUNCH(gated_rms_norm, core, qkvz + channels, width, net.gated_norm, net.norm.eps, mixed, tokens,
              net.shape.value_heads, net.shape.value_dim);
  QWEN_LAUNCH(int4_linear_prefill, mixed, net.out, net.x, y, tokens);
}

}  // namespace
}  // namespace qwen

using namespace qwen;  // NOLINT(google-build-using-namespace): the function below is outside for its C name

QWEN_SHIM AOTITorchError qwen_aoti_torch_cuda_deltanet_block(
    AtenTensorHandle x_handle, AtenTensorHandle norm, AtenTensorHandle qkvz_tiles,
    AtenTensorHandle qkvz_scales, AtenTensorHandle ab, AtenTensorHandle conv_weight_handle,
    AtenTensorHandle a_log, AtenTensorHandle dt_bias, AtenTensorHandle conv_state_handle,
    AtenTensorHandle recurrent_state_handle, AtenTensorHandle gated_norm, AtenTensorHandle out_tiles,
    AtenTensorHandle out_scales, AtenTensorHandle slot_handle, int64_t num_key_heads, double eps,
    AtenTensorHandle* result) {
  return guarded("deltanet_block", [&] {
    const Tensor& x = dense(x_handle, 2, kBFloat, "x");
    const Tensor& conv_weight = dense(conv_weight_handle, 2, kBFloat, "conv_weight");
    const Tensor& conv_state = dense(conv_state_handle, 3, kBFloat, "conv_state");
    const Tensor& state = dense(recurrent_state_handle, 4, kFloat, "recurrent_state");
    const Tensor& slot = dense(slot_handle, 1, kIndex, "slot");
    const int64_t rows = x.sizes[0];
    const int64_t hidden = x.sizes[1];
    const int64_t value_heads = state.sizes[1];
    const cuda::DeltaShape shape = {.key_heads = static_cast<int>(num_key_heads),
                                    .value_heads = static_cast<int>(value_heads),
                                    .key_dim = static_cast<int>(state.sizes[2]),
                                    .value_dim = static_cast<int>(state.sizes[3]),
                                    .taps = static_cast<int>(conv_weight.sizes[1])};
    const int64_t channels = shape.channels();
    require(num_key_heads > 0 && value_heads % num_key_heads == 0,
            "value heads are no multiple of key heads");
    require(conv_weight.sizes[0] == channels && conv_state.sizes[0] == state.sizes[0] &&
                conv_state.sizes[1] == channels && conv_state.sizes[2] == shape.taps - 1,
            "conv_state is not [S, C, W-1]");
    auto y = allocate({rows, hidden}, ScalarType::kBFloat16);
    const DeltaNet net = {
        .x = bf16_data(x),
        .rows = rows,
        .hidden = static_cast<int>(hidden),
        .norm = {bf16_argument(norm, {hidden}, "norm is not [D]"), static_cast<float>(eps)},
        .qkvz = int4_argument(qkvz_tiles, qkvz_scales, channels + shape.value_size(), hidden, "qkvz"),
        .ab = bf16_argument(ab, {2 * value_heads, hidden}, "ab is not [2Hv, D]"),
        .conv_weight = bf16_data(conv_weight),
        .a_log = bf16_argument(a_log, {value_heads}, "a_log is not [Hv]"),
        .dt_bias = bf16_argument(dt_bias, {value_heads}, "dt_bias is not [Hv]"),
        .conv_state = bf16_data(conv_state),
        .recurrent_state = state.as<float>(),
        .gated_norm = bf16_argument(gated_norm, {shape.value_dim}, "gated_norm is not [Dv]"),
        .out = int4_argument(out_tiles, out_scales, hidden, shape.value_size(), "out"),
        .slot = slot.as<int64_t>(),
        .shape = shape};
    const bool one_row_a_slot = slot.sizes[0] == rows;
    require(one_row_a_slot || slot.sizes[0] == 1, "slot is neither [1] nor [T]");
    if (one_row_a_slot) {
      require(rows <= cuda::kMaxDecodeRows, "too many rows for a decode step");
      decode(net, bf16_data(*y));
    } else {
      prefill(net, bf16_data(*y));
    }
    *result = y.release()->handle();
  });
}
