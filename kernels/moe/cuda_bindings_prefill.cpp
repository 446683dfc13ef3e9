#include "kernels/cuda/bindings.h"
#include "kernels/moe/cuda.h"

namespace py = pybind11;

namespace qwen::cuda {

void bind_moe_prefill(py::module_& m) {
  if (!py::hasattr(m, "MoeShape")) {
    py::class_<MoeShape>(m, "MoeShape")
        .def(py::init([](int hidden, int experts, int top_k, int intermediate, int shared_intermediate) {
               return MoeShape{hidden, experts, top_k, intermediate, shared_intermediate};
             }),
             py::arg("hidden"), py::arg("experts"), py::arg("top_k"), py::arg("intermediate"),
             py::arg("shared_intermediate"));
  }
  bind(m, "router_prefill", &router_prefill);
  bind(m, "moe_sort", &moe_sort);
  bind(m, "moe_route", &moe_route);
  bind(m, "moe_sort_scratch", &moe_sort_scratch);
  bind(m, "moe_gate_up_prefill", &moe_gate_up_prefill);
  bind(m, "moe_down_prefill", &moe_down_prefill);
  py::enum_<ExpertActivations>(m, "ExpertActivations")
      .value("BFLOAT16", ExpertActivations::kBfloat16)
      .value("INT8", ExpertActivations::kInt8)
      .value("FLOAT8", ExpertActivations::kFloat8);
  bind(m, "moe_gate_up_prefill_8bit", &moe_gate_up_prefill_8bit);
  bind(m, "moe_down_prefill_8bit", &moe_down_prefill_8bit);
  bind(m, "moe_8bit_scratch", &moe_8bit_scratch);
  bind(m, "moe_combine", &moe_combine);
}

}  // namespace qwen::cuda
