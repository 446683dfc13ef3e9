#include <pybind11/stl.h>

#include <array>
#include <tuple>
#include <vector>

#include "kernels/cuda/bindings.h"
#include "kernels/linear/cuda.h"
#include "kernels/linear/decode_configs.h"

namespace qwen::cuda {

void bind_linear_decode(pybind11::module_& m) {
  bind(m, "int4_linear_decode", int4_linear_decode);
  bind(m, "int4_head", int4_head);
  pybind11::enum_<DecodeKernel>(m, "DecodeKernel")
      .value("LINEAR", kLinearDecode)
      .value("HEAD", kHead)
      .value("DELTA_INPUT", kDeltaInput)
      .value("DELTA_OUTPUT", kDeltaOutput)
      .value("MOE_GATE_UP", kMoeGateUp);
  m.def("override_decode_config",
        [](DecodeKernel kernel, int blocks_per_sm) { decode_overrides[kernel] = {blocks_per_sm}; });
  m.def("decode_config", [](DecodeKernel kernel, int n, int k, int group, int architecture) {
    return std::tuple(decode_config(kernel, n, k, group, architecture).blocks_per_sm);
  });
  // Lines {architecture, n, k, group, rows, blocks_per_sm} of one kernel; None where none holds.
  m.def("find_tuned",
        [](const std::vector<std::array<int, 6>>& lines, int architecture, int n, int k, int group,
           int rows) -> pybind11::object {
          std::vector<TunedDecode> table;
          table.reserve(lines.size());
          for (const auto& [measured, line_n, line_k, line_group, from, blocks_per_sm] : lines) {
            table.push_back({measured, kHead, line_n, line_k, line_group, from, {blocks_per_sm}});
          }
          const DecodeConfig* found =
              find_tuned<DecodeKernel, DecodeConfig>(table, architecture, kHead, n, k, group, rows);
          if (found == nullptr) return pybind11::none();
          return pybind11::cast(std::tuple(found->blocks_per_sm));
        });
  m.def("gpu_architecture", gpu_architecture);
  m.def("tuned_as", tuned_as);
  m.def("untuned_warning", untuned_warning);
}

}  // namespace qwen::cuda
