// What the block operators of a cuda program share: weights in the kernels' layouts, scratch, and launches
// that report CUDA's own words.
//
// B rows of a decode step, T tokens of a prefill chunk, D hidden size, G group size.
#pragma once

#include <cuda_runtime_api.h>

#include <memory>
#include <string>

#include "cuda_error.h"
#include "kernels/cuda/types.h"
#include "shims/cuda_scope.h"
#include "shims/operator_arguments.h"

namespace qwen {

inline cuda::bf16* bf16_data(const Tensor& tensor) { return tensor.as<cuda::bf16>(); }

// A dense bfloat16 tensor of exactly these sizes.
inline const cuda::bf16* bf16_argument(AtenTensorHandle handle, std::initializer_list<int64_t> sizes,
                                       const char* name) {
  const Tensor& tensor = dense(handle, static_cast<int64_t>(sizes.size()), kBFloat, name);
  require(std::equal(sizes.begin(), sizes.end(), tensor.sizes.begin()), name);
  return bf16_data(tensor);
}

// Tiles u8 [.., N16, K64, 512] and scales bf16 [.., N16, ceil64(K)/G, 16] of a matrix [n, k], with a leading
// dimension of `experts` if that is not zero.
inline cuda::Int4Matrix int4_argument(AtenTensorHandle tiles_handle, AtenTensorHandle scales_handle,
                                      int64_t n, int64_t k, const char* name, int64_t experts = 0) {
  const int64_t leading = experts > 0 ? 1 : 0;
  const Tensor& tiles = dense(tiles_handle, leading + 3, kByte, name);
  const Tensor& scales = dense(scales_handle, leading + 3, kBFloat, name);
  const int64_t columns = (k + 63) / 64 * 64;
  const int64_t groups = scales.sizes[leading + 1];
  require(leading == 0 || (tiles.sizes[0] == experts && scales.sizes[0] == experts), name);
  require(tiles.sizes[leading] == (n + 15) / 16 && tiles.sizes[leading + 1] * 64 == columns &&
              tiles.sizes[leading + 2] == 512,
          name);
  require(scales.sizes[leading] == tiles.sizes[leading] && groups > 0 && columns % groups == 0 &&
              scales.sizes[leading + 2] == 16,
          name);
  const int64_t group = columns / groups;
  require(group == 32 || group == 64 || group == 128, name);
  return {.tiles = tiles.as<uint4>(),
          .scales = scales.as<uint32_t>(),
          .n = static_cast<int>(n),
          .k = static_cast<int>(k),
          .group = static_cast<int>(group)};
}

// qweight i8 [N, K] and scales bf16 [N, K/G].
inline cuda::Int8Matrix int8_argument(AtenTensorHandle qweight_handle, AtenTensorHandle scales_handle,
                                      const char* name) {
  const Tensor& qweight = dense(qweight_handle, 2, kSignedByte, name);
  const Tensor& scales = dense(scales_handle, 2, kBFloat, name);
  require(
      scales.sizes[0] == qweight.sizes[0] && scales.sizes[1] > 0 && qweight.sizes[1] % scales.sizes[1] == 0,
      name);
  return {.qweight = qweight.as<int8_t>(),
          .scales = bf16_data(scales),
          .n = static_cast<int>(qweight.sizes[0]),
          .k = static_cast<int>(qweight.sizes[1]),
          .group = static_cast<int>(qweight.sizes[1] / scales.sizes[1])};
}

// Device memory until the end of the operator; what is enqueued before may still use it then, since whoever
// takes the memory next is enqueued later.
template <typename T>
class Scratch {
 public:
  explicit Scratch(int64_t count)
      : tensor_(allocate({count * static_cast<int64_t>(sizeof(T))}, ScalarType::kUInt8)) {}
  // NOLINTNEXTLINE(google-explicit-constructor): an argument of launchers, as a pointer
  operator T*() const { return tensor_->as<T>(); }

 private:
  std::unique_ptr<Tensor> tensor_;
};

// REQUIRES: a compiled method of a cuda program is running.
inline CudaScope& cuda_scope() {
  CudaScope* scope = CudaScope::current();
  if (scope == nullptr) throw Refusal{"called outside a run"};
  return *scope;
}

inline void check_launch(cudaError_t error, const char* launcher) {
  if (error == cudaSuccess) return;
  const Error failure = cuda_failure(error, launcher);
  throw Refusal{failure.message, failure.code};
}

// Runs a launcher on the scope's stream: QWEN_LAUNCH(rms_norm, x, norm, y, tokens, d).
#define QWEN_LAUNCH(launcher, ...) \
  ::qwen::check_launch(::qwen::cuda::launcher(__VA_ARGS__, ::qwen::cuda_scope().stream), #launcher)

}  // namespace qwen
