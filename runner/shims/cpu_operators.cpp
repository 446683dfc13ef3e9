// The `qwen::` operators of a cpu program: handles in, CPU kernels underneath.
//
// Every function checks types, shapes and density before it hands plain pointers to a kernel, so that a
// program which does not fit this runner fails with a message and touches no memory. The schemas are those of
// kernels/<operator>.

#include "kernels/attention/cpu.h"
#include "kernels/gated_delta/cpu.h"
#include "kernels/linear/cpu.h"
#include "kernels/moe/cpu.h"
#include "kernels/sample/cpu.h"
#include "shims/operator_arguments.h"
#include "shims/tensor.h"

namespace qwen {
namespace {

cpu::DType dtype_of(const Tensor& tensor) {
  return tensor.dtype == ScalarType::kFloat32 ? cpu::DType::kFloat32 : cpu::DType::kBFloat16;
}

cpu::Array array(const Tensor& tensor) { return {tensor.data(), dtype_of(tensor)}; }

void check(int code) {
  switch (code) {
    case cpu::kOk:
      return;
    case cpu::kOutOfRange:
      throw Refusal{"a token, expert, slot or position is out of range"};
    case cpu::kOutOfMemory:
      throw Refusal{"out of memory", ErrorCode::kOutOfMemory};
    default:
      throw Refusal{"shapes that do not fit each other"};
  }
}

// x [T, K] for a weight of `columns` in-features.
cpu::LinearShape linear_shape(const Tensor& x, int64_t columns, int64_t rows) {
  require(x.sizes[1] == columns, "x and weight differ in their in-features");
  return {.tokens = x.sizes[0], .in_features = columns, .out_features = rows};
}

void check_moe(const Tensor& x, const Tensor& ids, const Tensor& weights, const Tensor& gate_up,
               const Tensor& down, int64_t packing) {
  require(ids.sizes[0] == x.sizes[0] && weights.sizes[0] == x.sizes[0] && weights.sizes[1] == ids.sizes[1],
          "ids and weights are not [T, A]");
  require(gate_up.sizes[1] % 2 == 0 && gate_up.sizes[2] * packing == x.sizes[1], "gate_up is not [E, 2I, D]");
  require(down.sizes[0] == gate_up.sizes[0] && down.sizes[1] == x.sizes[1] &&
              down.sizes[2] * packing == gate_up.sizes[1] / 2,
          "down is not [E, D, I]");
}

cpu::MoeShape moe_shape(const Tensor& x, const Tensor& ids, const Tensor& gate_up) {
  return {.tokens = x.sizes[0],
          .hidden = x.sizes[1],
          .experts = gate_up.sizes[0],
          .intermediate = gate_up.sizes[1] / 2,
          .top_k = ids.sizes[1]};
}

}  // namespace
}  // namespace qwen

using namespace qwen;  // NOLINT(google-build-using-namespace): the functions below are outside for their C
                       // names

QWEN_SHIM AOTITorchError qwen_aoti_torch_cpu_float_linear(AtenTensorHandle x_handle,
                                                          AtenTensorHandle weight_handle,
                                                          AtenTensorHandle* out) {
  return guarded("float_linear", [&] {
    const Tensor& x = dense(x_handle, 2, kFloating, "x");
    const Tensor& weight = dense(weight_handle, 2, kFloating, "weight");
    const auto shape = linear_shape(x, weight.sizes[1], weight.sizes[0]);
    auto y = allocate({shape.tokens, shape.out_features}, x.dtype);
    check(cpu::float_linear(array(x), array(weight), y->data(), shape));
    *out = y.release()->handle();
  });
}

