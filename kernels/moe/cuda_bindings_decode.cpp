#include "kernels/cuda/bindings.h"
#include "kernels/moe/cuda.h"

namespace qwen::cuda {

void bind_moe_decode(pybind11::module_& m) {
  bind(m, "router_decode", router_decode);
  bind(m, "moe_gate_up_decode", moe_gate_up_decode);
  bind(m, "moe_down_decode", moe_down_decode);
}

}  // namespace qwen::cuda
