#include "kernels/sample/best.cuh"
#include "kernels/sample/cuda.h"
#include "kernels/sample/draw.cuh"
#include "kernels/sample/filter.cuh"

namespace qwen::cuda {

size_t sample_scratch(int vocabulary, int sessions) { return sampling::scratch_bytes(vocabulary) * sessions; }

cudaError_t sample(const SampleArguments& in, void* scratch, uint32_t* counters, cudaStream_t stream) {
  if (in.sessions <= 0 || in.sessions > kCounters || in.vocabulary <= 0 || in.tokens_count <= 0 ||
      (in.sessions != 1 && in.tokens_count != in.sessions)) {
    return cudaErrorInvalidValue;
  }
  const LaunchShape shape = {dim3(sampling::blocks_of(in.vocabulary), in.sessions), dim3(sampling::kThreads)};
  QWEN_RETURN_IF_CUDA_ERROR(launch(&sampling::find_best, shape, stream, in, scratch));
  QWEN_RETURN_IF_CUDA_ERROR(launch(&sampling::filter_bins, shape, stream, in, scratch, counters));
  return launch(&sampling::draw_token, shape, stream, in, scratch, counters);
}

}  // namespace qwen::cuda
