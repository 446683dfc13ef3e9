#include <utility>

#include "kernels/cuda/bindings.h"
#include "kernels/linear/cuda.h"
#include "kernels/linear/prefill_configs.h"

namespace qwen::cuda {

void bind_linear_prefill(pybind11::module_& m) {
  bind(m, "int4_linear_prefill", &int4_linear_prefill);
  bind(m, "int4_swiglu_prefill", &int4_swiglu_prefill);
  bind(m, "float_linear_prefill", &float_linear_prefill);
  bind(m, "router_logits_prefill", &router_logits_prefill);
  pybind11::enum_<PrefillKernel>(m, "PrefillKernel")
      .value("LINEAR", kLinearPrefill)
      .value("SWIGLU", kSwigluPrefill)
      .value("MOE_GATE_UP", kMoeGateUpPrefill)
      .value("MOE_DOWN", kMoeDownPrefill);
  m.def(
      "override_prefill_config",
      [](PrefillKernel kernel, int tokens, int rows, int together, bool tile_each) {
        prefill_overrides[kernel] = {tokens, rows, together, tile_each};
      },
      pybind11::arg("kernel"), pybind11::arg("tokens"), pybind11::arg("rows"), pybind11::arg("together") = 0,
      pybind11::arg("tile_each") = false);
  m.def("prefill_config", [](PrefillKernel kernel, int n, int k, int group, int64_t rows, int architecture) {
    const PrefillConfig config = prefill_config(kernel, n, k, group, rows, architecture);
    return std::pair(config.tokens, config.rows);
  });
}

}  // namespace qwen::cuda
