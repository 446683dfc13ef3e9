#include "kernels/cuda/bindings.h"
#include "kernels/norm/cuda.h"

namespace qwen::cuda {

void bind_norm(pybind11::module_& m) {
  bind(m, "rms_norm", &rms_norm);
  bind(m, "gated_rms_norm", &gated_rms_norm);
}

}  // namespace qwen::cuda
