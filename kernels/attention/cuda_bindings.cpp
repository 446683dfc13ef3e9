#include "kernels/attention/cuda.h"
#include "kernels/cuda/bindings.h"

namespace py = pybind11;

namespace qwen::cuda {

namespace {

// Without weights to bring to L2.
cudaError_t decode_alone(const bf16* qkv, const bf16* q_norm, const bf16* k_norm, bf16* key_cache,
                         bf16* value_cache, const int64_t* position, const int64_t* slot, void* scratch,
                         uint32_t* counters, bf16* out, AttentionShape shape, int rows, cudaStream_t stream) {
  return attention_decode(qkv, q_norm, k_norm, key_cache, value_cache, position, slot, scratch, counters, out,
                          shape, rows, {}, stream);
}

}  // namespace

void bind_attention(py::module_& m) {
  py::class_<AttentionShape>(m, "AttentionShape")
      .def(py::init([](int query_heads, int key_heads, int head_dim, int rotary_dim, float rope_theta,
                       float eps, int cache_length) {
             return AttentionShape{query_heads, key_heads, head_dim,    rotary_dim,
                                   rope_theta,  eps,       cache_length};
           }),
           py::arg("query_heads"), py::arg("key_heads"), py::arg("head_dim"), py::arg("rotary_dim"),
           py::arg("rope_theta"), py::arg("eps"), py::arg("cache_length"));
  bind(m, "attention_decode", decode_alone);
  bind(m, "attention_decode_scratch", attention_decode_scratch);
  bind(m, "attention_prefill", attention_prefill);
  bind(m, "attention_prefill_scratch", attention_prefill_scratch);
}

}  // namespace qwen::cuda
