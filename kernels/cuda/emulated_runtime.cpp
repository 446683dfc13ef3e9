// CUDA's runtime for emulation: the functions that the runner, the launchers and the tests call, on host
// memory.
//
// One device. New memory is all ones: NaN in every float type. Sizes of copies and fills are checked against
// the allocations they begin in. emulated_graphs.cpp has streams and graphs.
//
//   QWEN_EMULATED_MEMORY=<bytes>           of the device; 4 GiB
//   QWEN_EMULATED_CAPABILITY=<number>      of the device, as 75; 90
//   QWEN_EMULATED_FAIL=<function>:<n>,...  the n-th call fails: cudaMalloc and cudaHostAlloc with
//                                          cudaErrorMemoryAllocation, others with cudaErrorUnknown
#include "kernels/cuda/emulated_runtime.h"

#include <algorithm>
#include <cstdlib>
#include <cstring>
#include <map>
#include <mutex>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

#include "kernels/cuda/emulation.h"

using qwen::cuda::emulated::enqueue;
using qwen::cuda::emulated::finish;

namespace {

thread_local cudaError_t last_error = cudaSuccess;

class Device {
 public:
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

int capability() {
  const char* variable = std::getenv("QWEN_EMULATED_CAPABILITY");
  return variable == nullptr ? 90 : std::atoi(variable);
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

cudaError_t qwen::cuda::emulated::finish(cudaError_t error) {
  if (error != cudaSuccess) last_error = error;
  return error;
}
cudaError_t qwen::cuda::emulated::injected(const char* function) { return device().injected(function); }

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
  properties->multiProcessorCount = qwen::cuda::emulated::multiprocessors();
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
      *value = qwen::cuda::emulated::multiprocessors();
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
    case cudaErrorInvalidClusterSize:
      return "cudaErrorInvalidClusterSize";
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
