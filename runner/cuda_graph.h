// CudaGraph: work captured from a stream once and replayed by one call. Movable; not thread-safe.
#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>
#include <functional>

#include "result.h"

namespace qwen {

class CudaGraph {
 public:
  CudaGraph() = default;
  CudaGraph(CudaGraph&& other) noexcept;
  CudaGraph& operator=(CudaGraph&& other) noexcept;
  ~CudaGraph();

  // Captures what `enqueue` puts on `stream`, which must neither wait for the GPU nor take memory from it;
  // nothing is run. On failure the stream is as before.
  static Result<CudaGraph> capture(cudaStream_t stream, const std::function<Status()>& enqueue);

  Status launch(cudaStream_t stream);
  explicit operator bool() const { return executable_ != nullptr; }
  int64_t nodes() const { return nodes_; }

 private:
  cudaGraphExec_t executable_ = nullptr;
  int64_t nodes_ = 0;
};

}  // namespace qwen
