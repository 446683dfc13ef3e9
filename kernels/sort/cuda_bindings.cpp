#include "kernels/cuda/bindings.h"
#include "kernels/sort/cuda.h"

namespace qwen::cuda {

void bind_sort(pybind11::module_& m) {
  pybind11::enum_<SortType>(m, "SortType")
      .value("INT32", SortType::kInt32)
      .value("INT64", SortType::kInt64)
      .value("FLOAT32", SortType::kFloat32)
      .value("BFLOAT16", SortType::kBFloat16)
      .value("FLOAT16", SortType::kFloat16);
  bind(m, "sort_stable", &sort_stable);
  bind(m, "sort_scratch", &sort_scratch);
}

}  // namespace qwen::cuda
