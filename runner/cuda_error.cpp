#include "cuda_error.h"

#include <cstdio>
#include <string_view>

namespace qwen {
namespace {

// After these the context is gone: every later call fails with the same.
bool is_final(cudaError_t code) {
  switch (code) {
    case cudaErrorIllegalAddress:
    case cudaErrorLaunchTimeout:
    case cudaErrorAssert:
    case cudaErrorHardwareStackError:
    case cudaErrorIllegalInstruction:
    case cudaErrorMisalignedAddress:
    case cudaErrorInvalidAddressSpace:
    case cudaErrorInvalidPc:
    case cudaErrorLaunchFailure:
    case cudaErrorECCUncorrectable:
    case cudaErrorNvlinkUncorrectable:
      return true;
    default:
      return false;
  }
}

}  // namespace

Error cuda_failure(cudaError_t code, const char* call) {
  cudaGetLastError();
  const std::string_view text(call);
  const std::string name(text.substr(0, text.find('(')));
  std::string message = name + " failed: " + cudaGetErrorString(code) + " (" + cudaGetErrorName(code) + ")";
  if (code == cudaErrorMemoryAllocation) {
    return {ErrorCode::kOutOfMemory, message +
                                         "; end other programs on the GPU, or export with fewer --slots, a "
                                         "smaller --max-seq-len or a smaller --chunk"};
  }
  if (is_final(code)) {
    return {ErrorCode::kInternal, message +
                                      "; the GPU cannot be used any more from this process: "
                                      "start it again"};
  }
  if (code == cudaErrorNoKernelImageForDevice || code == cudaErrorUnsupportedPtxVersion) {
    return {ErrorCode::kUnsupported, message + "; build qwen_runner for this GPU's architecture"};
  }
  return {ErrorCode::kInternal, message + "; try again, and check the GPU with nvidia-smi"};
}

std::string readable_bytes(uint64_t bytes) {
  char text[32];
  const auto count = static_cast<double>(bytes);
  if (bytes >= (1ULL << 30)) {
    std::snprintf(text, sizeof text, "%.1f GiB", count / (1ULL << 30));
  } else if (bytes >= (1ULL << 20)) {
    std::snprintf(text, sizeof text, "%.1f MiB", count / (1ULL << 20));
  } else {
    std::snprintf(text, sizeof text, "%.1f KiB", count / (1ULL << 10));
  }
  return text;
}

}  // namespace qwen
