#include "kernels/attention/cuda.h"
#include "kernels/cuda/bindings.h"

namespace py = pybind11;

namespace qwen::cuda {

void bind_attention(py::module_& m) {
  py::class_<AttentionShape>(m, "AttentionShape")
      .def(py::init([](int query_heads, int key_heads, int head_dim, int rotary_dim, float rope_theta,
                       float eps, int cache_length) {
             return AttentionShape{query_heads, key_heads, head_dim,    rotary_dim,
                                   rope_theta,  eps,       cache_length};
           }),
           py::arg("query_heads"), py::arg("key_heads"), py::arg("head_dim"), py::arg("rotary_dim"),
           py::arg("rope_theta"), py::arg("eps"), py::arg("cache_length"));
  bind(m, "attention_decode", attention_decode);
  bind(m, "attention_decode_scratch", attention_decode_scratch);
  bind(m, "attention_prefill", attention_prefill);
  bind(m, "attention_prefill_scratch", attention_prefill_scratch);
}

}  // namespace qwen::cuda
