#include "kernels/cuda/bindings.h"
#include "tests/kernels/cuda_primitives.h"

namespace qwen::cuda {

void bind_primitives(pybind11::module_& m) {
  bind(m, "test_mma_bf16", &test_mma_bf16);
  bind(m, "test_mma_tf32", &test_mma_tf32);
  bind(m, "test_mma_s8", &test_mma_s8);
  bind(m, "test_load_matrix", &test_load_matrix);
  bind(m, "test_shuffles", &test_shuffles);
  bind(m, "test_copy_async", &test_copy_async);
  bind(m, "test_last_block_sum", &test_last_block_sum);
  bind(m, "test_bits", &test_bits);
  bind(m, "test_fault", &test_fault);
  bind(m, "test_cluster", &test_cluster);
}

}  // namespace qwen::cuda
