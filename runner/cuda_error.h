// Failures of CUDA calls as errors that name the call and say what to do.
#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>
#include <string>

#include "result.h"

namespace qwen {

// The error for `code` of `call`, as it is written or by its name alone. Forgets the failure where CUDA can
// go on; an error that it cannot get over says that the process must be started again.
Error cuda_failure(cudaError_t code, const char* call);

// "18.2 GiB", or in MiB or KiB.
std::string readable_bytes(uint64_t bytes);

}  // namespace qwen

// Evaluates a CUDA call; on failure returns its error from the enclosing function.
#define QWEN_CUDA_CHECK(call)                                                    \
  do {                                                                           \
    const cudaError_t qwen_code = (call);                                        \
    if (qwen_code != cudaSuccess) return ::qwen::cuda_failure(qwen_code, #call); \
  } while (false)
