// CUDA's runtime for emulation: the functions that the runner, the launchers and the tests call, on host
// memory.
//
// One device. Work runs when it is enqueued, or when a graph that captured it is
// launched. New memory is all ones: NaN in every float type. Sizes of copies and fills are checked against
// the allocations they begin in. A graph captures one stream, no others through events.
//
//   QWEN_EMULATED_MEMORY=<bytes>           of the device; 4 GiB
//   QWEN_EMULATED_CAPABILITY=<number>      of the device, as 75; 90
//   QWEN_EMULATED_FAIL=<function>:<n>,...  the n-th call fails: cudaMalloc and cudaHostAlloc with
//                                          cudaErrorMemoryAllocation, others with cudaErrorUnknown
#include <algorithm>
#include <chrono>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <map>
#include <memory>
#include <mutex>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

#include "kernels/cuda/emulation.h"

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

thread_local cudaError_t last_error = cudaSuccess;

cudaError_t finish(cudaError_t error) {
  if (error != cudaSuccess) last_error = error;
  return error;
}

class Device {
 public:
  Device() { qwen::cuda::emulated::capture = &capture; }

  // What a call of this function fails with, if it is to.
  cudaError_t injected(std::string_view function) {
    const std::lock_guard lock(mutex_);
    for (Fault& fault : faults_) {
      if (fault.function == function && --fault.calls == 0) {
        const bool allocates = function == "cudaMalloc" || function == "cudaHostAlloc";
        return finish(allocates ? cudaErrorMemoryAllocation : cudaErrorUnknown);
      }
    }
    return cudaSuccess;
  }

  cudaError_t allocate(void** p, size_t size) {
    const std::lock_guard lock(mutex_);
    *p = nullptr;
    if (size == 0) return cudaSuccess;
    if (size > total_ - used_) return finish(cudaErrorMemoryAllocation);
    void* memory = std::aligned_alloc(kAlignment, (size + kAlignment - 1) / kAlignment * kAlignment);
    if (memory == nullptr) return finish(cudaErrorMemoryAllocation);
    std::memset(memory, 0xff, size);
    allocations_[reinterpret_cast<uintptr_t>(memory)] = size;
    used_ += size;
    *p = memory;
    return cudaSuccess;
  }

  cudaError_t free(void* p) {
    if (p == nullptr) return cudaSuccess;
    const std::lock_guard lock(mutex_);
    const auto found = allocations_.find(reinterpret_cast<uintptr_t>(p));
    if (found == allocations_.end()) return finish(cudaErrorInvalidValue);
    used_ -= found->second;
    std::memset(p, 0xff, found->second);
    allocations_.erase(found);
    std::free(p);
    return cudaSuccess;
  }

  enum class Place { kHost, kDevice, kOutside };
  // Where [p, p + size) lies; outside: it begins in an allocation and ends after it.
  Place place(const void* p, size_t size) {
    const std::lock_guard lock(mutex_);
    const auto address = reinterpret_cast<uintptr_t>(p);
    auto after = allocations_.upper_bound(address);
    if (after == allocations_.begin()) return Place::kHost;
    --after;
    const uintptr_t offset = address - after->first;
    if (offset >= after->second) return Place::kHost;
    return size <= after->second - offset ? Place::kDevice : Place::kOutside;
  }

  size_t total() const { return total_; }
  size_t unused() {
    const std::lock_guard lock(mutex_);
    return total_ - used_;
  }

 private:
  static constexpr size_t kAlignment = 256;
  struct Fault {
    std::string function;
    int calls;  // until it fails
  };

  static bool capture(cudaStream_t stream, const Operation& operation) {
    if (stream == nullptr || stream->captured == nullptr) return false;
    stream->captured->operations.push_back(operation);
    return true;
  }

  static std::vector<Fault> read_faults() {
    std::vector<Fault> faults;
    const char* variable = std::getenv("QWEN_EMULATED_FAIL");
    std::string_view rest = variable == nullptr ? "" : variable;
    while (!rest.empty()) {
      const std::string_view one = rest.substr(0, rest.find(','));
      rest.remove_prefix(std::min(rest.size(), one.size() + 1));
      const size_t colon = one.find(':');
      const std::string count(colon == std::string_view::npos ? "1" : one.substr(colon + 1));
      faults.push_back({std::string(one.substr(0, colon)), std::atoi(count.c_str())});
    }
    return faults;
  }

  static size_t read_memory() {
    const char* variable = std::getenv("QWEN_EMULATED_MEMORY");
    return variable == nullptr ? size_t{4} << 30 : std::strtoull(variable, nullptr, 10);
  }

  std::mutex mutex_;
  std::map<uintptr_t, size_t> allocations_;
  const size_t total_ = read_memory();
  size_t used_ = 0;
  std::vector<Fault> faults_ = read_faults();
};

Device& device() {
  static Device* const device = new Device;  // outlives what static destructors free
  return *device;
}

[[maybe_unused]] const Device& created_at_start = device();

