// The alphabet of byte-level BPE (GPT-2's): how tokenizer.json writes each byte as a printable character.
// Thread-safe.
#pragma once

#include <cstdint>
#include <optional>
#include <string>
#include <string_view>

namespace qwen {

// The character that stands for `byte`, in UTF-8: "A" for 'A', "Ġ" for a space.
std::string byte_to_alphabet(uint8_t byte);

// The bytes that a token of the file stands for; nothing if it has a character outside the alphabet.
// REQUIRES: token is valid UTF-8.
std::optional<std::string> alphabet_to_bytes(std::string_view token);

}  // namespace qwen
