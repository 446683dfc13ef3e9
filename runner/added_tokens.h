// Finds a tokenizer's added tokens (<|im_start|>, <think>, ...) in text, by the rules of Hugging Face
// `tokenizers`.
#pragma once

#include <array>
#include <cstdint>
#include <functional>
#include <string>
#include <string_view>
#include <unordered_map>
#include <vector>

namespace qwen {

struct AddedToken {
  int64_t id = 0;
  std::string content;
  bool special = false;      // left out of decoded text
  bool normalized = false;   // looked for in normalized text; its content is normalized too
  bool single_word = false;  // only where no word character touches it
  bool lstrip = false;       // takes the white space before it
  bool rstrip = false;       // takes the white space after it
};

// Immutable and thread-safe.
class AddedTokenMatcher {
 public:
  AddedTokenMatcher() = default;
  // Looks for each token's `content`. Of tokens with the same content the first counts; empty ones are never
  // found.
  explicit AddedTokenMatcher(std::vector<AddedToken> tokens);

  // Calls `on_text` for each stretch between tokens and `on_token` for each token, in order. The leftmost
  // token counts, of those the longest. REQUIRES: text is valid UTF-8.
  void split(std::string_view text, const std::function<void(std::string_view)>& on_text,
             const std::function<void(int64_t)>& on_token) const;

 private:
  // The longest token that starts at `position`, or null.
  const AddedToken* match(std::string_view text, size_t position) const;

  std::vector<AddedToken> tokens_;
  std::unordered_map<std::string, size_t> by_content_;
  std::array<std::vector<size_t>, 256> lengths_;  // of the tokens that start with the byte, descending
};

}  // namespace qwen
