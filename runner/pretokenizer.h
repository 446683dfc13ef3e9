// Cuts text into the words that BPE merges within: the `pre_tokenizer` of a tokenizer.json.
//
// Supported: Split by a regular expression (behavior Isolated), ByteLevel, and sequences of them. The pattern
// runs in PCRE2, but on a copy of the text in which every non-ASCII character stands as one of the same class
// and length that all Unicode versions agree on. So the words are those of Hugging Face `tokenizers` whatever
// tables PCRE2 has.
#pragma once

#include <functional>
#include <memory>
#include <string>
#include <string_view>

#include "result.h"

namespace qwen {

// One compiled split pattern. Immutable and thread-safe; move-only.
class SplitPattern {
 public:
  // `pattern` is in Oniguruma's Ruby syntax. What PCRE2 could read otherwise than Oniguruma is kUnsupported;
  // what no one can read is kCorrupt. The message names the pattern's part, not the file.
  static Result<SplitPattern> compile(const std::string& pattern);

  SplitPattern(SplitPattern&&) noexcept;
  SplitPattern& operator=(SplitPattern&&) noexcept;
  ~SplitPattern();

  // Calls `emit(offset, length)` for each match and each stretch between matches, in order: together they are
  // all of [0, subject.size()). A match that fails for want of memory leaves the rest as one piece; no text
  // is ever lost. REQUIRES: subject = class_text(text) for some valid UTF-8 text, or a part of it between
  // characters.
  void split(std::string_view subject, const std::function<void(size_t, size_t)>& emit) const;

 private:
  struct Code;
  explicit SplitPattern(std::unique_ptr<Code> code);
  std::unique_ptr<Code> code_;
};

// `text` with every non-ASCII character replaced by its class's representative of the same length in bytes.
// REQUIRES: text is valid UTF-8.
std::string class_text(std::string_view text);

}  // namespace qwen
