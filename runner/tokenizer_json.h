// What a tokenizer needs from a Hugging Face tokenizer.json, checked.
#pragma once

#include <array>
#include <cstdint>
#include <string>
#include <string_view>
#include <vector>

#include "added_tokens.h"
#include "bpe.h"
#include "result.h"
#include "vocabulary.h"

namespace qwen {

struct TokenizerJson {
  bool nfc = false;                         // the normalizer is NFC; else there is none
  std::vector<std::string> split_patterns;  // each applied to the pieces of the one before
  std::vector<AddedToken> added_tokens;     // contents normalized where the token is
  Vocabulary vocabulary;                    // added tokens too, but only the model's own are searchable
  std::array<uint32_t, 256> byte_ids{};     // the token of each single byte
  std::vector<BpeMerge> merges;             // by ascending rank
  bool ignore_merges = false;               // a word that is a token needs no merges
};

// Reads byte-level BPE: normalizer NFC or none; pre-tokenizers Split and ByteLevel; model BPE with a token
// for each byte. Everything that would change ids or text and is not done here is kUnsupported, everything
// inconsistent kCorrupt. `name` is the file, for the message.
Result<TokenizerJson> parse_tokenizer_json(std::string_view json, const std::string& name);

}  // namespace qwen
