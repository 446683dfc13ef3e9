#include "device.h"

#include <sys/mman.h>

#include <cstring>
#include <utility>

#ifdef QWEN_CUDA
#include "cuda_device.h"
#endif

namespace qwen {
namespace {

// Anonymous pages: zero when first touched, so slots that are never used cost nothing.
class HostDevice final : public Device {
 public:
  const std::string& name() const override { return name_; }
  bool is_host() const override { return true; }

  Result<void*> allocate(size_t bytes, const char* what) override { return allocate_zeroed(bytes, what); }
  Result<void*> allocate_zeroed(size_t bytes, const char* what) override {
    void* data = ::mmap(nullptr, bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (data == MAP_FAILED) {
      return Error{ErrorCode::kOutOfMemory, "no memory for " + std::to_string(bytes >> 20) + " MiB of " +
                                                what +
                                                "; export with fewer --slots or a smaller --max-seq-len"};
    }
    allocated_ += bytes;
    return data;
  }
  void release(void* data, size_t bytes) override {
    ::munmap(data, bytes);
    allocated_ -= bytes;
  }

  Status zero(void* data, size_t bytes) override {
    std::memset(data, 0, bytes);
    return ok_status();
  }
  Status write(std::span<const DeviceRun> runs) override {
    for (const DeviceRun& run : runs) {
      if (run.from == nullptr) {
        std::memset(run.to, 0, run.bytes);
      } else {
        std::memcpy(run.to, run.from, run.bytes);
      }
    }
    return ok_status();
  }
  Status copy_from_host(void* to, const void* from, size_t bytes) override {
    std::memcpy(to, from, bytes);
    return ok_status();
  }
  Status copy_to_host(void* to, const void* from, size_t bytes) override {
    return copy_from_host(to, from, bytes);
  }

  DeviceMemoryUsage memory() const override { return {.allocated_bytes = allocated_}; }

 private:
  const std::string name_ = "cpu";
  uint64_t allocated_ = 0;
};

}  // namespace

DeviceBuffer::DeviceBuffer(DeviceBuffer&& other) noexcept
    : device_(std::exchange(other.device_, nullptr)), data_(other.data_), bytes_(other.bytes_) {}

DeviceBuffer& DeviceBuffer::operator=(DeviceBuffer&& other) noexcept {
  std::swap(device_, other.device_);
  std::swap(data_, other.data_);
  std::swap(bytes_, other.bytes_);
  return *this;
}

DeviceBuffer::~DeviceBuffer() {
  if (device_ != nullptr) device_->release(data_, bytes_);
}

Result<DeviceBuffer> DeviceBuffer::make(Device& device, size_t bytes, const char* what) {
  QWEN_ASSIGN_OR_RETURN(void* data, device.allocate(bytes, what));
  return DeviceBuffer(&device, data, bytes);
}

Result<DeviceBuffer> DeviceBuffer::zeroed(Device& device, size_t bytes, const char* what) {
  QWEN_ASSIGN_OR_RETURN(void* data, device.allocate_zeroed(bytes, what));
  return DeviceBuffer(&device, data, bytes);
}

Result<std::unique_ptr<Device>> open_device(const std::string& device, const std::string& folder) {
  if (device == "cpu") return std::unique_ptr<Device>(std::make_unique<HostDevice>());
#ifdef QWEN_CUDA
  if (device == "cuda") {
    QWEN_ASSIGN_OR_RETURN(auto cuda, CudaDevice::open(folder));
    return std::unique_ptr<Device>(std::move(cuda));
  }
  constexpr const char* kTargets = "cpu and cuda";
#else
  if (device == "cuda") {
    return Error{ErrorCode::kUnsupported, folder +
                                              " is a cuda program, this runner was built without "
                                              "CUDA; install the CUDA toolkit and build it "
                                              "again, or export with --target cpu"};
  }
  constexpr const char* kTargets = "cpu";
#endif
  return Error{ErrorCode::kUnsupported, folder + " is a program for " + device +
                                            ", this runner runs programs for " + kTargets +
                                            "; export the checkpoint again"};
}

}  // namespace qwen
