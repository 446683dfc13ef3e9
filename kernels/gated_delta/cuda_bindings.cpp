#include "kernels/cuda/bindings.h"
#include "kernels/gated_delta/cuda.h"

namespace py = pybind11;

namespace qwen::cuda {

void bind_delta_projections(py::module_& m);

void bind_gated_delta(py::module_& m) {
  py::class_<DeltaShape>(m, "DeltaShape")
      .def(py::init([](int key_heads, int value_heads, int key_dim, int value_dim, int taps) {
             return DeltaShape{key_heads, value_heads, key_dim, value_dim, taps};
           }),
           py::arg("key_heads"), py::arg("value_heads"), py::arg("key_dim"), py::arg("value_dim"),
           py::arg("taps"));
  bind(m, "delta_step_decode", &delta_step_decode);
  bind(m, "delta_prefill", &delta_prefill);
  bind(m, "delta_prefill_scratch", &delta_prefill_scratch);
  bind_delta_projections(m);
}

}  // namespace qwen::cuda
