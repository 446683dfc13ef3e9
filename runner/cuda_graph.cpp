#include "cuda_graph.h"

#include <utility>

#include "cuda_error.h"

namespace qwen {
namespace {

// A stream's capture, ended at the latest with this, and the graph that it leaves behind.
class Capture {
 public:
  explicit Capture(cudaStream_t stream) : stream_(stream) {}
  Capture(const Capture&) = delete;
  Capture& operator=(const Capture&) = delete;
  ~Capture() {
    if (capturing_ && end() != cudaSuccess) cudaGetLastError();
    if (graph_ != nullptr) cudaGraphDestroy(graph_);
  }

  // Thread-local: other engines' threads may do as they please meanwhile.
  cudaError_t begin() {
    const cudaError_t code = cudaStreamBeginCapture(stream_, cudaStreamCaptureModeThreadLocal);
    capturing_ = code == cudaSuccess;
    return code;
  }
  cudaError_t end() {
    capturing_ = false;
    return cudaStreamEndCapture(stream_, &graph_);
  }
  cudaGraph_t graph() const { return graph_; }

 private:
  cudaStream_t stream_;
  bool capturing_ = false;
  cudaGraph_t graph_ = nullptr;
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
  Capture capture(stream);
  if (const cudaError_t code = capture.begin(); code != cudaSuccess) {
    return cuda_failure(code, "cudaStreamBeginCapture");
  }
  const Status enqueued = enqueue();
  const cudaError_t ended = capture.end();
  if (!enqueued.ok()) {
    cudaGetLastError();
    return enqueued.error();
  }
  if (ended != cudaSuccess) return cuda_failure(ended, "cudaStreamEndCapture");
  CudaGraph graph;
  size_t nodes = 0;
  QWEN_CUDA_CHECK(cudaGraphGetNodes(capture.graph(), nullptr, &nodes));
  graph.nodes_ = static_cast<int64_t>(nodes);
  QWEN_CUDA_CHECK(cudaGraphInstantiate(&graph.executable_, capture.graph(), 0));
  QWEN_CUDA_CHECK(cudaGraphUpload(graph.executable_, stream));
  return graph;
}

Status CudaGraph::launch(cudaStream_t stream) {
  QWEN_CUDA_CHECK(cudaGraphLaunch(executable_, stream));
  return ok_status();
}

}  // namespace qwen
