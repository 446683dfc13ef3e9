// Streams, events and graphs for emulation. Work runs when it is enqueued, or when a graph that captured it
// is launched. A graph captures one stream, no others through events.
#include <chrono>
#include <functional>
#include <memory>
#include <utility>
#include <vector>

#include "kernels/cuda/emulated_runtime.h"
#include "kernels/cuda/emulation.h"

using qwen::cuda::emulated::enqueue;
using qwen::cuda::emulated::finish;

namespace {
using Operation = std::function<cudaError_t()>;
}

struct CUgraph_st {
  std::vector<Operation> operations;
};
struct CUgraphExec_st {
  std::vector<Operation> operations;
};
struct CUstream_st {
  std::unique_ptr<CUgraph_st> captured;  // while capturing
  bool invalid = false;                  // the capture
};
struct CUevent_st {
  bool recorded = false;
  std::chrono::steady_clock::time_point time;
};

namespace {

bool capture(cudaStream_t stream, const Operation& operation) {
  if (stream == nullptr || stream->captured == nullptr) return false;
  stream->captured->operations.push_back(operation);
  return true;
}

// Before any kernel is launched.
[[maybe_unused]] const bool captures_launches = [] {
  qwen::cuda::emulated::capture = &capture;
  return true;
}();

// A call that waits for a stream ends its capture.
cudaError_t wait_for(cudaStream_t stream) {
  if (stream == nullptr || stream->captured == nullptr) return cudaSuccess;
  stream->invalid = true;
  return finish(cudaErrorStreamCaptureUnsupported);
}

cudaError_t run(const std::vector<Operation>& operations) {
  for (const Operation& operation : operations) {
    if (const cudaError_t error = operation(); error != cudaSuccess) return finish(error);
  }
  return cudaSuccess;
}

}  // namespace

cudaError_t qwen::cuda::emulated::enqueue(cudaStream_t stream, const Operation& operation) {
  if (::capture(stream, operation)) return cudaSuccess;
  return finish(operation());
}

// Streams and events.

cudaError_t cudaStreamCreateWithFlags(cudaStream_t* stream, unsigned /*flags*/) {
  QWEN_ENTER(cudaStreamCreateWithFlags);
  *stream = new CUstream_st;
  return cudaSuccess;
}
cudaError_t cudaStreamCreate(cudaStream_t* stream) {
  return cudaStreamCreateWithFlags(stream, cudaStreamDefault);
}
cudaError_t cudaStreamDestroy(cudaStream_t stream) {
  QWEN_ENTER(cudaStreamDestroy);
  delete stream;
  return cudaSuccess;
}
cudaError_t cudaStreamSynchronize(cudaStream_t stream) {
  QWEN_ENTER(cudaStreamSynchronize);
  return wait_for(stream);
}
cudaError_t cudaStreamQuery(cudaStream_t stream) {
  QWEN_ENTER(cudaStreamQuery);
  return wait_for(stream);
}
cudaError_t cudaStreamWaitEvent(cudaStream_t stream, cudaEvent_t /*event*/, unsigned /*flags*/) {
  QWEN_ENTER(cudaStreamWaitEvent);
  return wait_for(stream);
}
cudaError_t cudaLaunchHostFunc(cudaStream_t stream, cudaHostFn_t function, void* data) {
  QWEN_ENTER(cudaLaunchHostFunc);
  return enqueue(stream, [=] {
    function(data);
    return cudaSuccess;
  });
}
cudaError_t cudaEventCreateWithFlags(cudaEvent_t* event, unsigned /*flags*/) {
  QWEN_ENTER(cudaEventCreateWithFlags);
  *event = new CUevent_st;
  return cudaSuccess;
}
cudaError_t cudaEventCreate(cudaEvent_t* event) { return cudaEventCreateWithFlags(event, cudaEventDefault); }
cudaError_t cudaEventDestroy(cudaEvent_t event) {
  QWEN_ENTER(cudaEventDestroy);
  delete event;
  return cudaSuccess;
}
cudaError_t cudaEventRecord(cudaEvent_t event, cudaStream_t stream) {
  QWEN_ENTER(cudaEventRecord);
  return enqueue(stream, [=] {
    event->recorded = true;
    event->time = std::chrono::steady_clock::now();
    return cudaSuccess;
  });
}
cudaError_t cudaEventSynchronize(cudaEvent_t /*event*/) {
  QWEN_ENTER(cudaEventSynchronize);
  return cudaSuccess;
}
cudaError_t cudaEventQuery(cudaEvent_t /*event*/) {
  QWEN_ENTER(cudaEventQuery);
  return cudaSuccess;
}
cudaError_t cudaEventElapsedTime(float* milliseconds, cudaEvent_t start, cudaEvent_t end) {
  QWEN_ENTER(cudaEventElapsedTime);
  if (!start->recorded || !end->recorded) return finish(cudaErrorInvalidResourceHandle);
  *milliseconds = std::chrono::duration<float, std::milli>(end->time - start->time).count();
  return cudaSuccess;
}

