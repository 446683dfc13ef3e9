#include "cuda_device.h"

#include <algorithm>
#include <cstdlib>
#include <cstring>
#include <sstream>
#include <utility>
#include <vector>

#include "cuda_error.h"
#include "kernels/cuda/types.h"
#include "kernels/state/cuda.h"

#ifndef QWEN_CUDA_ARCHITECTURES
#error "define QWEN_CUDA_ARCHITECTURES: what the kernels are compiled for"
#endif

namespace qwen {
namespace {

std::string version_text(int version) {
  return std::to_string(version / 1000) + "." + std::to_string(version % 1000 / 10);
}

std::string capability_text(int capability) {
  return std::to_string(capability / 10) + "." + std::to_string(capability % 10);
}

Error unsupported(const std::string& folder, const std::string& found_and_needed) {
  return {ErrorCode::kUnsupported, folder + " is a cuda program, but " + found_and_needed};
}

constexpr const char* kElsewhere = "; use such a machine, or export with --target cpu";

Status check_driver(const std::string& folder) {
  int driver = 0;
  if (cudaDriverGetVersion(&driver) != cudaSuccess) driver = 0;
  cudaGetLastError();
  if (driver == 0) {
    return unsupported(folder, "no NVIDIA driver was found; it needs a GPU with a driver for CUDA " +
                                   std::to_string(CUDART_VERSION / 1000) + ".0 or newer" + kElsewhere);
  }
  // A driver runs what any toolkit of its major version made.
  if (driver / 1000 < CUDART_VERSION / 1000) {
    return unsupported(folder, "the NVIDIA driver found is for CUDA " + version_text(driver) +
                                   ", this runner was built with CUDA " + version_text(CUDART_VERSION) +
                                   "; install a newer driver, or build with an older toolkit");
  }
  int count = 0;
  const cudaError_t code = cudaGetDeviceCount(&count);
  cudaGetLastError();
  if (code != cudaSuccess || count == 0) {
    const std::string reason = code == cudaSuccess ? "" : std::string(" (") + cudaGetErrorString(code) + ")";
    return unsupported(folder, "no GPU was found" + reason +
                                   "; it needs one that nvidia-smi and "
                                   "CUDA_VISIBLE_DEVICES show" +
                                   kElsewhere);
  }
  return ok_status();
}

// The device that CUDA uses where none is chosen.
constexpr int kDevice = 0;
// Below it the kernels' instructions are not there.
constexpr int kLeastCapability = 80;

Status check_architecture(const std::string& folder, const std::string& name) {
  int major = 0;
  int minor = 0;
  QWEN_CUDA_CHECK(cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, kDevice));
  QWEN_CUDA_CHECK(cudaDeviceGetAttribute(&minor, cudaDevAttrComputeCapabilityMinor, kDevice));
  const int capability = major * 10 + minor;
  if (!covers_architecture(QWEN_CUDA_ARCHITECTURES, capability)) {
    const std::string found =
        "the GPU found (" + name + ") has compute capability " + capability_text(capability);
    if (capability < kLeastCapability) {
      return unsupported(folder, found + ", the kernels need " + capability_text(kLeastCapability) +
                                     " or newer" + kElsewhere);
    }
    // Kernels of Hopper are compiled with its own instructions; 90 alone would leave them out.
    const std::string wanted = std::to_string(capability) + (capability == 90 ? "a" : "") + "-real";
    return unsupported(
        folder, found +
                    ", this runner was built for " QWEN_CUDA_ARCHITECTURES
                    "; build it again with `make clean && make CUDA_ARCHITECTURES=" +
                    wanted + "`, or `pip install -C cmake.define.QWEN_CUDA_ARCHITECTURES=" + wanted + " .`");
  }
  return ok_status();
}

Error out_of_memory(const std::string& what, uint64_t bytes, uint64_t free, uint64_t total) {
  return {ErrorCode::kOutOfMemory, "no GPU memory for " + what + ": it needs " + readable_bytes(bytes) +
                                       ", " + readable_bytes(free) + " of " + readable_bytes(total) +
                                       " are free; end other programs on the GPU, or export with "
                                       "fewer --slots, a smaller --max-seq-len or a smaller --chunk"};
}

}  // namespace

CurrentDevice::CurrentDevice() {
  // What fails here fails in the call that this is for, which reports it.
  if (cudaGetDevice(&previous_) != cudaSuccess) {
    cudaGetLastError();
    previous_ = kDevice;
  }
  if (previous_ != kDevice && cudaSetDevice(kDevice) != cudaSuccess) cudaGetLastError();
}

CurrentDevice::~CurrentDevice() {
  if (previous_ != kDevice && cudaSetDevice(previous_) != cudaSuccess) cudaGetLastError();
}

bool covers_architecture(const std::string& architectures, int capability) {
  std::istringstream entries(architectures);
  for (std::string entry; entries >> entry;) {
    const int architecture = std::atoi(entry.c_str());
    const bool exact = entry.find('a') < entry.find('-');  // 90a, but not 90-real
    const bool as_ptx = entry.find("-real") == std::string::npos;
    if (exact ? architecture == capability
              : architecture <= capability && (as_ptx || architecture / 10 == capability / 10)) {
      return true;
    }
  }
  return false;
}