// Enqueues: runs it now, or keeps it in the graph that the stream captures.
cudaError_t enqueue(cudaStream_t stream, const Operation& operation) {
  if (qwen::cuda::emulated::capture(stream, operation)) return cudaSuccess;
  return finish(operation());
}

// A call that waits for a stream ends its capture.
cudaError_t wait_for(cudaStream_t stream) {
  if (stream == nullptr || stream->captured == nullptr) return cudaSuccess;
  stream->invalid = true;
  return finish(cudaErrorStreamCaptureUnsupported);
}

int capability() {
  const char* variable = std::getenv("QWEN_EMULATED_CAPABILITY");
  return variable == nullptr ? 90 : std::atoi(variable);
}

cudaError_t run(const std::vector<Operation>& operations) {
  for (const Operation& operation : operations) {
    if (const cudaError_t error = operation(); error != cudaSuccess) return finish(error);
  }
  return cudaSuccess;
}

cudaError_t check_copy(const void* to, const void* from, size_t count, cudaMemcpyKind kind) {
  using Place = Device::Place;
  const Place to_place = device().place(to, count);
  const Place from_place = device().place(from, count);
  if (to_place == Place::kOutside || from_place == Place::kOutside) return cudaErrorInvalidValue;
  const bool to_device = kind == cudaMemcpyHostToDevice || kind == cudaMemcpyDeviceToDevice;
  const bool from_device = kind == cudaMemcpyDeviceToHost || kind == cudaMemcpyDeviceToDevice;
  if (kind != cudaMemcpyDefault &&
      (to_device != (to_place == Place::kDevice) || from_device != (from_place == Place::kDevice))) {
    return cudaErrorInvalidValue;
  }
  return cudaSuccess;
}

}  // namespace

