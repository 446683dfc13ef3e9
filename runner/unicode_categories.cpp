#include "unicode_categories.h"

#include <algorithm>
#include <vector>

namespace qwen {
namespace {

constexpr size_t kCodePoints = 0x110000;

// One byte a code point: 1.1 MB, for one load where a search would take twelve.
std::vector<uint8_t> expand_runs() {
  std::vector<uint8_t> table(kCodePoints);
  for (size_t i = 0; i < kUnicodeRunCount; ++i) {
    const size_t end = i + 1 < kUnicodeRunCount ? kUnicodeRuns[i + 1] >> 8 : kCodePoints;
    std::fill(table.begin() + (kUnicodeRuns[i] >> 8), table.begin() + end, kUnicodeRuns[i] & 0xFF);
  }
  return table;
}

}  // namespace

CharProperties char_properties(char32_t code_point) {
  static const std::vector<uint8_t> table = expand_runs();
  return CharProperties(table[code_point]);
}

}  // namespace qwen
