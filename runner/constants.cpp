#include "constants.h"

#include <executorch/runtime/core/named_data_map.h>
#include <executorch/runtime/core/tensor_layout.h>

#include <algorithm>
#include <utility>
#include <vector>

namespace qwen {

Status ConstantStore::reserve_weights(std::span<const std::byte> file) {
  if (device_.is_host() || file.empty()) return ok_status();
  file_ = file.data();
  QWEN_ASSIGN_OR_RETURN(memory_of_weights_, DeviceBuffer::make(device_, file.size(), "the weights"));
  return ok_status();
}

Result<Tensor*> ConstantStore::weight(const executorch::runtime::NamedDataMap& data,
                                      const std::string& name) {
  if (const auto known = weights_.find(name); known != weights_.end()) return known->second.get();
  const auto layout = data.get_tensor_layout(name);
  auto bytes = data.get_data(name);
  if (!layout.ok() || !bytes.ok()) {
    return Error{ErrorCode::kCorrupt, "the program's weights lack " + name + "; export the checkpoint again"};
  }
  std::vector<int64_t> sizes(layout->sizes().begin(), layout->sizes().end());
  // Nothing writes to a weight; the handle's interface is what asks for a mutable pointer. The data map keeps
  // ownership of mapped memory, and `bytes` frees nothing when it goes.
  void* where = const_cast<void*>(bytes->data());
  if (file_ != nullptr) {
    // At the same offset, whose alignment it keeps.
    where = memory_of_weights_.data() + (static_cast<const std::byte*>(bytes->data()) - file_);
  }
  auto tensor =
      Tensor::borrow(where, sizes, static_cast<ScalarType>(static_cast<int32_t>(layout->scalar_type())));
  if (tensor == nullptr || tensor->storage->bytes != bytes->size()) {
    return Error{ErrorCode::kCorrupt, "the program's weight " + name + " has an impossible shape"};
  }
  weight_bytes_ += bytes->size();
  return (weights_[name] = std::move(tensor)).get();
}

Result<Tensor*> ConstantStore::state(const std::string& name, ScalarType dtype,
                                     std::span<const int64_t> sizes) {
  if (const auto known = states_.find(name); known != states_.end()) {
    const Tensor& tensor = *known->second;
    if (tensor.dtype != dtype || !std::ranges::equal(std::span(tensor.sizes).first(tensor.dim), sizes)) {
      return Error{ErrorCode::kCorrupt, "the program's methods disagree on the state " + name};
    }
    return known->second.get();
  }
  auto tensor = Tensor::borrow(nullptr, sizes, dtype);
  if (tensor == nullptr || sizes.empty() ||
      std::ranges::any_of(sizes, [](int64_t size) { return size <= 0; })) {
    return Error{ErrorCode::kCorrupt, "the program's state " + name + " has an impossible shape"};
  }
  const size_t bytes = tensor->storage->bytes;
  QWEN_ASSIGN_OR_RETURN(DeviceBuffer memory, DeviceBuffer::zeroed(device_, bytes, "the state"));
  tensor->storage->data = memory.data();
  memory_of_states_.push_back(std::move(memory));
  state_bytes_ += bytes;
  return (states_[name] = std::move(tensor)).get();
}

const Tensor* ConstantStore::find_state(const std::string& name) const {
  const auto found = states_.find(name);
  return found == states_.end() ? nullptr : found->second.get();
}

std::span<std::byte> ConstantStore::slot(const Tensor& state, int64_t slot) {
  const size_t bytes = state.storage->bytes / static_cast<size_t>(state.sizes[0]);
  return {state.as<std::byte>() + static_cast<size_t>(slot) * bytes, bytes};
}

Result<std::span<std::byte>> ConstantStore::find_slot(const std::string& name, int64_t index) const {
  const Tensor* state = find_state(name);
  if (state == nullptr) return Error{ErrorCode::kNotFound, "the program has no state " + name};
  return slot(*state, index);
}

Result<std::vector<std::byte>> ConstantStore::read_state(const std::string& name, int64_t index) {
  QWEN_ASSIGN_OR_RETURN(const auto where, find_slot(name, index));
  std::vector<std::byte> bytes(where.size());
  QWEN_RETURN_IF_ERROR(device_.copy_to_host(bytes.data(), where.data(), bytes.size()));
  return bytes;
}

Status ConstantStore::write_state(const std::string& name, int64_t index, std::span<const std::byte> bytes) {
  QWEN_ASSIGN_OR_RETURN(const auto where, find_slot(name, index));
  if (bytes.size() != where.size()) {
    return Error{ErrorCode::kInvalidArgument, "the state " + name + " has " + std::to_string(where.size()) +
                                                  " bytes a slot, not " + std::to_string(bytes.size())};
  }
  return device_.copy_from_host(where.data(), bytes.data(), bytes.size());
}

Status ConstantStore::zero_slot(int64_t index) {
  for (const auto& [name, tensor] : states_) {
    const auto bytes = slot(*tensor, index);
    QWEN_RETURN_IF_ERROR(device_.zero(bytes.data(), bytes.size()));
  }
  return ok_status();
}

Status ConstantStore::copy_slot(int64_t from, int64_t to) {
  for (const auto& [name, tensor] : states_) {
    const auto source = slot(*tensor, from);
    QWEN_RETURN_IF_ERROR(device_.copy(slot(*tensor, to).data(), source.data(), source.size()));
  }
  return ok_status();
}

}  // namespace qwen
