#include "kernels/cuda/bindings.h"

#include <cuda_runtime_api.h>

namespace py = pybind11;

namespace qwen::cuda {
namespace {

void bind_types(py::module_& m) {
  py::class_<Int4Matrix>(m, "Int4Matrix")
      .def(py::init([](uintptr_t tiles, uintptr_t scales, int n, int k, int group) {
             return Int4Matrix{pointer<const uint4>(tiles), pointer<const uint32_t>(scales), n, k, group};
           }),
           py::arg("tiles"), py::arg("scales"), py::arg("n"), py::arg("k"), py::arg("group"));
  py::class_<Int8Matrix>(m, "Int8Matrix")
      .def(py::init([](uintptr_t qweight, uintptr_t scales, int n, int k, int group) {
             return Int8Matrix{pointer<const int8_t>(qweight), pointer<const bf16>(scales), n, k, group};
           }),
           py::arg("qweight"), py::arg("scales"), py::arg("n"), py::arg("k"), py::arg("group"));
  py::class_<RmsNorm>(m, "RmsNorm")
      .def(py::init([](uintptr_t weight, float eps) { return RmsNorm{pointer<const bf16>(weight), eps}; }),
           py::arg("weight"), py::arg("eps"));
  m.attr("COUNTERS") = kCounters;
  m.attr("MAX_DECODE_ROWS") = kMaxDecodeRows;
}

}  // namespace
}  // namespace qwen::cuda

PYBIND11_MODULE(QWEN_BINDINGS_MODULE, m) {
  using namespace qwen::cuda;
  bind_types(m);
  bind_attention(m);
  bind_gated_delta(m);
  bind_linear_decode(m);
  bind_linear_int8(m);
  bind_linear_prefill(m);
  bind_moe_decode(m);
  bind_moe_prefill(m);
  bind_norm(m);
  bind_primitives(m);
  bind_sample(m);
  bind_sort(m);
}
