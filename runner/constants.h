// ConstantStore: the one owner of a program's weights and state, keyed by fully qualified name.
//
// Where the device is the host, weights are views of the mapped .ptd and are never copied; on a GPU the file
// lies once in its memory. State is allocated once, zero-filled, with a leading slot dimension. Every
// compiled method binds to these same tensors. Addresses never change. Not thread-safe.
//
// The states whose names end with key_cache or value_cache are [S, H, L, D]: a step writes the positions of
// its tokens alone, along L. Those after the last that was written are zeros, and need not be zeroed.
#pragma once

#include <cstddef>
#include <cstdint>
#include <map>
#include <memory>
#include <span>
#include <string>
#include <vector>

#include "device.h"
#include "result.h"
#include "shims/tensor.h"

namespace executorch::runtime {
class NamedDataMap;
}

namespace qwen {

// One tensor that a compiled method is bound to.
struct BoundConstant {
  std::string method;  // "prefill", "decode" or "decode_batch"
  std::string name;    // fully qualified name in the exported model
  const void* data;    // where this method reads it
  uint64_t bytes;
  bool is_state;
};

class ConstantStore {
 public:
  // `device` must outlive the store.
  explicit ConstantStore(Device& device) : device_(device) {}

  // Makes room on a GPU for the weights file, whose bytes `file` are mapped; upload_weights() fills it before
  // the first run. Does nothing where the file is read in place. Error: kOutOfMemory.
  Status reserve_weights(std::span<const std::byte> file);
  // That room; empty where the file is read in place.
  std::span<std::byte> weights_memory() const {
    return {memory_of_weights_.data(), memory_of_weights_.size()};
  }

  // The weight `name`, found in `data` (whose memory must outlive this store). Error: kCorrupt.
  Result<Tensor*> weight(const executorch::runtime::NamedDataMap& data, const std::string& name);
  // The state `name` [S, ...], made at the first call. Errors: kOutOfMemory; kCorrupt if it is known with
  // another shape.
  Result<Tensor*> state(const std::string& name, ScalarType dtype, std::span<const int64_t> sizes);

  // Null if there is no such state.
  const Tensor* find_state(const std::string& name) const;
  // This slot's bytes of the state `name`, copied. Error: kNotFound.
  Result<std::vector<std::byte>> read_state(const std::string& name, int64_t slot);
  // Overwrites them. Errors: kNotFound, kInvalidArgument (another size).
  Status write_state(const std::string& name, int64_t slot, std::span<const std::byte> bytes);
  // Says that a step is going to write positions of `slot` before `end`.
  void will_write(int64_t slot, int64_t end);
  // Zero-fills `slot` in every state tensor; written over, so that nothing of what was there survives, NaN
  // included.
  Status zero_slot(int64_t slot);
  // Copies slot `from` of every state tensor over slot `to`.
  Status copy_slot(int64_t from, int64_t to);

  uint64_t weight_bytes() const { return weight_bytes_; }
  uint64_t state_bytes() const { return state_bytes_; }

 private:
  static std::span<std::byte> slot(const Tensor& state, int64_t slot);
  Result<std::span<std::byte>> find_slot(const std::string& name, int64_t slot) const;
  // Appends where the first `positions` of a slot are: of a cache a run for each head, else the whole slot.
  static void append_runs(const std::string& name, const Tensor& state, int64_t to, const int64_t* from,
                          int64_t positions, std::vector<DeviceRun>& runs);

  Device& device_;
  const std::byte* file_ = nullptr;  // where the weights file is mapped, if it was copied
  DeviceBuffer memory_of_weights_;
  std::vector<DeviceBuffer> memory_of_states_;
  std::map<std::string, std::unique_ptr<Tensor>> weights_;
  std::map<std::string, std::unique_ptr<Tensor>> states_;
  std::map<int64_t, int64_t> written_;  // by slot: positions that may not be zeros
  uint64_t weight_bytes_ = 0;
  uint64_t state_bytes_ = 0;
};

}  // namespace qwen
