#include "vocabulary.h"

#include <bit>
#include <functional>
#include <utility>

namespace qwen {
namespace {

uint32_t hash_of(std::string_view bytes) {
  return static_cast<uint32_t>(std::hash<std::string_view>()(bytes));
}

}  // namespace

Vocabulary::Vocabulary(size_t searchable) : slots_(std::bit_ceil(2 * searchable + 1)) {}

void Vocabulary::put(uint64_t id, std::string bytes) {
  if (id >= tokens_.size()) {
    tokens_.resize(id + 1);
    present_.resize(id + 1);
  }
  tokens_[id] = std::move(bytes);
  present_[id] = true;
}

void Vocabulary::put_searchable(uint32_t id, std::string bytes) {
  const uint32_t hash = hash_of(bytes);
  slots_[slot(bytes, hash)] = {id, hash};
  put(id, std::move(bytes));
}

std::optional<uint32_t> Vocabulary::find(std::string_view bytes) const {
  const Slot& found = slots_[slot(bytes, hash_of(bytes))];
  return found.id == kEmpty ? std::nullopt : std::optional<uint32_t>(found.id);
}

size_t Vocabulary::slot(std::string_view bytes, uint32_t hash) const {
  const size_t mask = slots_.size() - 1;
  size_t i = hash & mask;
  while (slots_[i].id != kEmpty && (slots_[i].hash != hash || tokens_[slots_[i].id] != bytes))
    i = (i + 1) & mask;
  return i;
}

}  // namespace qwen
