// Stripping text as Python does, which is what chat templates mean by "trim". Pure functions, safe on any
// thread.
#pragma once

#include <string_view>

namespace qwen {

enum class Strip {
  kNone,
  kNewlines,    // "\n" alone
  kWhitespace,  // all that Python's str.strip() cuts: Unicode's white space and U+001C to U+001F
};

// `text` (UTF-8) without what `strip` cuts from its left end, or from both ends: a part of the same bytes.
std::string_view strip_left(std::string_view text, Strip strip);
std::string_view strip_both(std::string_view text, Strip strip);

}  // namespace qwen
