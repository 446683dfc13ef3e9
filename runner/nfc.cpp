#include "nfc.h"

#include <utf8proc.h>

#include <algorithm>
#include <vector>

#include "unicode_categories.h"
#include "utf8.h"

namespace qwen {
namespace {

// Appends `text` in NFC. utf8proc supplies the decompositions and the composition; the ordering between them
// is ours, because utf8proc's takes quadratic time on a long run of marks.
void append_composed(std::string_view text, std::vector<utf8proc_int32_t>& buffer, std::string& out) {
  buffer.clear();
  for (size_t i = 0; i < text.size();) {
    const Utf8Char c = utf8_at(text, i);
    utf8proc_int32_t parts[16];  // no canonical decomposition has more than 4
    int boundary = 0;
    const auto count = utf8proc_decompose_char(static_cast<utf8proc_int32_t>(c.code_point), parts, 16,
                                               UTF8PROC_DECOMPOSE, &boundary);
    buffer.insert(buffer.end(), parts, parts + count);
    i += c.length;
  }
  auto combining_class = [](utf8proc_int32_t c) { return utf8proc_get_property(c)->combining_class; };
  for (auto it = buffer.begin(); it != buffer.end();) {
    const auto end = std::find_if(it, buffer.end(), [&](auto c) { return combining_class(c) == 0; });
    std::stable_sort(it, end, [&](auto a, auto b) { return combining_class(a) < combining_class(b); });
    it = end == buffer.end() ? end : end + 1;
  }
  const auto options = static_cast<utf8proc_option_t>(UTF8PROC_COMPOSE | UTF8PROC_STABLE);
  const auto length =
      utf8proc_normalize_utf32(buffer.data(), static_cast<utf8proc_ssize_t>(buffer.size()), options);
  for (utf8proc_ssize_t i = 0; i < length; ++i) append_utf8(static_cast<char32_t>(buffer[i]), out);
}

}  // namespace

bool may_change_in_nfc(std::string_view text) {
  // U+0300 is the first unstable code point; UTF-8 leads it with 0xCC.
  return std::any_of(text.begin(), text.end(), [](char c) { return static_cast<uint8_t>(c) >= 0xCC; });
}

std::string to_nfc(std::string_view text) {
  std::string out;
  out.reserve(text.size());
  std::vector<utf8proc_int32_t> buffer;
  size_t copied = 0;    // text before this is in `out`
  size_t previous = 0;  // where the character before `i` starts
  bool previous_is_base = false;
  for (size_t i = 0; i < text.size();) {
    const Utf8Char c = utf8_at(text, i);
    const CharProperties properties = char_properties(c.code_point);
    if (!properties.is_nfc_unstable()) {
      previous = i;
      previous_is_base = properties.is_nfc_base();
      i += c.length;
      continue;
    }
    // What NFC may change is a run of unstable characters and the base before it. utf8proc sees
    // only characters that are so in the table, so its own Unicode version does not matter.
    const size_t start = previous_is_base ? previous : i;
    while (i < text.size()) {
      const Utf8Char next = utf8_at(text, i);
      if (!char_properties(next.code_point).is_nfc_unstable()) break;
      i += next.length;
    }
    out.append(text.substr(copied, start - copied));
    append_composed(text.substr(start, i - start), buffer, out);
    copied = i;
    previous_is_base = false;
  }
  out.append(text.substr(copied));
  return out;
}

}  // namespace qwen
