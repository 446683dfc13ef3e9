#include "kernels/cuda/primitives.cuh"
#include "kernels/decode_loop/cuda.h"

namespace qwen::cuda {
namespace {

__global__ void publish_kernel(PublishArguments a) {
  wait_for_previous_kernel();
  const int row = static_cast<int>(threadIdx.x);
  const uint32_t number = *a.steps + 1;
  __syncthreads();
  if (row == 0) *a.steps = number;
  if (row < a.rows) {
    const int64_t token = a.next_token[row];
    if (a.tokens != nullptr) a.tokens[row] = token;
    if (a.position != nullptr) a.position[row] += 1;
    volatile uint64_t* entry = a.ring + static_cast<size_t>((number - 1) % kRingSteps) * a.rows + row;
    *entry = static_cast<uint64_t>(number) << 32 | static_cast<uint32_t>(token);
  }
  // Not before: the next step's kernels read what this step wrote before they wait; see cuda/launch.h.
  __threadfence();
  let_next_kernel_start();
}

}  // namespace

cudaError_t publish(const PublishArguments& arguments, cudaStream_t stream) {
  if (arguments.rows < 1 || arguments.rows > 32) return cudaErrorInvalidValue;
  return launch(publish_kernel, {dim3(1), dim3(32), 0}, stream, arguments);
}

}  // namespace qwen::cuda
