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
      .value("MOE_GATE_UP", kMoeGateUp)
      .value("MOE_DOWN", kMoeDown)
      .value("ROUTER", kRouter);
  m.def("override_decode_config", [](DecodeKernel kernel, int warps, int row_tiles) {
    decode_overrides[kernel] = {warps, row_tiles};
  });
}

}  // namespace qwen::cuda
