#include "kernels/cuda/bindings.h"
#include "kernels/linear/cuda.h"

namespace qwen::cuda {

void bind_linear_prefill(pybind11::module_& m) {
  bind(m, "int4_linear_prefill", &int4_linear_prefill);
  bind(m, "int4_swiglu_prefill", &int4_swiglu_prefill);
  bind(m, "float_linear_prefill", &float_linear_prefill);
}

}  // namespace qwen::cuda
