#include "shims/cuda_scope.h"

namespace qwen {
namespace {

thread_local CudaScope* current_scope = nullptr;

}  // namespace

CudaScope::CudaScope(cudaStream_t stream, uint32_t* counters, FirstMatrices* first_matrices)
    : stream(stream), counters(counters), first_matrices_(first_matrices), previous_(current_scope) {
  current_scope = this;
}
CudaScope::~CudaScope() { current_scope = previous_; }

void CudaScope::begin_block(const cuda::Int4Matrix& first) {
  if (first_matrices_ == nullptr) return;
  if (begun_ == first_matrices_->size()) first_matrices_->push_back(first);
  ++begun_;
}
cuda::Int4Matrix CudaScope::next_block() const {
  if (first_matrices_ == nullptr || begun_ >= first_matrices_->size()) return {};
  return (*first_matrices_)[begun_];
}

CudaScope* CudaScope::current() { return current_scope; }

}  // namespace qwen
