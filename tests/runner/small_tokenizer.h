// A tokenizer.json small enough to see through: a token for each byte, a few merges, three added tokens.
#pragma once

#include <nlohmann/json.hpp>
#include <string>
#include <utility>

#include "byte_alphabet.h"
#include "tokenizer.h"

namespace qwen {

// Token `i` is the byte i. 256 "he", 257 "ll", 258 "hell", 259 "hello", 260 "aa", 261 "aaaa", 262 the first
// two bytes of the emoji U+1F600, 263 <|end|> (special), 264 <think>, 265 <think>2.
inline nlohmann::json small_tokenizer_json() {
  using nlohmann::json;
  json vocab = json::object();
  json merges = json::array();
  auto spelled = [](const std::string& bytes) {
    std::string out;
    for (const char c : bytes) out += byte_to_alphabet(static_cast<uint8_t>(c));
    return out;
  };
  for (int byte = 0; byte < 256; ++byte) vocab[byte_to_alphabet(static_cast<uint8_t>(byte))] = byte;
  for (const auto& [left, right] : {std::pair<std::string, std::string>{"h", "e"},
                                    {"l", "l"},
                                    {"he", "ll"},
                                    {"hell", "o"},
                                    {"a", "a"},
                                    {"aa", "aa"},
                                    {"\xF0", "\x9F"}}) {
    vocab[spelled(left + right)] = vocab.size();
    merges.push_back({spelled(left), spelled(right)});
  }
  auto added = [](int id, const std::string& content, bool special) {
    return json{{"id", id}, {"content", content}, {"special", special}, {"normalized", false}};
  };
  const json split = {
      {"type", "Split"},
      {"pattern", {{"Regex", R"([^\r\n\p{L}\p{N}]?[\p{L}\p{M}]+|\p{N}| ?[^\s\p{L}\p{M}\p{N}]+|\s+)"}}},
      {"behavior", "Isolated"},
      {"invert", false}};
  const json byte_level = {{"type", "ByteLevel"}, {"add_prefix_space", false}, {"use_regex", false}};
  return {{"version", "1.0"},
          {"added_tokens",
           {added(263, "<|end|>", true), added(264, "<think>", false), added(265, "<think>2", false)}},
          {"normalizer", {{"type", "NFC"}}},
          {"pre_tokenizer", {{"type", "Sequence"}, {"pretokenizers", {split, byte_level}}}},
          {"post_processor", nullptr},
          {"decoder", {{"type", "ByteLevel"}}},
          {"model", {{"type", "BPE"}, {"vocab", vocab}, {"merges", merges}}}};
}

// REQUIRES: the file is right; otherwise the test ends here.
inline Tokenizer load_tokenizer(const nlohmann::json& file) {
  return Tokenizer::from_json(file.dump(), "tokenizer.json").value();
}

}  // namespace qwen
