// What the functions of CUDA's runtime have in common.
#pragma once

#include <cuda_runtime_api.h>

#include <functional>

namespace qwen::cuda::emulated {

// Keeps an error for cudaGetLastError.
cudaError_t finish(cudaError_t error);

// What this call of the function fails with, if QWEN_EMULATED_FAIL says so.
cudaError_t injected(const char* function);

// Runs it now, or keeps it in the graph that the stream captures.
cudaError_t enqueue(cudaStream_t stream, const std::function<cudaError_t()>& operation);

}  // namespace qwen::cuda::emulated

#define QWEN_ENTER(function)                                                        \
  if (const cudaError_t injected_error = qwen::cuda::emulated::injected(#function); \
      injected_error != cudaSuccess)                                                \
  return injected_error