QWEN_SHIM AOTITorchError qwen_aoti_torch_cpu_int8_linear(AtenTensorHandle x_handle,
                                                         AtenTensorHandle qweight_handle,
                                                         AtenTensorHandle scales_handle,
                                                         AtenTensorHandle* out) {
  return guarded("int8_linear", [&] {
    const Tensor& x = dense(x_handle, 2, kFloating, "x");
    const Tensor& qweight = dense(qweight_handle, 2, kSignedByte, "qweight");
    const Tensor& scales = dense(scales_handle, 2, kBFloat, "scales");
    const auto shape = linear_shape(x, qweight.sizes[1], qweight.sizes[0]);
    require(scales.sizes[0] == shape.out_features, "scales are not [N, K/G]");
    auto y = allocate({shape.tokens, shape.out_features}, x.dtype);
    check(cpu::int8_linear(array(x), qweight.as<int8_t>(), scales.as<uint16_t>(), scales.sizes[1], y->data(),
                           shape));
    *out = y.release()->handle();
  });
}

QWEN_SHIM AOTITorchError qwen_aoti_torch_cpu_int4_linear(AtenTensorHandle x_handle,
                                                         AtenTensorHandle qweight_handle,
                                                         AtenTensorHandle scales_handle,
                                                         AtenTensorHandle* out) {
  return guarded("int4_linear", [&] {
    const Tensor& x = dense(x_handle, 2, kFloating, "x");
    const Tensor& qweight = dense(qweight_handle, 2, kByte, "qweight");
    const Tensor& scales = dense(scales_handle, 2, kBFloat, "scales");
    const auto shape = linear_shape(x, qweight.sizes[1] * 2, qweight.sizes[0]);
    require(scales.sizes[0] == shape.out_features, "scales are not [N, K/G]");
    auto y = allocate({shape.tokens, shape.out_features}, x.dtype);
    check(cpu::int4_linear(array(x), qweight.as<uint8_t>(), scales.as<uint16_t>(), scales.sizes[1], y->data(),
                           shape));
    *out = y.release()->handle();
  });
}

QWEN_SHIM AOTITorchError qwen_aoti_torch_cpu_int8_embedding(AtenTensorHandle ids_handle,
                                                            AtenTensorHandle qweight_handle,
                                                            AtenTensorHandle scales_handle,
                                                            AtenTensorHandle* out) {
  return guarded("int8_embedding", [&] {
    const Tensor& ids = dense(ids_handle, 1, kIndex, "ids");
    const Tensor& qweight = dense(qweight_handle, 2, kSignedByte, "qweight");
    const Tensor& scales = dense(scales_handle, 2, kBFloat, "scales");
    require(scales.sizes[0] == qweight.sizes[0], "scales are not [V, D/G]");
    const cpu::EmbeddingShape shape = {
        .tokens = ids.sizes[0], .vocabulary = qweight.sizes[0], .hidden = qweight.sizes[1]};
    auto rows = allocate({shape.tokens, shape.hidden}, ScalarType::kFloat32);
    check(cpu::int8_embedding(ids.as<int64_t>(), qweight.as<int8_t>(), scales.as<uint16_t>(), scales.sizes[1],
                              rows->as<float>(), shape));
    *out = rows.release()->handle();
  });
}

QWEN_SHIM AOTITorchError qwen_aoti_torch_cpu_router(AtenTensorHandle x_handle, AtenTensorHandle weight_handle,
                                                    int64_t top_k, AtenTensorHandle* ids_out,
                                                    AtenTensorHandle* weights_out) {
  return guarded("router", [&] {
    const Tensor& x = dense(x_handle, 2, kFloating, "x");
    const Tensor& weight = dense(weight_handle, 2, kFloating, "weight");
    require(x.sizes[1] == weight.sizes[1], "x and weight differ in the hidden size");
    require(top_k > 0 && top_k <= weight.sizes[0], "top_k is not in [1, E]");
    const cpu::RouterShape shape = {
        .tokens = x.sizes[0], .hidden = x.sizes[1], .experts = weight.sizes[0], .top_k = top_k};
    auto ids = allocate({shape.tokens, top_k}, ScalarType::kInt64);
    auto weights = allocate({shape.tokens, top_k}, ScalarType::kFloat32);
    check(cpu::router(array(x), array(weight), ids->as<int64_t>(), weights->as<float>(), shape));
    *ids_out = ids.release()->handle();
    *weights_out = weights.release()->handle();
  });
}

