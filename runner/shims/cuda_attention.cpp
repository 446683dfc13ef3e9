// qwen::attention_block: norm, gated attention over the cache and residual of a full-attention layer.

#include "kernels/attention/cuda.h"
#include "kernels/linear/cuda.h"
#include "kernels/norm/cuda.h"
#include "shims/cuda_arguments.h"

namespace qwen {
namespace {

using cuda::bf16;

struct Attention {
  const bf16* x;  // [rows, D]
  int64_t rows;
  int hidden;  // D
  cuda::RmsNorm norm;
  cuda::Int4Matrix qkv;
  const bf16* q_norm;
  const bf16* k_norm;
  bf16* key_cache;
  bf16* value_cache;
  cuda::Int4Matrix out;
  const int64_t* position;
  const int64_t* slot;
  cuda::AttentionShape shape;
};

void decode(const Attention& layer, bf16* y) {
  const int rows = static_cast<int>(layer.rows);
  const Scratch<bf16> qkv(layer.rows * layer.shape.row_size());
  const Scratch<bf16> mixed(layer.rows * layer.shape.query_size());
  const Scratch<std::byte> scratch(static_cast<int64_t>(cuda::attention_decode_scratch(layer.shape, rows)));
  QWEN_LAUNCH(int4_linear_decode, layer.x, layer.norm, layer.qkv, nullptr, qkv, rows);
  QWEN_LAUNCH(attention_decode, qkv, layer.q_norm, layer.k_norm, layer.key_cache, layer.value_cache,
              layer.position, layer.slot, scratch, cuda_scope().counters, mixed, layer.shape, rows);
  QWEN_LAUNCH(int4_linear_decode, mixed, cuda::RmsNorm{nullptr, 0}, layer.out, layer.x, y, rows);
}

void prefill(const Attention& layer, bf16* y) {
  const int64_t tokens = layer.rows;
  const Scratch<bf16> normed(tokens * layer.hidden);
  const Scratch<bf16> qkv(tokens * layer.shape.row_size());
  const Scratch<bf16> mixed(tokens * layer.shape.query_size());
  const Scratch<std::byte> scratch(
      static_cast<int64_t>(cuda::attention_prefill_scratch(layer.shape, tokens)));
  QWEN_LAUNCH(rms_norm, layer.x, layer.norm, normed, tokens, layer.hidden);
  QWEN_LAUNCH(int4_linear_prefill, normed, layer.qkv, nullptr, qkv, tokens);
  QWEN_LAUNCH(attention_prefill, qkv, layer.q_norm, layer.k_norm, layer.key_cache, layer.value_cache,
              layer.position, layer.slot, scratch, mixed, layer.shape, tokens);
  QWEN_LAUNCH(int4_linear_prefill, mixed, layer.out, layer.x, y, tokens);
}

}  // namespace
}  // namespace qwen

using namespace qwen;  // NOLINT(google-build-using-namespace): the function below is outside for its C name

QWEN_SHIM AOTITorchError qwen_aoti_torch_cuda_attention_block(
    AtenTensorHandle x_handle, AtenTensorHandle norm, AtenTensorHandle qkv_tiles, AtenTensorHandle qkv_scales,
    AtenTensorHandle q_norm, AtenTensorHandle k_norm, AtenTensorHandle key_cache_handle,
    AtenTensorHandle value_cache_handle, AtenTensorHandle out_tiles, AtenTensorHandle out_scales,
    AtenTensorHandle position_handle, AtenTensorHandle slot_handle, int64_t num_heads, int64_t rotary_dim,
    double theta, double eps, AtenTensorHandle* result) {
  return guarded("attention_block", [&] {
    const Tensor& x = dense(x_handle, 2, kBFloat, "x");
    const Tensor& key_cache = dense(key_cache_handle, 4, kBFloat, "key_cache");
    const Tensor& value_cache = dense(value_cache_handle, 4, kBFloat, "value_cache");
    const Tensor& slot = dense(slot_handle, 1, kIndex, "slot");
    const int64_t rows = x.sizes[0];
    const int64_t hidden = x.sizes[1];
    const int64_t head_dim = key_cache.sizes[3];
    require(key_cache.sizes == value_cache.sizes, "the caches are not [S, Hkv, L, Dh]");
    const cuda::AttentionShape shape = {.query_heads = static_cast<int>(num_heads),
                                        .key_heads = static_cast<int>(key_cache.sizes[1]),
                                        .head_dim = static_cast<int>(head_dim),
                                        .rotary_dim = static_cast<int>(rotary_dim),
                                        .rope_theta = static_cast<float>(theta),
                                        .eps = static_cast<float>(eps),
                                        .cache_length = static_cast<int>(key_cache.sizes[2])};
    require(num_heads > 0 && num_heads % shape.key_heads == 0, "query heads are no multiple of key heads");
    auto y = allocate({rows, hidden}, ScalarType::kBFloat16);
    const Attention layer = {
        .x = bf16_data(x),
        .rows = rows,
        .hidden = static_cast<int>(hidden),
        .norm = {bf16_argument(norm, {hidden}, "norm is not [D]"), static_cast<float>(eps)},
        .qkv = int4_argument(qkv_tiles, qkv_scales, shape.row_size(), hidden, "qkv"),
        .q_norm = bf16_argument(q_norm, {head_dim}, "q_norm is not [Dh]"),
        .k_norm = bf16_argument(k_norm, {head_dim}, "k_norm is not [Dh]"),
        .key_cache = bf16_data(key_cache),
        .value_cache = bf16_data(value_cache),
        .out = int4_argument(out_tiles, out_scales, hidden, shape.query_size(), "out"),
        .position = per_session<int64_t>(position_handle, kIndex, slot.sizes[0], "position"),
        .slot = slot.as<int64_t>(),
        .shape = shape};
    const bool one_row_a_slot = slot.sizes[0] == rows;
    require(one_row_a_slot || slot.sizes[0] == 1, "slot is neither [1] nor [T]");
    if (one_row_a_slot) {
      require(rows <= cuda::kMaxDecodeRows, "too many rows for a decode step");
      decode(layer, bf16_data(*y));
    } else {
      prefill(layer, bf16_data(*y));
    }
    *result = y.release()->handle();
  });
}
