#include "shims/cuda_scope.h"

namespace qwen {
namespace {

thread_local CudaScope* current_scope = nullptr;

}  // namespace

CudaScope::CudaScope(cudaStream_t stream, uint32_t* counters, cuda::ExpertActivations expert_activations)
    : stream(stream), counters(counters), expert_activations(expert_activations), previous_(current_scope) {
  current_scope = this;
}
CudaScope::~CudaScope() { current_scope = previous_; }

CudaScope* CudaScope::current() { return current_scope; }

}  // namespace qwen
