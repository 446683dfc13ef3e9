// Tokens in, text out, piece by piece, as it becomes certain.
//
// Never emits half a UTF-8 character, and holds back what may be the start of a stop string. The pieces
// joined are Tokenizer::decode of all tokens, up to the stop string. Not thread-safe: one stream belongs to
// one answer.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

#include "tokenizer.h"
#include "utf8.h"

namespace qwen {

class TextStream {
 public:
  // `tokenizer` must outlive the stream. Empty stop strings never match; invalid UTF-8 in one is read as
  // U+FFFD.
  TextStream(const Tokenizer& tokenizer, const std::vector<std::string>& stop_strings,
             bool skip_special = true);

  // Takes the next token and returns the text that is now safe to emit, which may be empty, and always is
  // once stopped().
  std::string push(int64_t token);

  // The rest at the end: what was held back, and U+FFFD for a character that was never completed. Empty if
  // stopped().
  std::string finish();

  // True once a stop string was met. The first to be complete counts, of those the longest; neither its text
  // nor what follows is emitted.
  bool stopped() const { return stopped_; }

 private:
  // A stop string and how much of it the text ends with (Knuth-Morris-Pratt).
  struct Stop {
    std::string text;
    std::vector<size_t> fallback;  // by matched length: the next shorter length that may go on
    size_t matched = 0;
  };

  // Looks for stop strings in the held text from `from` on, and returns what no longer needs to be held.
  std::string scan(size_t from);

  const Tokenizer& tokenizer_;
  const bool skip_special_;
  std::vector<Stop> stops_;
  Utf8Repair repair_;
  std::string held_;
  bool stopped_ = false;
};

}  // namespace qwen
