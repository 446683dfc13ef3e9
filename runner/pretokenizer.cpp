#include "pretokenizer.h"

#define PCRE2_CODE_UNIT_WIDTH 8
#include <pcre2.h>

#include <algorithm>
#include <cctype>
#include <utility>

#include "unicode_categories.h"
#include "utf8.h"

namespace qwen {
namespace {

// Without a limit of its own, a match fails only for want of memory. Long runs need many steps of
// backtracking.
constexpr uint32_t kNoLimit = 0xFFFFFFFF;
constexpr size_t kJitStackBytes = size_t{1} << 20;

// By class, then length - 2. Caseless letters, so that `(?i:` sees nothing in them; no space takes four
// bytes.
constexpr std::string_view kRepresentatives[5][3] = {
    {"\u00A7", "\u2020", "\U0001F600"}, {"\u01BB", "\u4E00", "\U00020000"},
    {"\u0301", "\u20D0", "\U0001D165"}, {"\u00B2", "\u2460", "\U0001D7CE"},
    {"\u00A0", "\u2003", "\U0001F600"},
};

// The two characters that fold to ASCII letters when case is ignored: they are classed right by every
// version.
constexpr char32_t kLongS = 0x17F;
constexpr char32_t kKelvinSign = 0x212A;

bool is_alnum(char c) { return std::isalnum(static_cast<unsigned char>(c)) != 0; }
bool is_digit(char c) { return std::isdigit(static_cast<unsigned char>(c)) != 0; }

// Names the first construct of `pattern` for which Oniguruma and PCRE2 differ, or of which class_text does
// not keep the meaning; empty if there is none.
std::string find_unsupported(std::string_view pattern) {
  auto at = [&](size_t i) { return i < pattern.size() ? pattern[i] : '\0'; };
  bool in_class = false;
  for (size_t i = 0; i < pattern.size(); ++i) {
    const char c = pattern[i];
    if (static_cast<uint8_t>(c) >= 0x80) return "a character that is not ASCII";
    if (c == '\\') {
      const std::string_view escape = pattern.substr(i, at(i + 1) == 'p' || at(i + 1) == 'P' ? 5 : 2);
      const auto known = {"\\p{L}", "\\P{L}", "\\p{M}", "\\P{M}", "\\p{N}", "\\P{N}",
                          "\\s",    "\\S",    "\\r",    "\\n",    "\\t"};
      const bool literal = escape.size() == 2 && !is_alnum(escape[1]);
      if (!literal && std::find(known.begin(), known.end(), escape) == known.end())
        return std::string(escape);
      i += escape.size() - 1;
    } else if (in_class) {
      if (c == '[') return "a bracket within brackets";
      if (c == '&' && at(i + 1) == '&') return "&& within brackets";
      in_class = c != ']';
    } else if (c == '[') {
      if (at(i + 1) == '^') ++i;
      if (at(i + 1) == ']') return "a closing bracket as the first of a class";
      in_class = true;
    } else if (c == '^' || c == '$' || c == '.') {
      return std::string(1, c);
    } else if (c == '(' && at(i + 1) == '?') {
      const std::string_view group = pattern.substr(i, 4);
      if (group != "(?i:" && !group.starts_with("(?:") && !group.starts_with("(?!") &&
          !group.starts_with("(?=")) {
        return std::string(group);
      }
      i += group == "(?i:" ? 3 : 2;
    } else if (c == '{') {
      const size_t close = pattern.find('}', i);
      if (!is_digit(at(i + 1)) || close == std::string_view::npos) return "{ that is no repetition";
      i = close;
      if (at(i + 1) == '+' || at(i + 1) == '?') return "a possessive or lazy {n,m}";
    }
  }
  // Where case is ignored, Oniguruma also matches these pairs with one character such as ß.
  for (const std::string_view pair : {"ss", "st", "ff", "fi", "fl"}) {
    if (pattern.find("(?i") != std::string_view::npos && pattern.find(pair) != std::string_view::npos) {
      return std::string(pair).append(" where case is ignored");
    }
  }
  return "";
}

template <typename T, void (*kFree)(T*)>
struct Free {
  void operator()(T* pointer) const { kFree(pointer); }
};
template <typename T, void (*kFree)(T*)>
using Handle = std::unique_ptr<T, Free<T, kFree>>;

using MatchData = Handle<pcre2_match_data, pcre2_match_data_free>;
using MatchContext = Handle<pcre2_match_context, pcre2_match_context_free>;
using JitStack = Handle<pcre2_jit_stack, pcre2_jit_stack_free>;

}  // namespace

struct SplitPattern::Code {
  Handle<pcre2_code, pcre2_code_free> regex;
};

SplitPattern::SplitPattern(std::unique_ptr<Code> code) : code_(std::move(code)) {}
SplitPattern::SplitPattern(SplitPattern&&) noexcept = default;
SplitPattern& SplitPattern::operator=(SplitPattern&&) noexcept = default;
SplitPattern::~SplitPattern() = default;

Result<SplitPattern> SplitPattern::compile(const std::string& pattern) {
  const std::string unsupported = find_unsupported(pattern);
  if (!unsupported.empty()) {
    return Error{ErrorCode::kUnsupported, "a split pattern with " + unsupported + " is not supported"};
  }
  using CompileContext = Handle<pcre2_compile_context, pcre2_compile_context_free>;
  const CompileContext context(pcre2_compile_context_create(nullptr));
  pcre2_set_newline(context.get(), PCRE2_NEWLINE_LF);
  int code = 0;
  PCRE2_SIZE offset = 0;
  auto compiled = std::make_unique<Code>();
  compiled->regex.reset(pcre2_compile(reinterpret_cast<PCRE2_SPTR>(pattern.data()), pattern.size(),
                                      PCRE2_UTF | PCRE2_UCP | PCRE2_NEVER_BACKSLASH_C, &code, &offset,
                                      context.get()));
  if (!compiled->regex) {
    PCRE2_UCHAR text[256] = {};
    pcre2_get_error_message(code, text, sizeof(text));
    return Error{ErrorCode::kCorrupt, "the split pattern is wrong at byte " + std::to_string(offset) + ": " +
                                          reinterpret_cast<const char*>(text)};
  }
  // Where the system forbids compiled code, pcre2_match interprets: slower, with the same results.
  (void)pcre2_jit_compile(compiled->regex.get(), PCRE2_JIT_COMPLETE);
  return SplitPattern(std::move(compiled));
}

void SplitPattern::split(std::string_view subject, const std::function<void(size_t, size_t)>& emit) const {
  const pcre2_code* regex = code_->regex.get();
  const MatchData data(pcre2_match_data_create_from_pattern(regex, nullptr));
  const MatchContext context(pcre2_match_context_create(nullptr));
  JitStack stack;
  pcre2_set_match_limit(context.get(), kNoLimit);
  pcre2_set_depth_limit(context.get(), kNoLimit);
  pcre2_set_heap_limit(context.get(), kNoLimit);
  const PCRE2_SIZE* bounds = pcre2_get_ovector_pointer(data.get());

  size_t emitted = 0;
  size_t from = 0;
  while (from < subject.size()) {
    auto match = [&](uint32_t options) {
      return pcre2_match(regex, reinterpret_cast<PCRE2_SPTR>(subject.data()), subject.size(), from,
                         PCRE2_NO_UTF_CHECK | options, data.get(), context.get());
    };
    int found = match(0);
    if (found == PCRE2_ERROR_JIT_STACKLIMIT && !stack) {
      stack.reset(pcre2_jit_stack_create(kJitStackBytes, kJitStackBytes, nullptr));
      pcre2_jit_stack_assign(context.get(), nullptr, stack.get());
      found = match(0);
    }
    if (found == PCRE2_ERROR_JIT_STACKLIMIT) found = match(PCRE2_NO_JIT);
    if (found < 0) break;
    if (bounds[0] > emitted) emit(emitted, bounds[0] - emitted);
    if (bounds[1] > bounds[0]) emit(bounds[0], bounds[1] - bounds[0]);
    emitted = bounds[1];
    // An empty match takes nothing: the search goes on behind the next character.
    from = bounds[1];
    if (bounds[0] == bounds[1]) from += from < subject.size() ? utf8_at(subject, from).length : 1;
  }
  if (emitted < subject.size()) emit(emitted, subject.size() - emitted);
}

std::string class_text(std::string_view text) {
  std::string out;
  out.reserve(text.size());
  for (size_t i = 0; i < text.size();) {
    const Utf8Char c = utf8_at(text, i);
    if (c.length == 1 || c.code_point == kLongS || c.code_point == kKelvinSign) {
      out.append(text.substr(i, c.length));
    } else {
      const auto char_class = static_cast<size_t>(char_properties(c.code_point).char_class());
      out.append(kRepresentatives[char_class][c.length - 2]);
    }
    i += c.length;
  }
  return out;
}

}  // namespace qwen
