// Text to tokens and back: byte-level BPE as a Hugging Face tokenizer.json describes it.
//
// Ids and text are those of Hugging Face `tokenizers` on every input (encode is its encode without special
// tokens added). Immutable once loaded, and thread-safe: every call has its own working memory. Move-only.
#pragma once

#include <cstddef>
#include <cstdint>
#include <memory>
#include <optional>
#include <span>
#include <string>
#include <string_view>
#include <vector>

#include "result.h"

namespace qwen {

class Tokenizer {
 public:
  // `json`: the text of a tokenizer.json; `name`: its path, for the message. Fails with kCorrupt where the
  // file is damaged or contradicts itself, with kUnsupported where it asks for what is not done here; the
  // message names file and part.
  static Result<Tokenizer> from_json(std::string_view json, const std::string& name);

  Tokenizer(Tokenizer&&) noexcept;
  Tokenizer& operator=(Tokenizer&&) noexcept;
  ~Tokenizer();

  // The tokens of `text`, which may be any bytes: what is not UTF-8 is read as U+FFFD. With `parse_special`,
  // added tokens found in the text (special or not) become their ids; without, they are plain text like any
  // other. What a user wrote must be encoded without. Takes time linear in the text, but O(n log n) for one
  // word.
  std::vector<int64_t> encode(std::string_view text, bool parse_special) const;

  // The text of `ids`: their bytes, with U+FFFD for what is not UTF-8. Ids that are no token are left out,
  // and special tokens too with `skip_special`.
  std::string decode(std::span<const int64_t> ids, bool skip_special) const;

  // The bytes of one token, possibly a part of a character; an added token's content. Empty if `id` is no
  // token.
  std::string token_bytes(int64_t id) const;

  // True if `id` is an added token marked special.
  bool is_special(int64_t id) const;

  // The token with these bytes, added tokens first: token_id("<|im_end|>").
  std::optional<int64_t> token_id(std::string_view token) const;

  // One more than the largest id. A model's vocabulary may be larger, by padding.
  size_t vocab_size() const;

 private:
  struct Impl;
  class Encoder;
  explicit Tokenizer(std::unique_ptr<const Impl> impl);
  std::unique_ptr<const Impl> impl_;
};

}  // namespace qwen
