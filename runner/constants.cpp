#include "constants.h"

#include <executorch/runtime/core/named_data_map.h>
#include <executorch/runtime/core/tensor_layout.h>

#include <algorithm>
#include <limits>
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
  will_write(index, std::numeric_limits<int64_t>::max());  // any position
  return device_.copy_from_host(where.data(), bytes.data(), bytes.size());
}

void ConstantStore::will_write(int64_t slot, int64_t end) {
  int64_t& written = written_[slot];
  written = std::max(written, end);
}

void ConstantStore::append_runs(const std::string& name, const Tensor& state, int64_t to, const int64_t* from,
                                int64_t positions, std::vector<DeviceRun>& runs) {
  const auto target = slot(state, to);
  const std::byte* const source = from == nullptr ? nullptr : slot(state, *from).data();
  const bool is_cache = state.dim == 4 && (name.ends_with("key_cache") || name.ends_with("value_cache"));
  const auto pieces = static_cast<size_t>(is_cache ? state.sizes[1] : 1);
  const size_t pitch = target.size() / pieces;
  const size_t bytes = is_cache ? pitch / static_cast<size_t>(state.sizes[2]) *
                                      static_cast<size_t>(std::min(positions, state.sizes[2]))
                                : pitch;
  for (size_t piece = 0; piece < pieces && bytes > 0; ++piece) {
    runs.push_back(
        {target.data() + piece * pitch, source == nullptr ? nullptr : source + piece * pitch, bytes});
  }
}

Status ConstantStore::zero_slot(int64_t index) {
  std::vector<DeviceRun> runs;
  for (const auto& [name, tensor] : states_) {
    append_runs(name, *tensor, index, nullptr, written_[index], runs);
  }
  QWEN_RETURN_IF_ERROR(device_.write(runs));
  written_[index] = 0;
  return ok_status();
}

Status ConstantStore::copy_slot(int64_t from, int64_t to) {
  // As far as either was written: what `to` had beyond is zeros again.
  will_write(to, written_[from]);
  std::vector<DeviceRun> runs;
  for (const auto& [name, tensor] : states_) append_runs(name, *tensor, to, &from, written_[to], runs);
  QWEN_RETURN_IF_ERROR(device_.write(runs));
  written_[to] = written_[from];
  return ok_status();
}

}  // namespace qwen
