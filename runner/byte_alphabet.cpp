#include "byte_alphabet.h"

#include <array>

#include "utf8.h"

namespace qwen {
namespace {

// Printable Latin-1 stands for itself; the other 68 bytes take the characters from U+0100 on, in order.
struct Alphabet {
  std::array<char32_t, 256> characters{};
  std::array<int16_t, 0x144> bytes{};  // -1: no byte

  Alphabet() {
    bytes.fill(-1);
    char32_t next = 0x100;
    for (char32_t byte = 0; byte < 256; ++byte) {
      const bool printable = (byte >= 0x21 && byte <= 0x7E) || (byte >= 0xA1 && byte <= 0xAC) || byte >= 0xAE;
      characters[byte] = printable ? byte : next++;
      bytes[characters[byte]] = static_cast<int16_t>(byte);
    }
  }
};

const Alphabet& alphabet() {
  static const Alphabet instance;
  return instance;
}

}  // namespace

std::string byte_to_alphabet(uint8_t byte) {
  std::string out;
  append_utf8(alphabet().characters[byte], out);
  return out;
}

std::optional<std::string> alphabet_to_bytes(std::string_view token) {
  const auto& table = alphabet().bytes;
  std::string out;
  for (size_t i = 0; i < token.size();) {
    const Utf8Char c = utf8_at(token, i);
    if (c.code_point >= table.size() || table[c.code_point] < 0) return std::nullopt;
    out.push_back(static_cast<char>(table[c.code_point]));
    i += c.length;
  }
  return out;
}

}  // namespace qwen
