// sort, for compiled graphs that call PyTorch's own.

#include <algorithm>
#include <array>
#include <utility>
#include <vector>

#include "kernels/sort/cuda.h"
#include "shims/cuda_arguments.h"

namespace qwen {
namespace {

cuda::SortType sort_type(const Tensor& tensor) {
  switch (tensor.dtype) {
    case ScalarType::kInt32:
      return cuda::SortType::kInt32;
    case ScalarType::kInt64:
      return cuda::SortType::kInt64;
    case ScalarType::kFloat32:
      return cuda::SortType::kFloat32;
    case ScalarType::kBFloat16:
      return cuda::SortType::kBFloat16;
    case ScalarType::kFloat16:
      return cuda::SortType::kFloat16;
    default:
      throw Refusal{"cannot sort " + tensor.shape() +
                    ": only int32, int64, float32, bfloat16 and float16 are sorted"};
  }
}

// The lines along a dimension, as sort_stable() takes them.
struct Lines {
  int64_t outer = 1;
  int64_t length = 1;
  int64_t inner = 1;
};

// Of a tensor that fills its memory, its dimensions in whatever order: the results have the same strides, as
// compiled code expects.
Lines lines_along(const Tensor& tensor, int64_t dim) {
  std::vector<int64_t> order;
  for (int64_t i = 0; i < tensor.dim; ++i) {
    if (tensor.sizes[i] != 1) order.push_back(i);
  }
  std::ranges::sort(order, {}, [&](int64_t i) { return tensor.strides[i]; });
  Lines lines;
  int64_t elements = 1;
  bool passed = false;
  for (const int64_t i : order) {
    const int64_t size = tensor.sizes[i];
    require(tensor.strides[i] == elements, "a tensor to sort has gaps or overlaps");
    elements *= size;
    if (i == dim) {
      lines.length = size;
      passed = true;
    } else {
      (passed ? lines.outer : lines.inner) *= size;
    }
  }
  return lines;
}

std::unique_ptr<Tensor> allocate_like(const Tensor& tensor, ScalarType dtype) {
  const auto dims = static_cast<size_t>(tensor.dim);
  auto result =
      Tensor::allocate({tensor.sizes.data(), dims}, {tensor.strides.data(), dims}, dtype, tensor.device_type);
  if (result == nullptr) throw Refusal{"out of memory", ErrorCode::kOutOfMemory};
  return result;
}

}  // namespace
}  // namespace qwen

using namespace qwen;  // NOLINT(google-build-using-namespace): the function below is outside for its C name

// Always stable, whatever `stable` points at.
QWEN_SHIM AOTITorchError qwen_aoti_torch_cuda_sort_stable(AtenTensorHandle self, int32_t* /*stable*/,
                                                          int64_t dim, int32_t descending,
                                                          AtenTensorHandle* values,
                                                          AtenTensorHandle* indices) {
  return guarded("sort_stable", [&] {
    const Tensor& tensor = get(self);
    const int64_t dims = std::max<int64_t>(tensor.dim, 1);  // a scalar is a line of one
    require(dim >= -dims && dim < dims, "there is no such dimension");
    const cuda::SortType type = sort_type(tensor);
    auto sorted = allocate_like(tensor, tensor.dtype);
    auto order = allocate_like(tensor, ScalarType::kInt64);
    if (tensor.numel() > 0) {
      const auto [outer, length, inner] = lines_along(tensor, dim < 0 ? dim + dims : dim);
      const Scratch<std::byte> scratch(static_cast<int64_t>(cuda::sort_scratch(type, outer, length, inner)));
      QWEN_LAUNCH(sort_stable, tensor.data(), sorted->data(), order->as<int64_t>(), scratch, type, outer,
                  length, inner, descending != 0);
    }
    *values = sorted.release()->handle();
    *indices = order.release()->handle();
  });
}
