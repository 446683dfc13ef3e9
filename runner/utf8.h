// UTF-8: reading valid text, and making any bytes valid.
//
// Invalid input is replaced by U+FFFD, one for each maximal subpart (the Unicode standard's recommendation;
// what Python's errors="replace" and Rust's from_utf8_lossy do). Functions are thread-safe; a Utf8Repair
// belongs to one thread.
#pragma once

#include <cstddef>
#include <cstdint>
#include <string>
#include <string_view>

namespace qwen {

struct Utf8Char {
  char32_t code_point;
  size_t length;  // bytes, 1 to 4
};

// The character at `position`. REQUIRES: text is valid UTF-8 and a character starts at position <
// text.size().
Utf8Char utf8_at(std::string_view text, size_t position);

// The character that ends at `end`. REQUIRES: text is valid UTF-8 and a character ends at end > 0.
Utf8Char utf8_before(std::string_view text, size_t end);

// REQUIRES: code_point is no surrogate and < 0x110000.
void append_utf8(char32_t code_point, std::string& out);

std::string replace_invalid_utf8(std::string_view bytes);

// The same for bytes that arrive in pieces: the output never ends within a character.
class Utf8Repair {
 public:
  // Appends to `out` all characters that `bytes` completes.
  void append(std::string_view bytes, std::string& out);
  // Appends U+FFFD if the bytes end within a character, and starts anew.
  void finish(std::string& out);

 private:
  void push(uint8_t byte, std::string& out);

  char pending_[4] = {};  // the character begun
  size_t seen_ = 0;       // its bytes so far
  size_t length_ = 0;     // all its bytes; 0 between characters
  uint8_t low_ = 0x80;    // the range of its next byte
  uint8_t high_ = 0xBF;
};

}  // namespace qwen