QWEN_SHIM AOTITorchError qwen_aoti_torch_cpu_float_moe(AtenTensorHandle x_handle, AtenTensorHandle ids_handle,
                                                       AtenTensorHandle weights_handle,
                                                       AtenTensorHandle gate_up_handle,
                                                       AtenTensorHandle down_handle, AtenTensorHandle* out) {
  return guarded("float_moe", [&] {
    const Tensor& x = dense(x_handle, 2, kFloating, "x");
    const Tensor& ids = dense(ids_handle, 2, kIndex, "ids");
    const Tensor& weights = dense(weights_handle, 2, kFloat, "weights");
    const Tensor& gate_up = dense(gate_up_handle, 3, kFloating, "gate_up");
    const Tensor& down = dense(down_handle, 3, kFloating, "down");
    check_moe(x, ids, weights, gate_up, down, /*packing=*/1);
    auto y = allocate({x.sizes[0], x.sizes[1]}, x.dtype);
    check(cpu::float_moe(array(x), ids.as<int64_t>(), weights.as<float>(), array(gate_up), array(down),
                         y->data(), moe_shape(x, ids, gate_up)));
    *out = y.release()->handle();
  });
}

QWEN_SHIM AOTITorchError qwen_aoti_torch_cpu_int4_moe(
    AtenTensorHandle x_handle, AtenTensorHandle ids_handle, AtenTensorHandle weights_handle,
    AtenTensorHandle gate_up_qweight_handle, AtenTensorHandle gate_up_scales_handle,
    AtenTensorHandle down_qweight_handle, AtenTensorHandle down_scales_handle, AtenTensorHandle* out) {
  return guarded("int4_moe", [&] {
    const Tensor& x = dense(x_handle, 2, kFloating, "x");
    const Tensor& ids = dense(ids_handle, 2, kIndex, "ids");
    const Tensor& weights = dense(weights_handle, 2, kFloat, "weights");
    const Tensor& gate_up = dense(gate_up_qweight_handle, 3, kByte, "gate_up_qweight");
    const Tensor& gate_up_scales = dense(gate_up_scales_handle, 3, kBFloat, "gate_up_scales");
    const Tensor& down = dense(down_qweight_handle, 3, kByte, "down_qweight");
    const Tensor& down_scales = dense(down_scales_handle, 3, kBFloat, "down_scales");
    check_moe(x, ids, weights, gate_up, down, /*packing=*/2);
    require(gate_up_scales.sizes[0] == gate_up.sizes[0] && gate_up_scales.sizes[1] == gate_up.sizes[1] &&
                down_scales.sizes[0] == down.sizes[0] && down_scales.sizes[1] == down.sizes[1],
            "scales are not [E, N, K/G]");
    const cpu::Int4Experts experts = {.gate_up_qweight = gate_up.as<uint8_t>(),
                                      .gate_up_scales = gate_up_scales.as<uint16_t>(),
                                      .down_qweight = down.as<uint8_t>(),
                                      .down_scales = down_scales.as<uint16_t>(),
                                      .gate_up_groups = gate_up_scales.sizes[2],
                                      .down_groups = down_scales.sizes[2]};
    auto y = allocate({x.sizes[0], x.sizes[1]}, x.dtype);
    check(cpu::int4_moe(array(x), ids.as<int64_t>(), weights.as<float>(), experts, y->data(),
                        moe_shape(x, ids, gate_up)));
    *out = y.release()->handle();
  });
}

