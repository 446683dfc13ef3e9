#include "kernels/cuda/bindings.h"
#include "kernels/gated_delta/cuda.h"

namespace qwen::cuda {

void bind_delta_projections(pybind11::module_& m) {
  bind(m, "delta_input_decode", delta_input_decode);
  bind(m, "delta_output_decode", delta_output_decode);
}

}  // namespace qwen::cuda
