// DeviceArena: an Arena in a device's memory, for temporaries of runs whose kernels are enqueued.
//
// A run takes and gives back the same sizes in the same order as the last one of its shape, so it gets the
// same addresses; and since all of them run on one stream, memory given back while kernels still use it goes
// to kernels that come after those. Memory grows with the largest run and not with the number of shapes:
// blocks are cut from regions, best fit first, and regions that many growing runs left behind are put
// together between runs. Not thread-safe.
#pragma once

#include <cstddef>
#include <cstdint>
#include <optional>
#include <vector>

#include "device.h"
#include "result.h"
#include "shims/tensor.h"

namespace qwen {

class DeviceArena final : public Arena {
 public:
  // `what` its memory is for is said in errors; both must outlive it.
  DeviceArena(Device& device, const char* what);
  ~DeviceArena() override;

  void* allocate(size_t bytes) override;
  void release(void* data, size_t bytes) override;

  // Between two runs: puts regions together where they hold much more than any run had in use at once.
  void begin_run();
  // Gives back the memory of regions that hold no block; nothing once the addresses are kept.
  void trim();
  // From now on regions stay where they are: a graph knows their addresses.
  void keep_addresses() { fixed_ = true; }

  // Why allocate() last returned null; taking it clears it.
  std::optional<Error> take_error();
  uint64_t capacity() const { return capacity_; }  // in bytes
  // How often memory was taken or given back. A run in which it stays the same can be repeated without
  // either.
  uint64_t changes() const { return changes_; }

 private:
  struct Segment {
    size_t offset;
    size_t bytes;
    bool free;
  };
  struct Region {
    DeviceBuffer memory;
    std::vector<Segment> segments;  // by offset, without gaps; no two free ones side by side
  };

  void* take(size_t bytes);
  bool add_region(size_t bytes);
  bool drop_empty_regions();  // whether there were any

  Device& device_;
  const char* what_;
  std::vector<Region> regions_;
  uint64_t capacity_ = 0;
  uint64_t live_ = 0;
  uint64_t peak_ = 0;  // of live_, over all runs
  // What begin_run() last put together: for which peak, and to what size.
  uint64_t joined_peak_ = 0;
  uint64_t settled_ = 0;
  uint64_t changes_ = 0;
  bool fixed_ = false;
  std::optional<Error> error_;
};

}  // namespace qwen
