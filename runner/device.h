// Device: where a program's tensors lie, and how bytes get there and back: the memory of this process, or a
// GPU's.
//
// Whatever is enqueued happens in the order of the calls; what reads device memory back waits for it. Not
// thread-safe.
#pragma once

#include <cstddef>
#include <cstdint>
#include <memory>
#include <span>
#include <string>

#include "result.h"

namespace qwen {

struct DeviceMemoryUsage {
  uint64_t allocated_bytes = 0;  // by this device object
  uint64_t used_bytes = 0;       // of a GPU, by whomever
  uint64_t total_bytes = 0;      // of a GPU
};

// Bytes of device memory to write: copies of those at `from`, or zeros where that is null.
struct DeviceRun {
  std::byte* to;
  const std::byte* from;
  size_t bytes;
};

class Device {
 public:
  virtual ~Device() = default;

  virtual const std::string& name() const = 0;  // "cpu", or the GPU's own
  // Whether device memory is this process's own, so that mapped files can be read in place.
  virtual bool is_host() const = 0;

  // Memory aligned to 256 bytes, freed by release(); it is not initialized. `what` it is for is said in the
  // error. Error: kOutOfMemory.
  virtual Result<void*> allocate(size_t bytes, const char* what) = 0;
  // The same, zero-filled; pages that are never touched may cost nothing.
  virtual Result<void*> allocate_zeroed(size_t bytes, const char* what) = 0;
  // REQUIRES: `data` came from this device with this size. Waits for what is enqueued and may use it.
  virtual void release(void* data, size_t bytes) = 0;

  virtual Status zero(void* data, size_t bytes) = 0;
  // All of them, in no order, at the cost of a few; none overlaps another's `to`.
  virtual Status write(std::span<const DeviceRun> runs) = 0;
  // `from` may be changed when it returns; `to` is complete when it returns.
  virtual Status copy_from_host(void* to, const void* from, size_t bytes) = 0;
  virtual Status copy_to_host(void* to, const void* from, size_t bytes) = 0;

  virtual DeviceMemoryUsage memory() const = 0;
};

// Memory of a device, freed with it. Movable.
class DeviceBuffer {
 public:
  DeviceBuffer() = default;
  DeviceBuffer(Device* device, void* data, size_t bytes) : device_(device), data_(data), bytes_(bytes) {}
  DeviceBuffer(DeviceBuffer&& other) noexcept;
  DeviceBuffer& operator=(DeviceBuffer&& other) noexcept;
  ~DeviceBuffer();

  // As Device::allocate() and allocate_zeroed(); the device must outlive it.
  static Result<DeviceBuffer> make(Device& device, size_t bytes, const char* what);
  static Result<DeviceBuffer> zeroed(Device& device, size_t bytes, const char* what);

  std::byte* data() const { return static_cast<std::byte*>(data_); }
  size_t size() const { return bytes_; }

 private:
  Device* device_ = nullptr;
  void* data_ = nullptr;
  size_t bytes_ = 0;
};

// The device for programs of target `device`, "cpu" or "cuda"; `folder` is for messages. Error: kUnsupported,
// saying what was found and what is needed.
Result<std::unique_ptr<Device>> open_device(const std::string& device, const std::string& folder);

}  // namespace qwen
