#include "tokenizer_json.h"

#include <algorithm>
#include <nlohmann/json.hpp>
#include <optional>
#include <unordered_set>
#include <utility>

#include "byte_alphabet.h"
#include "nfc.h"

namespace qwen {
namespace {

using Json = nlohmann::json;

// Ids beyond this are taken for damage, before they cost memory.
constexpr uint64_t kMaxTokens = uint64_t{1} << 24;

// What ByteLevel splits by where it has use_regex: GPT-2's pattern.
constexpr const char* kByteLevelPattern =
    R"('s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+)";

Error corrupt(std::string what) { return Error{ErrorCode::kCorrupt, std::move(what)}; }
Error unsupported(const std::string& what) {
  return Error{ErrorCode::kUnsupported, what + " is not supported"};
}

// A value as it stands in the file, on one line, cut if long.
std::string shown(const Json& value) {
  std::string text = value.dump(-1, ' ', /*ensure_ascii=*/true);
  if (text.size() > 80) text.replace(77, std::string::npos, "...");
  return text;
}

// The member, or null where it is missing, null, or `object` is no object.
const Json* find(const Json& object, const char* key) {
  if (!object.is_object()) return nullptr;
  const auto it = object.find(key);
  return it == object.end() || it->is_null() ? nullptr : &*it;
}

Result<bool> read_bool(const Json& object, const char* key, bool otherwise) {
  const Json* value = find(object, key);
  if (value == nullptr) return otherwise;
  if (!value->is_boolean()) return corrupt(std::string(key) + " must be true or false, not " + shown(*value));
  return value->get<bool>();
}

std::string type_of(const Json& step) {
  const Json* type = find(step, "type");
  return type != nullptr && type->is_string() ? type->get<std::string>() : "";
}

std::string name_of(const Json& step) {
  const Json* type = find(step, "type");
  return shown(type != nullptr ? *type : step);
}

// The steps of a normalizer, pre-tokenizer or decoder, with Sequences (whose members are under `list`)
// unfolded.
Result<std::vector<const Json*>> read_steps(const Json& root, const char* part, const char* list) {
  std::vector<const Json*> steps;
  std::vector<const Json*> pending;
  if (const Json* node = find(root, part)) pending.push_back(node);
  while (!pending.empty()) {
    const Json* node = pending.back();
    pending.pop_back();
    if (type_of(*node) != "Sequence") {
      steps.push_back(node);
      continue;
    }
    const Json* members = find(*node, list);
    if (members == nullptr || !members->is_array()) {
      return corrupt(std::string(part) + " is a Sequence without a list of " + list);
    }
    for (auto it = members->rbegin(); it != members->rend(); ++it) pending.push_back(&*it);
  }
  return steps;
}

Status read_normalizer(const Json& root, TokenizerJson& out) {
  QWEN_ASSIGN_OR_RETURN(const auto steps, read_steps(root, "normalizer", "normalizers"));
  for (const Json* step : steps) {
    if (type_of(*step) != "NFC") return unsupported("normalizer " + name_of(*step));
    out.nfc = true;
  }
  return ok_status();
}

Status read_pre_tokenizer(const Json& root, TokenizerJson& out) {
  QWEN_ASSIGN_OR_RETURN(const auto steps, read_steps(root, "pre_tokenizer", "pretokenizers"));
  if (steps.empty() || type_of(*steps.back()) != "ByteLevel") {
    return unsupported("a pre_tokenizer that does not end in ByteLevel");
  }
  for (const Json* step : steps) {
    if (step == steps.back()) {
      QWEN_ASSIGN_OR_RETURN(const bool prefix_space, read_bool(*step, "add_prefix_space", true));
      QWEN_ASSIGN_OR_RETURN(const bool use_regex, read_bool(*step, "use_regex", true));
      if (prefix_space) return unsupported("pre_tokenizer ByteLevel with add_prefix_space");
      if (use_regex) out.split_patterns.emplace_back(kByteLevelPattern);
      continue;
    }
    if (type_of(*step) != "Split") return unsupported("pre_tokenizer " + name_of(*step));
    const Json* pattern = find(*step, "pattern");
    const Json* regex = pattern == nullptr ? nullptr : find(*pattern, "Regex");
    const Json* behavior = find(*step, "behavior");
    QWEN_ASSIGN_OR_RETURN(const bool invert, read_bool(*step, "invert", false));
    if (regex == nullptr || !regex->is_string()) return unsupported("pre_tokenizer Split without a Regex");
    if (behavior == nullptr || *behavior != "Isolated" || invert) {
      return unsupported("pre_tokenizer Split that is not Isolated, or inverted,");
    }
    out.split_patterns.push_back(regex->get<std::string>());
  }
  return ok_status();
}

// Parts after the model: text comes from bytes, and nothing is added, cut or padded.
Status read_rest(const Json& root, TokenizerJson&) {
  for (const char* part : {"truncation", "padding"}) {
    if (find(root, part) != nullptr) return unsupported(part);
  }
  QWEN_ASSIGN_OR_RETURN(const auto processors, read_steps(root, "post_processor", "processors"));
  for (const Json* step : processors) {
    if (type_of(*step) != "ByteLevel") return unsupported("post_processor " + name_of(*step));
  }
  QWEN_ASSIGN_OR_RETURN(const auto decoders, read_steps(root, "decoder", "decoders"));
  if (decoders.size() != 1 || type_of(*decoders[0]) != "ByteLevel") {
    return unsupported("a decoder other than ByteLevel");
  }
  return ok_status();
}

Status check_id(const Json& id, const std::string& token) {
  if (id.is_number_unsigned() && id.get<uint64_t>() < kMaxTokens) return ok_status();
  return corrupt("the token " + shown(token) + " has an impossible id: " + shown(id));
}

Status read_vocabulary(const Json& vocab, TokenizerJson& out) {
  out.vocabulary = Vocabulary(vocab.size());
  for (const auto& [token, id] : vocab.items()) {
    QWEN_RETURN_IF_ERROR(check_id(id, token));
    if (out.vocabulary.contains(id)) return corrupt("two tokens have the id " + shown(id));
    // A token outside the alphabet stands for itself in text, but no word's bytes become it.
    if (std::optional<std::string> bytes = alphabet_to_bytes(token)) {
      out.vocabulary.put_searchable(id, *std::move(bytes));
    } else {
      out.vocabulary.put(id, token);
    }
  }
  for (int byte = 0; byte < 256; ++byte) {
    const std::optional<uint32_t> id = out.vocabulary.find(std::string(1, static_cast<char>(byte)));
    if (!id) return unsupported("a vocabulary without a token for byte " + std::to_string(byte));
    out.byte_ids[byte] = *id;
  }
  return ok_status();
}

Status read_merges(const Json& model, TokenizerJson& out) {
  const Json* merges = find(model, "merges");
  if (merges == nullptr || !merges->is_array()) return corrupt("model.merges must be a list");
  out.merges.reserve(merges->size());
  for (const Json& merge : *merges) {
    std::string_view left;
    std::string_view right;
    if (merge.is_array() && merge.size() == 2 && merge[0].is_string() && merge[1].is_string()) {
      left = merge[0].get_ref<const std::string&>();
      right = merge[1].get_ref<const std::string&>();
    } else if (merge.is_string()) {
      const std::string_view text = merge.get_ref<const std::string&>();
      if (text.starts_with("#version")) continue;
      const size_t space = text.find(' ');
      left = text.substr(0, space);
      right = space == std::string_view::npos ? "" : text.substr(space + 1);
    } else {
      return corrupt("a merge must be two tokens, not " + shown(merge));
    }
    const std::string left_bytes = alphabet_to_bytes(left).value_or("");
    const std::string right_bytes = alphabet_to_bytes(right).value_or("");
    const auto left_id = out.vocabulary.find(left_bytes);
    const auto right_id = out.vocabulary.find(right_bytes);
    const auto merged_id = out.vocabulary.find(left_bytes + right_bytes);
    if (!left_id || !right_id || !merged_id) {
      return corrupt("the merge " + shown(merge) + " names a token that model.vocab lacks");
    }
    out.merges.push_back({*left_id, *right_id, *merged_id});
  }
  return ok_status();
}

Status read_added_tokens(const Json& root, const Json& vocab, TokenizerJson& out) {
  const Json* list = find(root, "added_tokens");
  if (list == nullptr) return ok_status();
  if (!list->is_array()) return corrupt("added_tokens must be a list");
  uint64_t next_id = vocab.size();
  std::unordered_set<std::string> contents;
  for (const Json& item : *list) {
    const Json* id = find(item, "id");
    const Json* content = find(item, "content");
    if (id == nullptr || content == nullptr || !content->is_string() ||
        content->get_ref<const std::string&>().empty()) {
      return corrupt("an added token must have an id and a content, but one is " + shown(item));
    }
    AddedToken token;
    token.content = content->get<std::string>();
    QWEN_RETURN_IF_ERROR(check_id(*id, token.content));
    token.id = id->get<int64_t>();
    QWEN_ASSIGN_OR_RETURN(token.special, read_bool(item, "special", false));
    QWEN_ASSIGN_OR_RETURN(token.normalized, read_bool(item, "normalized", !token.special));
    QWEN_ASSIGN_OR_RETURN(token.single_word, read_bool(item, "single_word", false));
    QWEN_ASSIGN_OR_RETURN(token.lstrip, read_bool(item, "lstrip", false));
    QWEN_ASSIGN_OR_RETURN(token.rstrip, read_bool(item, "rstrip", false));
    // Hugging Face's reader gives a new token the next free id, whatever the file says. Where the two differ,
    // no one can tell which one the model was trained with.
    const auto known = vocab.find(token.content);
    const uint64_t expected = known != vocab.end() ? known->get<uint64_t>() : next_id;
    if (*id != expected) {
      return corrupt("the added token " + shown(token.content) + " has the id " + shown(*id) + ", expected " +
                     std::to_string(expected));
    }
    if (!contents.insert(token.content).second) {
      return corrupt("the added token " + shown(token.content) + " appears twice");
    }
    next_id = std::max(next_id, expected + 1);
    if (token.normalized && out.nfc) token.content = to_nfc(token.content);
    // As the ByteLevel decoder has it: content within the alphabet is read as bytes, even here.
    out.vocabulary.put(expected, alphabet_to_bytes(token.content).value_or(token.content));
    out.added_tokens.push_back(std::move(token));
  }
  return ok_status();
}

Status read_model(const Json& root, TokenizerJson& out) {
  const Json* model = find(root, "model");
  if (model == nullptr || type_of(*model) != "BPE") return unsupported("a model other than BPE");
  for (const char* key : {"continuing_subword_prefix", "end_of_word_suffix"}) {
    const Json* value = find(*model, key);
    if (value != nullptr && *value != Json(""))
      return unsupported("model." + std::string(key) + " " + shown(*value));
  }
  const Json* dropout = find(*model, "dropout");
  if (dropout != nullptr && *dropout != 0.0) return unsupported("model.dropout " + shown(*dropout));
  const Json* vocab = find(*model, "vocab");
  if (vocab == nullptr || !vocab->is_object()) return corrupt("model.vocab must map tokens to ids");
  QWEN_RETURN_IF_ERROR(read_vocabulary(*vocab, out));
  QWEN_RETURN_IF_ERROR(read_merges(*model, out));
  QWEN_ASSIGN_OR_RETURN(out.ignore_merges, read_bool(*model, "ignore_merges", false));
  return read_added_tokens(root, *vocab, out);
}

}  // namespace

Result<TokenizerJson> parse_tokenizer_json(std::string_view json, const std::string& name) {
  auto in_file = [&](Error error) {
    error.message = name + ": " + error.message;
    return error;
  };
  Json root;
  try {
    root = Json::parse(json);
  } catch (const Json::exception& e) {
    return in_file(corrupt(e.what()));
  }
  TokenizerJson out;
  for (const auto read : {read_normalizer, read_pre_tokenizer, read_rest, read_model}) {
    const Status status = read(root, out);
    if (!status.ok()) return in_file(status.error());
  }
  return out;
}

}  // namespace qwen
