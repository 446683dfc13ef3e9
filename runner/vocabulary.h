// A tokenizer's tokens as bytes: by id, and the id by bytes.
//
// Thread-safe once filled.
#pragma once

#include <cstddef>
#include <cstdint>
#include <optional>
#include <string>
#include <string_view>
#include <vector>

namespace qwen {

class Vocabulary {
 public:
  Vocabulary() = default;
  // For at most `searchable` tokens that find() knows.
  explicit Vocabulary(size_t searchable);

  // One more than the largest id.
  size_t size() const { return tokens_.size(); }
  bool contains(uint64_t id) const { return id < tokens_.size() && present_[id]; }
  // Empty if there is no such token. REQUIRES: id < size().
  const std::string& bytes(uint64_t id) const { return tokens_[id]; }

  // Sets the bytes of a token; find() does not know them.
  void put(uint64_t id, std::string bytes);
  // The same, and find(bytes) gives the id. REQUIRES: no more such tokens than announced.
  void put_searchable(uint32_t id, std::string bytes);

  std::optional<uint32_t> find(std::string_view bytes) const;

 private:
  static constexpr uint32_t kEmpty = 0xFFFFFFFF;
  struct Slot {
    uint32_t id = kEmpty;
    uint32_t hash = 0;  // compared before the bytes, which lie elsewhere in memory
  };

  // Where the bytes are, or the empty slot where they would be.
  size_t slot(std::string_view bytes, uint32_t hash) const;

  std::vector<std::string> tokens_;
  std::vector<bool> present_;
  std::vector<Slot> slots_ = std::vector<Slot>(1);  // open addressing, a power of two, at most half full
};

}  // namespace qwen
