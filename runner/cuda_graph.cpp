#include "cuda_graph.h"

#include <utility>

#include "cuda_error.h"

namespace qwen {
namespace {

// What a capture leaves behind, destroyed once it is instantiated.
struct CapturedGraph {
  CapturedGraph() = default;
  CapturedGraph(const CapturedGraph&) = delete;
  CapturedGraph& operator=(const CapturedGraph&) = delete;
  ~CapturedGraph() {
    if (graph != nullptr) cudaGraphDestroy(graph);
  }
  cudaGraph_t graph = nullptr;
};

}  // namespace

CudaGraph::CudaGraph(CudaGraph&& other) noexcept
    : executable_(std::exchange(other.executable_, nullptr)), nodes_(other.nodes_) {}

CudaGraph& CudaGraph::operator=(CudaGraph&& other) noexcept {
  std::swap(executable_, other.executable_);
  std::swap(nodes_, other.nodes_);
  return *this;
}

CudaGraph::~CudaGraph() {
  if (executable_ != nullptr) cudaGraphExecDestroy(executable_);
}

Result<CudaGraph> CudaGraph::capture(cudaStream_t stream, const std::function<Status()>& enqueue) {
  // Thread-local: other engines' threads may do as they please meanwhile.
  QWEN_CUDA_CHECK(cudaStreamBeginCapture(stream, cudaStreamCaptureModeThreadLocal));
  const Status enqueued = enqueue();
  CapturedGraph captured;
  const cudaError_t ended = cudaStreamEndCapture(stream, &captured.graph);
  if (!enqueued.ok()) {
    cudaGetLastError();
    return enqueued.error();
  }
  if (ended != cudaSuccess) return cuda_failure(ended, "cudaStreamEndCapture");
  CudaGraph graph;
  size_t nodes = 0;
  QWEN_CUDA_CHECK(cudaGraphGetNodes(captured.graph, nullptr, &nodes));
  graph.nodes_ = static_cast<int64_t>(nodes);
  QWEN_CUDA_CHECK(cudaGraphInstantiate(&graph.executable_, captured.graph, 0));
  QWEN_CUDA_CHECK(cudaGraphUpload(graph.executable_, stream));
  return graph;
}

Status CudaGraph::launch(cudaStream_t stream) {
  QWEN_CUDA_CHECK(cudaGraphLaunch(executable_, stream));
  return ok_status();
}

}  // namespace qwen
