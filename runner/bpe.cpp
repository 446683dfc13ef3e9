#include "bpe.h"

#include <algorithm>
#include <bit>

namespace qwen {
namespace {

constexpr size_t kNone = ~size_t{0};

// Heap order: the lowest rank first, the leftmost among equals.
struct Later {
  template <typename Candidate>
  bool operator()(const Candidate& a, const Candidate& b) const {
    return a.rank != b.rank ? a.rank > b.rank : a.position > b.position;
  }
};

}  // namespace

Bpe::Bpe(const std::array<uint32_t, 256>& byte_ids, const std::vector<BpeMerge>& merges)
    : byte_ids_(byte_ids) {
  const size_t capacity = std::bit_ceil(std::max<size_t>(2, 2 * merges.size()));
  rules_.assign(capacity, Rule{});
  shift_ = 64 - std::countr_zero(capacity);
  for (size_t rank = 0; rank < merges.size(); ++rank) {
    const uint64_t pair = uint64_t{merges[rank].left} << 32 | merges[rank].right;
    rules_[slot(pair)] = Rule{pair, static_cast<uint32_t>(rank), merges[rank].merged};
  }
}

size_t Bpe::slot(uint64_t pair) const {
  const size_t mask = rules_.size() - 1;
  size_t i = (pair * 0x9E3779B97F4A7C15u) >> shift_;
  while (rules_[i].pair != pair && rules_[i].rank != kNoMerge) i = (i + 1) & mask;
  return i;
}

void Bpe::propose(size_t position, Scratch& scratch) const {
  auto& symbol = scratch.symbols_[position];
  symbol.rank = kNoMerge;
  if (symbol.next == kNone) return;
  const Rule& rule = find(symbol.id, scratch.symbols_[symbol.next].id);
  if (rule.rank == kNoMerge) return;
  symbol.rank = rule.rank;
  scratch.heap_.push_back({rule.rank, rule.merged, position});
  std::push_heap(scratch.heap_.begin(), scratch.heap_.end(), Later());
}

void Bpe::encode(std::string_view word, Scratch& scratch, std::vector<int64_t>& ids) const {
  auto& symbols = scratch.symbols_;
  symbols.clear();
  scratch.heap_.clear();
  for (size_t i = 0; i < word.size(); ++i) {
    symbols.push_back({byte_ids_[static_cast<uint8_t>(word[i])], kNoMerge, i == 0 ? kNone : i - 1,
                       i + 1 == word.size() ? kNone : i + 1});
  }
  for (size_t i = 0; i < symbols.size(); ++i) propose(i, scratch);

  while (!scratch.heap_.empty()) {
    std::pop_heap(scratch.heap_.begin(), scratch.heap_.end(), Later());
    const Scratch::Candidate best = scratch.heap_.back();
    scratch.heap_.pop_back();
    auto& symbol = symbols[best.position];
    if (symbol.rank != best.rank) continue;  // one of the two was merged otherwise since
    auto& absorbed = symbols[symbol.next];
    symbol.id = best.merged;
    symbol.next = absorbed.next;
    absorbed.rank = kNoMerge;
    if (symbol.next != kNone) symbols[symbol.next].previous = best.position;
    propose(best.position, scratch);
    if (symbol.previous != kNone) propose(symbol.previous, scratch);
  }
  for (size_t i = symbols.empty() ? kNone : 0; i != kNone; i = symbols[i].next) ids.push_back(symbols[i].id);
}

}  // namespace qwen