// Graphs.

cudaError_t cudaStreamBeginCapture(cudaStream_t stream, cudaStreamCaptureMode /*mode*/) {
  QWEN_ENTER(cudaStreamBeginCapture);
  if (stream == nullptr) return finish(cudaErrorStreamCaptureUnsupported);
  if (stream->captured != nullptr) return finish(cudaErrorIllegalState);
  stream->captured = std::make_unique<CUgraph_st>();
  stream->invalid = false;
  return cudaSuccess;
}
cudaError_t cudaStreamEndCapture(cudaStream_t stream, cudaGraph_t* graph) {
  QWEN_ENTER(cudaStreamEndCapture);
  *graph = nullptr;
  if (stream == nullptr || stream->captured == nullptr) return finish(cudaErrorIllegalState);
  const std::unique_ptr<CUgraph_st> captured = std::move(stream->captured);
  if (stream->invalid) return finish(cudaErrorStreamCaptureInvalidated);
  *graph = new CUgraph_st(*captured);
  return cudaSuccess;
}
cudaError_t cudaStreamIsCapturing(cudaStream_t stream, cudaStreamCaptureStatus* status) {
  QWEN_ENTER(cudaStreamIsCapturing);
  const bool captures = stream != nullptr && stream->captured != nullptr;
  *status = !captures         ? cudaStreamCaptureStatusNone
            : stream->invalid ? cudaStreamCaptureStatusInvalidated
                              : cudaStreamCaptureStatusActive;
  return cudaSuccess;
}
cudaError_t cudaGraphInstantiate(cudaGraphExec_t* executable, cudaGraph_t graph,
                                 unsigned long long /*flags*/) {
  QWEN_ENTER(cudaGraphInstantiate);
  *executable = new CUgraphExec_st{graph->operations};
  return cudaSuccess;
}
cudaError_t cudaGraphUpload(cudaGraphExec_t /*executable*/, cudaStream_t /*stream*/) {
  QWEN_ENTER(cudaGraphUpload);
  return cudaSuccess;
}
cudaError_t cudaGraphLaunch(cudaGraphExec_t executable, cudaStream_t stream) {
  QWEN_ENTER(cudaGraphLaunch);
  return enqueue(stream, [operations = executable->operations] { return run(operations); });
}
cudaError_t cudaGraphGetNodes(cudaGraph_t graph, cudaGraphNode_t* nodes, size_t* count) {
  QWEN_ENTER(cudaGraphGetNodes);
  if (nodes != nullptr) return finish(cudaErrorNotSupported);
  *count = graph->operations.size();
  return cudaSuccess;
}
cudaError_t cudaGraphDestroy(cudaGraph_t graph) {
  QWEN_ENTER(cudaGraphDestroy);
  delete graph;
  return cudaSuccess;
}
cudaError_t cudaGraphExecDestroy(cudaGraphExec_t executable) {
  QWEN_ENTER(cudaGraphExecDestroy);
  delete executable;
  return cudaSuccess;
}
