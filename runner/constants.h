// ConstantStore: the one owner of a program's weights and state, keyed by fully qualified name.
//
// Weights are views of the mapped .ptd and are never copied; state is allocated once, zero-filled, with a
// leading slot dimension. Every compiled method binds to these same tensors. Addresses never change. Not
// thread-safe.
#pragma once

#include <cstddef>
#include <cstdint>
#include <map>
#include <memory>
#include <span>
#include <string>
#include <vector>

#include "result.h"
#include "shims/tensor.h"

namespace executorch::runtime {
class NamedDataMap;
}

namespace qwen {

// One tensor that a compiled method is bound to.
struct BoundConstant {
  std::string method;  // "prefill" or "decode"
  std::string name;    // fully qualified name in the exported model
  const void* data;    // where this method reads it
  uint64_t bytes;
  bool is_state;
};

class ConstantStore {
 public:
  // The weight `name`, found in `data` (whose memory must outlive this store). Error: kCorrupt.
  Result<Tensor*> weight(const executorch::runtime::NamedDataMap& data, const std::string& name);
  // The state `name` [S, ...], made at the first call. Errors: kOutOfMemory; kCorrupt if it is known with
  // another shape.
  Result<Tensor*> state(const std::string& name, ScalarType dtype, std::span<const int64_t> sizes);

  // Null if there is no such state.
  const Tensor* find_state(const std::string& name) const;
  // Bytes of one slot of a state tensor.
  static std::span<std::byte> slot(const Tensor& state, int64_t slot);
  // Zero-fills `slot` in every state tensor; by memset, so that nothing of what was there survives, NaN
  // included.
  void zero_slot(int64_t slot);

  uint64_t weight_bytes() const { return weight_bytes_; }
  uint64_t state_bytes() const { return state_bytes_; }

 private:
  // Anonymous pages: zero when first touched, so slots that are never used cost nothing.
  class Pages {
   public:
    explicit Pages(size_t bytes);
    Pages(Pages&& other) noexcept;
    Pages& operator=(Pages&&) = delete;
    ~Pages();
    void* data() const { return data_; }  // null: no memory

   private:
    void* data_;
    size_t bytes_;
  };
  std::map<std::string, std::unique_ptr<Tensor>> weights_;
  std::map<std::string, std::unique_ptr<Tensor>> states_;
  std::vector<Pages> memory_;
  uint64_t weight_bytes_ = 0;
  uint64_t state_bytes_ = 0;
};

}  // namespace qwen