#define QWEN_ENTER(function)                                                                          \
  if (const cudaError_t injected_error = device().injected(#function); injected_error != cudaSuccess) \
  return injected_error

// The device.

cudaError_t cudaDriverGetVersion(int* version) {
  QWEN_ENTER(cudaDriverGetVersion);
  *version = CUDART_VERSION;
  return cudaSuccess;
}
cudaError_t cudaRuntimeGetVersion(int* version) {
  QWEN_ENTER(cudaRuntimeGetVersion);
  *version = CUDART_VERSION;
  return cudaSuccess;
}
cudaError_t cudaGetDeviceCount(int* count) {
  QWEN_ENTER(cudaGetDeviceCount);
  *count = 1;
  return cudaSuccess;
}
cudaError_t cudaGetDevice(int* ordinal) {
  QWEN_ENTER(cudaGetDevice);
  *ordinal = 0;
  return cudaSuccess;
}
cudaError_t cudaSetDevice(int ordinal) {
  QWEN_ENTER(cudaSetDevice);
  return finish(ordinal == 0 ? cudaSuccess : cudaErrorInvalidDevice);
}
cudaError_t cudaGetDeviceProperties(cudaDeviceProp* properties, int ordinal) {
  QWEN_ENTER(cudaGetDeviceProperties);
  if (ordinal != 0) return finish(cudaErrorInvalidDevice);
  *properties = {};
  std::strcpy(properties->name, "Emulated GPU");
  properties->totalGlobalMem = device().total();
  properties->major = capability() / 10;
  properties->minor = capability() % 10;
  properties->warpSize = warpSize;
  properties->maxThreadsPerBlock = qwen::cuda::emulated::kMaxThreads;
  properties->multiProcessorCount = 4;
  properties->sharedMemPerBlock = 48 * 1024;
  properties->sharedMemPerBlockOptin = qwen::cuda::emulated::kMaxSharedBytes;
  return cudaSuccess;
}
cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr attribute, int ordinal) {
  QWEN_ENTER(cudaDeviceGetAttribute);
  if (ordinal != 0) return finish(cudaErrorInvalidDevice);
  switch (attribute) {
    case cudaDevAttrComputeCapabilityMajor:
      *value = capability() / 10;
      break;
    case cudaDevAttrComputeCapabilityMinor:
      *value = capability() % 10;
      break;
    case cudaDevAttrMultiProcessorCount:
      *value = 4;
      break;
    case cudaDevAttrWarpSize:
      *value = warpSize;
      break;
    case cudaDevAttrMaxThreadsPerBlock:
      *value = qwen::cuda::emulated::kMaxThreads;
      break;
    case cudaDevAttrMaxSharedMemoryPerBlock:
      *value = 48 * 1024;
      break;
    case cudaDevAttrMaxSharedMemoryPerBlockOptin:
      *value = qwen::cuda::emulated::kMaxSharedBytes;
      break;
    case cudaDevAttrL2CacheSize:
      *value = 50 << 20;
      break;
    default:
      return finish(cudaErrorInvalidValue);
  }
  return cudaSuccess;
}
cudaError_t cudaDeviceSynchronize() {
  QWEN_ENTER(cudaDeviceSynchronize);
  return cudaSuccess;
}
cudaError_t cudaFuncSetAttribute(const void* /*function*/, cudaFuncAttribute /*attribute*/, int /*value*/) {
  QWEN_ENTER(cudaFuncSetAttribute);
  return cudaSuccess;
}

// Memory.

cudaError_t cudaMalloc(void** p, size_t size) {
  QWEN_ENTER(cudaMalloc);
  return device().allocate(p, size);
}
cudaError_t cudaFree(void* p) {
  QWEN_ENTER(cudaFree);
  return device().free(p);
}
cudaError_t cudaMemGetInfo(size_t* unused, size_t* total) {
  QWEN_ENTER(cudaMemGetInfo);
  *unused = device().unused();
  *total = device().total();
  return cudaSuccess;
}
cudaError_t cudaHostAlloc(void** p, size_t size, unsigned /*flags*/) {
  QWEN_ENTER(cudaHostAlloc);
  *p = std::aligned_alloc(4096, (size + 4095) / 4096 * 4096);
  if (*p == nullptr) return finish(cudaErrorMemoryAllocation);
  std::memset(*p, 0xff, size);
  return cudaSuccess;
}
cudaError_t cudaMallocHost(void** p, size_t size) { return cudaHostAlloc(p, size, cudaHostAllocDefault); }
cudaError_t cudaFreeHost(void* p) {
  QWEN_ENTER(cudaFreeHost);
  std::free(p);
  return cudaSuccess;
}
cudaError_t cudaHostGetDevicePointer(void** p, void* host, unsigned /*flags*/) {
  QWEN_ENTER(cudaHostGetDevicePointer);
  *p = host;
  return cudaSuccess;
}
cudaError_t cudaHostRegister(void* /*p*/, size_t /*size*/, unsigned /*flags*/) {
  QWEN_ENTER(cudaHostRegister);
  return cudaSuccess;
}
cudaError_t cudaHostUnregister(void* /*p*/) {
  QWEN_ENTER(cudaHostUnregister);
  return cudaSuccess;
}
cudaError_t cudaMemcpyAsync(void* to, const void* from, size_t count, cudaMemcpyKind kind,
                            cudaStream_t stream) {
  QWEN_ENTER(cudaMemcpyAsync);
  if (const cudaError_t error = check_copy(to, from, count, kind); error != cudaSuccess) return finish(error);
  return enqueue(stream, [=] {
    std::memcpy(to, from, count);
    return cudaSuccess;
  });
}
cudaError_t cudaMemcpy(void* to, const void* from, size_t count, cudaMemcpyKind kind) {
  QWEN_ENTER(cudaMemcpy);
  return cudaMemcpyAsync(to, from, count, kind, nullptr);
}
cudaError_t cudaMemsetAsync(void* p, int value, size_t count, cudaStream_t stream) {
  QWEN_ENTER(cudaMemsetAsync);
  if (device().place(p, count) == Device::Place::kOutside) return finish(cudaErrorInvalidValue);
  return enqueue(stream, [=] {
    std::memset(p, value, count);
    return cudaSuccess;
  });
}
cudaError_t cudaMemset(void* p, int value, size_t count) {
  QWEN_ENTER(cudaMemset);
  return cudaMemsetAsync(p, value, count, nullptr);
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

// Errors.

cudaError_t cudaGetLastError() { return std::exchange(last_error, cudaSuccess); }
cudaError_t cudaPeekAtLastError() { return last_error; }

const char* cudaGetErrorName(cudaError_t error) {
  switch (error) {
    case cudaSuccess:
      return "cudaSuccess";
    case cudaErrorInvalidValue:
      return "cudaErrorInvalidValue";
    case cudaErrorMemoryAllocation:
      return "cudaErrorMemoryAllocation";
    case cudaErrorInvalidConfiguration:
      return "cudaErrorInvalidConfiguration";
    case cudaErrorInvalidDevice:
      return "cudaErrorInvalidDevice";
    case cudaErrorInvalidResourceHandle:
      return "cudaErrorInvalidResourceHandle";
    case cudaErrorIllegalState:
      return "cudaErrorIllegalState";
    case cudaErrorNotSupported:
      return "cudaErrorNotSupported";
    case cudaErrorStreamCaptureUnsupported:
      return "cudaErrorStreamCaptureUnsupported";
    case cudaErrorStreamCaptureInvalidated:
      return "cudaErrorStreamCaptureInvalidated";
    case cudaErrorUnknown:
      return "cudaErrorUnknown";
    default:
      return "an error of the emulated GPU";
  }
}

const char* cudaGetErrorString(cudaError_t error) {
  switch (error) {
    case cudaSuccess:
      return "no error";
    case cudaErrorInvalidValue:
      return "invalid argument";
    case cudaErrorMemoryAllocation:
      return "out of memory";
    case cudaErrorUnknown:
      return "unknown error; an emulated kernel's reason is on stderr";
    default:
      return cudaGetErrorName(error);
  }
}