QWEN_SHIM AOTITorchError qwen_aoti_torch_cpu_gated_delta(
    AtenTensorHandle mixed_qkv_handle, AtenTensorHandle a_handle, AtenTensorHandle b_handle,
    AtenTensorHandle conv_weight_handle, AtenTensorHandle a_log_handle, AtenTensorHandle dt_bias_handle,
    AtenTensorHandle conv_state_handle, AtenTensorHandle recurrent_state_handle, AtenTensorHandle slot_handle,
    int64_t num_key_heads, AtenTensorHandle* out) {
  return guarded("gated_delta", [&] {
    const Tensor& mixed_qkv = dense(mixed_qkv_handle, 2, kFloating, "mixed_qkv");
    const Tensor& a = dense(a_handle, 2, {mixed_qkv.dtype}, "a");
    const Tensor& b = dense(b_handle, 2, {mixed_qkv.dtype}, "b");
    const Tensor& conv_weight = dense(conv_weight_handle, 2, kFloating, "conv_weight");
    const Tensor& a_log = dense(a_log_handle, 1, kFloating, "a_log");
    const Tensor& dt_bias = dense(dt_bias_handle, 1, kFloating, "dt_bias");
    const Tensor& conv_state = dense(conv_state_handle, 3, {mixed_qkv.dtype}, "conv_state");
    const Tensor& recurrent_state = dense(recurrent_state_handle, 4, kFloat, "recurrent_state");
    const Tensor& slot = dense(slot_handle, 1, kIndex, "slot");
    const cpu::GatedDeltaShape shape = {.rows = mixed_qkv.sizes[0],
                                        .slot_ids = slot.sizes[0],
                                        .num_slots = recurrent_state.sizes[0],
                                        .key_heads = num_key_heads,
                                        .value_heads = recurrent_state.sizes[1],
                                        .key_dim = recurrent_state.sizes[2],
                                        .value_dim = recurrent_state.sizes[3],
                                        .taps = conv_weight.sizes[1]};
    const int64_t channels = 2 * shape.key_heads * shape.key_dim + shape.value_heads * shape.value_dim;
    require(mixed_qkv.sizes[1] == channels && conv_weight.sizes[0] == channels, "mixed_qkv is not [T, C]");
    require(a.sizes[0] == shape.rows && a.sizes[1] == shape.value_heads && b.sizes[0] == shape.rows &&
                b.sizes[1] == shape.value_heads,
            "a and b are not [T, Hv]");
    require(a_log.sizes[0] == shape.value_heads && dt_bias.sizes[0] == shape.value_heads,
            "a_log and dt_bias are not [Hv]");
    require(conv_state.sizes[0] == shape.num_slots && conv_state.sizes[1] == channels &&
                conv_state.sizes[2] == shape.taps - 1,
            "conv_state is not [S, C, W-1]");
    const cpu::GatedDeltaInputs inputs = {.mixed_qkv = mixed_qkv.data(),
                                          .a = a.data(),
                                          .b = b.data(),
                                          .dtype = dtype_of(mixed_qkv),
                                          .conv_weight = array(conv_weight),
                                          .a_log = array(a_log),
                                          .dt_bias = array(dt_bias),
                                          .slot = slot.as<int64_t>()};
    auto y = allocate({shape.rows, shape.value_heads * shape.value_dim}, mixed_qkv.dtype);
    check(cpu::gated_delta(inputs, conv_state.data(), recurrent_state.as<float>(), y->data(), shape));
    *out = y.release()->handle();
  });
}

