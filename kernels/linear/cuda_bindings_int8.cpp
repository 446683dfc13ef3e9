#include "kernels/cuda/bindings.h"
#include "kernels/linear/cuda.h"

namespace qwen::cuda {

void bind_linear_int8(pybind11::module_& m) {
  bind(m, "int8_head", &int8_head);
  bind(m, "int8_embedding", &int8_embedding);
}

}  // namespace qwen::cuda