Result<std::unique_ptr<CudaDevice>> CudaDevice::open(const std::string& folder) {
  QWEN_RETURN_IF_ERROR(check_driver(folder));
  const CurrentDevice current;
  cudaDeviceProp properties = {};
  QWEN_CUDA_CHECK(cudaGetDeviceProperties(&properties, kDevice));
  QWEN_RETURN_IF_ERROR(check_architecture(folder, properties.name));
  std::unique_ptr<CudaDevice> device(new CudaDevice(properties.name));
  QWEN_CUDA_CHECK(cudaStreamCreateWithFlags(&device->stream_, cudaStreamNonBlocking));
  QWEN_ASSIGN_OR_RETURN(device->counters_, DeviceBuffer::zeroed(*device, cuda::kCounters * sizeof(uint32_t),
                                                                "the kernels' counters"));
  return device;
}

CudaDevice::~CudaDevice() {
  counters_ = DeviceBuffer();
  if (stream_ != nullptr) cudaStreamDestroy(stream_);
}

Result<void*> CudaDevice::allocate(size_t bytes, const char* what) {
  const CurrentDevice current;
  void* data = nullptr;
  const cudaError_t code = cudaMalloc(&data, bytes);
  if (code == cudaErrorMemoryAllocation) {
    cudaGetLastError();
    size_t free = 0;
    size_t total = 0;
    cudaMemGetInfo(&free, &total);
    return out_of_memory(what, bytes, free, total);
  }
  if (code != cudaSuccess) return cuda_failure(code, "cudaMalloc");
  allocated_ += bytes;
  return data;
}

Result<void*> CudaDevice::allocate_zeroed(size_t bytes, const char* what) {
  QWEN_ASSIGN_OR_RETURN(void* data, allocate(bytes, what));
  if (const Status zeroed = zero(data, bytes); !zeroed.ok()) {
    release(data, bytes);
    return zeroed.error();
  }
  return data;
}

void CudaDevice::release(void* data, size_t bytes) {
  const CurrentDevice current;
  // It waits for the GPU. What fails here failed before, where it was reported.
  if (cudaFree(data) != cudaSuccess) cudaGetLastError();
  allocated_ -= bytes;
}

Status CudaDevice::zero(void* data, size_t bytes) {
  const CurrentDevice current;
  QWEN_CUDA_CHECK(cudaMemsetAsync(data, 0, bytes, stream_));
  return ok_status();
}

Status CudaDevice::write(std::span<const DeviceRun> runs) {
  const CurrentDevice current;
  std::vector<cuda::Run> batch;
  while (!runs.empty()) {
    const auto part = runs.first(std::min<size_t>(runs.size(), cuda::kMaxRuns));
    batch.clear();
    for (const DeviceRun& run : part) batch.push_back({run.to, run.from, run.bytes});
    QWEN_CUDA_CHECK(cuda::write_runs(batch.data(), static_cast<int>(batch.size()), stream_));
    runs = runs.subspan(part.size());
  }
  return ok_status();
}

Status CudaDevice::copy_from_host(void* to, const void* from, size_t bytes) {
  const CurrentDevice current;
  QWEN_CUDA_CHECK(cudaMemcpyAsync(to, from, bytes, cudaMemcpyHostToDevice, stream_));
  return synchronize();
}

Status CudaDevice::copy_to_host(void* to, const void* from, size_t bytes) {
  const CurrentDevice current;
  QWEN_CUDA_CHECK(cudaMemcpyAsync(to, from, bytes, cudaMemcpyDeviceToHost, stream_));
  return synchronize();
}

Status CudaDevice::synchronize() {
  const CurrentDevice current;
  QWEN_CUDA_CHECK(cudaStreamSynchronize(stream_));
  return ok_status();
}

DeviceMemoryUsage CudaDevice::memory() const {
  const CurrentDevice current;
  size_t free = 0;
  size_t total = 0;
  if (cudaMemGetInfo(&free, &total) != cudaSuccess) cudaGetLastError();
  return {.allocated_bytes = allocated_, .used_bytes = total - free, .total_bytes = total};
}

Status CudaDevice::require_free(uint64_t bytes, const std::string& what) const {
  const CurrentDevice current;
  size_t free = 0;
  size_t total = 0;
  QWEN_CUDA_CHECK(cudaMemGetInfo(&free, &total));
  if (bytes > free) return out_of_memory(what, bytes, free, total);
  return ok_status();
}

uint32_t* CudaDevice::counters() const { return reinterpret_cast<uint32_t*>(counters_.data()); }

PinnedBuffer::PinnedBuffer(PinnedBuffer&& other) noexcept : data_(std::exchange(other.data_, nullptr)) {}

PinnedBuffer& PinnedBuffer::operator=(PinnedBuffer&& other) noexcept {
  std::swap(data_, other.data_);
  return *this;
}

PinnedBuffer::~PinnedBuffer() {
  if (data_ != nullptr && cudaFreeHost(data_) != cudaSuccess) cudaGetLastError();
}

Result<PinnedBuffer> PinnedBuffer::make(size_t bytes, const char* what) {
  const CurrentDevice current;
  PinnedBuffer buffer;
  void* data = nullptr;
  const cudaError_t code = cudaHostAlloc(&data, bytes, cudaHostAllocPortable | cudaHostAllocMapped);
  if (code == cudaErrorMemoryAllocation) {
    cudaGetLastError();
    return Error{ErrorCode::kOutOfMemory, "no pinned memory (" + readable_bytes(bytes) + ") for " + what +
                                              "; end other programs, or raise the limit of locked memory"};
  }
  if (code != cudaSuccess) return cuda_failure(code, "cudaHostAlloc");
  buffer.data_ = static_cast<std::byte*>(data);
  std::memset(data, 0, bytes);
  return buffer;
}

Result<void*> PinnedBuffer::device_data() const {
  const CurrentDevice current;
  void* pointer = nullptr;
  QWEN_CUDA_CHECK(cudaHostGetDevicePointer(&pointer, data_, 0));
  return pointer;
}

}  // namespace qwen