QWEN_SHIM AOTITorchError qwen_aoti_torch_cpu_attention(AtenTensorHandle q_handle, AtenTensorHandle k_handle,
                                                       AtenTensorHandle v_handle,
                                                       AtenTensorHandle key_cache_handle,
                                                       AtenTensorHandle value_cache_handle,
                                                       AtenTensorHandle position_handle,
                                                       AtenTensorHandle slot_handle, AtenTensorHandle* out) {
  return guarded("attention", [&] {
    const Tensor& q = dense(q_handle, 3, kFloating, "q");
    const Tensor& k = dense(k_handle, 3, {q.dtype}, "k");
    const Tensor& v = dense(v_handle, 3, {q.dtype}, "v");
    const Tensor& key_cache = dense(key_cache_handle, 4, {q.dtype}, "key_cache");
    const Tensor& value_cache = dense(value_cache_handle, 4, {q.dtype}, "value_cache");
    const Tensor& slot = dense(slot_handle, 1, kIndex, "slot");
    const cpu::AttentionShape shape = {.rows = q.sizes[0],
                                       .slot_ids = slot.sizes[0],
                                       .num_slots = key_cache.sizes[0],
                                       .cache_length = key_cache.sizes[2],
                                       .query_heads = q.sizes[1],
                                       .key_heads = k.sizes[1],
                                       .head_dim = q.sizes[2]};
    require(k.sizes == v.sizes && k.sizes[0] == shape.rows && k.sizes[2] == shape.head_dim,
            "k and v are not [T, Hkv, Dh]");
    require(key_cache.sizes == value_cache.sizes && key_cache.sizes[1] == shape.key_heads &&
                key_cache.sizes[3] == shape.head_dim,
            "the caches are not [S, Hkv, L, Dh]");
    const cpu::AttentionInputs inputs = {
        .q = q.data(),
        .k = k.data(),
        .v = v.data(),
        .dtype = dtype_of(q),
        .position = per_session<int64_t>(position_handle, kIndex, shape.slot_ids, "position"),
        .slot = slot.as<int64_t>()};
    auto y = allocate({shape.rows, shape.query_heads, shape.head_dim}, q.dtype);
    check(cpu::attention(inputs, key_cache.data(), value_cache.data(), y->data(), shape));
    *out = y.release()->handle();
  });
}

QWEN_SHIM AOTITorchError qwen_aoti_torch_cpu_sample(
    AtenTensorHandle logits_handle, AtenTensorHandle tokens_handle, AtenTensorHandle position,
    AtenTensorHandle slot_handle, AtenTensorHandle seen_handle, AtenTensorHandle temperature,
    AtenTensorHandle top_k, AtenTensorHandle top_p, AtenTensorHandle min_p, AtenTensorHandle presence_penalty,
    AtenTensorHandle repetition_penalty, AtenTensorHandle seed, AtenTensorHandle generated_from,
    AtenTensorHandle* out) {
  return guarded("sample", [&] {
    const Tensor& logits = dense(logits_handle, 2, kFloat, "logits");
    const Tensor& tokens = dense(tokens_handle, 1, kIndex, "tokens");
    const Tensor& seen = dense(seen_handle, 2, kByte, "seen");
    const int64_t sessions = logits.sizes[0];
    require(seen.sizes[1] == logits.sizes[1], "seen is not [S, V]");
    const cpu::SampleShape shape = {.sessions = sessions,
                                    .tokens = tokens.sizes[0],
                                    .num_slots = seen.sizes[0],
                                    .vocabulary = logits.sizes[1]};
    const cpu::SampleInputs inputs = {
        .logits = logits.as<float>(),
        .tokens = tokens.as<int64_t>(),
        .position = per_session<int64_t>(position, kIndex, sessions, "position"),
        .slot = per_session<int64_t>(slot_handle, kIndex, sessions, "slot"),
        .temperature = per_session<float>(temperature, kFloat, sessions, "temperature"),
        .top_k = per_session<int64_t>(top_k, kIndex, sessions, "top_k"),
        .top_p = per_session<float>(top_p, kFloat, sessions, "top_p"),
        .min_p = per_session<float>(min_p, kFloat, sessions, "min_p"),
        .presence_penalty = per_session<float>(presence_penalty, kFloat, sessions, "presence_penalty"),
        .repetition_penalty = per_session<float>(repetition_penalty, kFloat, sessions, "repetition_penalty"),
        .seed = per_session<int64_t>(seed, kIndex, sessions, "seed"),
        .generated_from = per_session<int64_t>(generated_from, kIndex, sessions, "generated_from")};
    auto next = allocate({sessions}, ScalarType::kInt64);
    check(cpu::sample(inputs, seen.as<uint8_t>(), next->as<int64_t>(), shape));
    *out = next.release()->handle();
  });
}
