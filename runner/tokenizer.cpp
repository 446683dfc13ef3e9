#include "tokenizer.h"

#include <algorithm>
#include <bit>
#include <deque>
#include <unordered_map>
#include <utility>

#include "added_tokens.h"
#include "bpe.h"
#include "nfc.h"
#include "pretokenizer.h"
#include "tokenizer_json.h"
#include "utf8.h"
#include "vocabulary.h"

namespace qwen {
namespace {

bool is_ascii(std::string_view text) {
  return std::none_of(text.begin(), text.end(), [](char c) { return static_cast<uint8_t>(c) >= 0x80; });
}

// Words already met in this text: where their tokens are in the output. Direct-mapped, so bounded whatever
// the text. Most words of a text are repetitions, and a look-up costs a fifth of the merging.
class WordCache {
 public:
  struct Entry {
    std::string_view word;
    size_t first_id = 0;
    size_t id_count = 0;
  };

  explicit WordCache(size_t text_size)
      : entries_(std::bit_ceil(std::clamp<size_t>(text_size / 8, 1, 1 << 14))) {}

  // The entry for `word`, or one to overwrite.
  Entry& at(std::string_view word) {
    return entries_[std::hash<std::string_view>()(word) & (entries_.size() - 1)];
  }

 private:
  std::vector<Entry> entries_;
};

}  // namespace

struct Tokenizer::Impl {
  bool nfc = false;
  std::vector<SplitPattern> split_patterns;
  Bpe bpe;
  AddedTokenMatcher raw_tokens;         // looked for before normalization
  AddedTokenMatcher normalized_tokens;  // and after
  Vocabulary vocabulary;
  bool ignore_merges = false;
  std::vector<bool> special;                                // by id
  std::unordered_map<std::string_view, int64_t> added_ids;  // by vocabulary.bytes
};

// One call of encode.
class Tokenizer::Encoder {
 public:
  Encoder(const Impl& impl, size_t text_size) : impl_(impl), cache_(text_size) {}

  // REQUIRES: text is valid UTF-8 and outlives the Encoder.
  void encode(std::string_view text, bool parse_special) {
    if (!parse_special) return encode_text(normalized(text));
    auto on_token = [this](int64_t id) { ids_.push_back(id); };
    auto on_text = [this](std::string_view piece) { encode_text(piece); };
    auto on_raw = [&](std::string_view piece) {
      impl_.normalized_tokens.split(normalized(piece), on_text, on_token);
    };
    impl_.raw_tokens.split(text, on_raw, on_token);
  }

  std::vector<int64_t> take() { return std::move(ids_); }

 private:
  std::string_view normalized(std::string_view text) {
    if (!impl_.nfc || !may_change_in_nfc(text)) return text;
    return normalized_.emplace_back(to_nfc(text));
  }

  void encode_text(std::string_view text) {
    if (is_ascii(text)) return split(text, text, 0);
    split(text, class_text(text), 0);
  }

  // Applies the split patterns from `index` on. `classes` is the class_text of `text`.
  void split(std::string_view text, std::string_view classes, size_t index) {
    if (index == impl_.split_patterns.size()) return encode_word(text);
    impl_.split_patterns[index].split(classes, [&](size_t offset, size_t length) {
      split(text.substr(offset, length), classes.substr(offset, length), index + 1);
    });
  }

  void encode_word(std::string_view word) {
    WordCache::Entry& cached = cache_.at(word);
    if (!word.empty() && cached.word == word) {
      for (size_t i = 0; i < cached.id_count; ++i) ids_.push_back(ids_[cached.first_id + i]);
      return;
    }
    const size_t first_id = ids_.size();
    const auto whole = impl_.ignore_merges ? impl_.vocabulary.find(word) : std::nullopt;
    if (whole) {
      ids_.push_back(*whole);
    } else {
      impl_.bpe.encode(word, scratch_, ids_);
    }
    cached = {word, first_id, ids_.size() - first_id};
  }

  const Impl& impl_;
  std::vector<int64_t> ids_;
  std::deque<std::string> normalized_;  // the cache keeps views into it
  WordCache cache_;
  Bpe::Scratch scratch_;
};

Tokenizer::Tokenizer(std::unique_ptr<const Impl> impl) : impl_(std::move(impl)) {}
Tokenizer::Tokenizer(Tokenizer&&) noexcept = default;
Tokenizer& Tokenizer::operator=(Tokenizer&&) noexcept = default;
Tokenizer::~Tokenizer() = default;

Result<Tokenizer> Tokenizer::from_json(std::string_view json, const std::string& name) {
  QWEN_ASSIGN_OR_RETURN(TokenizerJson file, parse_tokenizer_json(json, name));
  auto impl = std::make_unique<Impl>();
  impl->nfc = file.nfc;
  for (const std::string& pattern : file.split_patterns) {
    auto compiled = SplitPattern::compile(pattern);
    if (!compiled.ok()) return Error{compiled.error().code, name + ": " + compiled.error().message};
    impl->split_patterns.push_back(std::move(compiled).value());
  }
  impl->bpe = Bpe(file.byte_ids, file.merges);
  impl->ignore_merges = file.ignore_merges;
  impl->vocabulary = std::move(file.vocabulary);
  impl->special.resize(impl->vocabulary.size());

  std::vector<AddedToken> raw;
  std::vector<AddedToken> normalized;
  // Special ones first: of two tokens whose contents are the same once normalized, they count.
  for (const bool special : {true, false}) {
    for (AddedToken& token : file.added_tokens) {
      if (token.special != special) continue;
      impl->special[token.id] = special;
      impl->added_ids.emplace(impl->vocabulary.bytes(token.id), token.id);
      (token.normalized ? normalized : raw).push_back(std::move(token));
    }
  }
  impl->raw_tokens = AddedTokenMatcher(std::move(raw));
  impl->normalized_tokens = AddedTokenMatcher(std::move(normalized));
  return Tokenizer(std::move(impl));
}

std::vector<int64_t> Tokenizer::encode(std::string_view text, bool parse_special) const {
  const std::string valid = replace_invalid_utf8(text);
  Encoder encoder(*impl_, valid.size());
  encoder.encode(valid, parse_special);
  return encoder.take();
}

std::string Tokenizer::decode(std::span<const int64_t> ids, bool skip_special) const {
  std::string out;
  Utf8Repair repair;
  for (const int64_t id : ids) {
    if (id < 0 || static_cast<size_t>(id) >= vocab_size()) continue;
    if (skip_special && impl_->special[id]) continue;
    repair.append(impl_->vocabulary.bytes(id), out);
  }
  repair.finish(out);
  return out;
}

std::string Tokenizer::token_bytes(int64_t id) const {
  if (id < 0 || static_cast<size_t>(id) >= vocab_size()) return "";
  return impl_->vocabulary.bytes(id);
}

bool Tokenizer::is_special(int64_t id) const {
  return id >= 0 && static_cast<size_t>(id) < vocab_size() && impl_->special[id];
}

std::optional<int64_t> Tokenizer::token_id(std::string_view token) const {
  const auto added = impl_->added_ids.find(token);
  return added != impl_->added_ids.end() ? added->second : impl_->vocabulary.find(token);
}

size_t Tokenizer::vocab_size() const { return impl_->vocabulary.size(); }

}  // namespace qwen
