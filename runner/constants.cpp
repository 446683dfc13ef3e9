#include "constants.h"

#include <executorch/runtime/core/named_data_map.h>
#include <executorch/runtime/core/tensor_layout.h>
#include <sys/mman.h>

#include <algorithm>
#include <cstring>
#include <utility>
#include <vector>

namespace qwen {

ConstantStore::Pages::Pages(size_t bytes)
    : data_(::mmap(nullptr, bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0)),
      bytes_(bytes) {
  if (data_ == MAP_FAILED) data_ = nullptr;
}

ConstantStore::Pages::Pages(Pages&& other) noexcept
    : data_(std::exchange(other.data_, nullptr)), bytes_(other.bytes_) {}

ConstantStore::Pages::~Pages() {
  if (data_ != nullptr) ::munmap(data_, bytes_);
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
  auto tensor = Tensor::borrow(const_cast<void*>(bytes->data()), sizes,
                               static_cast<ScalarType>(static_cast<int32_t>(layout->scalar_type())));
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
  Pages pages(bytes);
  if (pages.data() == nullptr) {
    return Error{ErrorCode::kOutOfMemory,
                 "no memory for " + std::to_string(bytes >> 20) +
                     " MiB of state; export with fewer --slots or a smaller --max-seq-len"};
  }
  tensor->storage->data = pages.data();
  memory_.push_back(std::move(pages));
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

void ConstantStore::zero_slot(int64_t index) {
  for (const auto& [name, tensor] : states_) {
    const auto bytes = slot(*tensor, index);
    std::memset(bytes.data(), 0, bytes.size());
  }
}

}  // namespace qwen
