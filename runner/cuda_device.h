// CudaDevice: the first GPU that CUDA shows this process, and the one stream on which a program runs there.
#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>
#include <memory>
#include <span>
#include <string>

#include "device.h"

namespace qwen {

// While it lives, the GPU of cuda programs is this thread's current device, whichever the caller has; memory
// is taken from the current device, and kernels run on it alone.
class CurrentDevice {
 public:
  CurrentDevice();
  ~CurrentDevice();
  CurrentDevice(const CurrentDevice&) = delete;
  CurrentDevice& operator=(const CurrentDevice&) = delete;

 private:
  int previous_ = 0;
};

// Its functions make it the current device for as long as they take.
class CudaDevice final : public Device {
 public:
  // Checks driver and GPU against what this was built for. `folder` is the program's, for messages. Error:
  // kUnsupported.
  static Result<std::unique_ptr<CudaDevice>> open(const std::string& folder);
  ~CudaDevice() override;

  const std::string& name() const override { return name_; }
  bool is_host() const override { return false; }
  Result<void*> allocate(size_t bytes, const char* what) override;
  Result<void*> allocate_zeroed(size_t bytes, const char* what) override;
  void release(void* data, size_t bytes) override;
  Status zero(void* data, size_t bytes) override;
  Status write(std::span<const DeviceRun> runs) override;
  Status copy_from_host(void* to, const void* from, size_t bytes) override;
  Status copy_to_host(void* to, const void* from, size_t bytes) override;
  DeviceMemoryUsage memory() const override;

  // Waits for all that is enqueued.
  Status synchronize();

  // Error: kOutOfMemory, where `bytes` (for `what`, in words) are not free now.
  Status require_free(uint64_t bytes, const std::string& what) const;

  cudaStream_t stream() const { return stream_; }
  uint32_t* counters() const;  // for CudaScope

 private:
  explicit CudaDevice(std::string name) : name_(std::move(name)) {}

  std::string name_;
  cudaStream_t stream_ = nullptr;
  uint64_t allocated_ = 0;
  DeviceBuffer counters_;
};

// Memory of this process that the GPU can reach at device_data(). Movable.
class PinnedBuffer {
 public:
  PinnedBuffer() = default;
  PinnedBuffer(PinnedBuffer&& other) noexcept;
  PinnedBuffer& operator=(PinnedBuffer&& other) noexcept;
  ~PinnedBuffer();

  // Zero-filled. Error: kOutOfMemory.
  static Result<PinnedBuffer> make(size_t bytes, const char* what);

  std::byte* data() const { return data_; }
  Result<void*> device_data() const;

 private:
  std::byte* data_ = nullptr;
};

// Whether kernels compiled for `architectures`, CMake's names with spaces between them ("80-real 90a-real
// 100"), run on compute capability `capability` (90 for 9.0): compiled for it or for an earlier one of its
// major version, or PTX for any earlier one.
bool covers_architecture(const std::string& architectures, int capability);

}  // namespace qwen
