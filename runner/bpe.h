// Byte-pair encoding of one word: joins neighbours by the merges' rank until no merge applies.
#pragma once

#include <array>
#include <cstddef>
#include <cstdint>
#include <string_view>
#include <vector>

namespace qwen {

// One rule: the neighbours `left` and `right` become `merged`.
struct BpeMerge {
  uint32_t left;
  uint32_t right;
  uint32_t merged;
};

// Immutable and thread-safe; the caller's Scratch belongs to one thread.
class Bpe {
 public:
  // Working memory that one encode leaves for the next.
  class Scratch {
    friend class Bpe;
    struct Symbol {
      uint32_t id;
      uint32_t
          rank;  // of its merge with the next symbol; kNoMerge where there is none, or the symbol is gone
      size_t previous;
      size_t next;
    };
    struct Candidate {
      uint32_t rank;
      uint32_t merged;
      size_t position;
    };
    std::vector<Symbol> symbols_;
    std::vector<Candidate> heap_;
  };

  Bpe() = default;
  // `byte_ids`: the token of each single byte. `merges`: by ascending rank; of two for the same pair the
  // later counts.
  Bpe(const std::array<uint32_t, 256>& byte_ids, const std::vector<BpeMerge>& merges);

  // Appends the tokens of `word`. Takes O(n log n) for n bytes.
  void encode(std::string_view word, Scratch& scratch, std::vector<int64_t>& ids) const;

 private:
  static constexpr uint32_t kNoMerge = 0xFFFFFFFF;
  struct Rule {
    uint64_t pair = ~uint64_t{0};  // left << 32 | right
    uint32_t rank = kNoMerge;
    uint32_t merged = 0;
  };

  // The rule for a pair, or one of rank kNoMerge.
  const Rule& find(uint32_t left, uint32_t right) const { return rules_[slot(uint64_t{left} << 32 | right)]; }
  // Where the pair is, or the empty slot where it would be.
  size_t slot(uint64_t pair) const;
  // Looks up the merge of the symbol at `position` with its next, and notes it as a candidate.
  void propose(size_t position, Scratch& scratch) const;

  std::array<uint32_t, 256> byte_ids_{};
  std::vector<Rule> rules_ = std::vector<Rule>(2);  // open addressing, a power of two, at most half full
  int shift_ = 63;
};

}  // namespace qwen
