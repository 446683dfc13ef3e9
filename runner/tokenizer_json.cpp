#include "tokenizer_json.h"

#include <algorithm>
#include <nlohmann/json.hpp>
#include <optional>
#include <unordered_map>
#include <unordered_set>
#include <utility>

#include "nfc.h"
#include "utf8.h"

namespace qwen {
namespace {

using Json = nlohmann::json;

// Ids beyond this are taken for damage, before they cost memory.
constexpr uint64_t kMaxTokens = uint64_t{1} << 24;

// What ByteLevel splits by where it has use_regex: GPT-2's pattern.
constexpr const char* kByteLevelPattern =
    R"('s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+)";

Error corrupt(std::string what) {
  return Error{ErrorCode::kCorrupt, std::move(what)};
}
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

// GPT-2's alphabet: each byte stands in the file as a printable character. -1 for characters not in it.
const std::vector<int>& byte_of_char() {
  static const std::vector<int> table = [] {
    std::vector<int> bytes(0x144, -1);
    int next = 0x100;
    for (int byte = 0; byte < 256; ++byte) {
      const bool printable = (byte >= 33 && byte <= 126) || (byte >= 161 && byte <= 172) || byte >= 174;
      bytes[printable ? byte : next++] = byte;
    }
    return bytes;
  }();
  return table;
}

// The bytes that a token stands for; nothing if it has a character outside the alphabet. REQUIRES: valid
// UTF-8.
std::optional<std::string> bytes_of_token(std::string_view token) {
  std::string bytes;
  for (size_t i = 0; i < token.size();) {
    const Utf8Char c = utf8_at(token, i);
    const int byte = c.code_point < byte_of_char().size() ? byte_of_char()[c.code_point] : -1;
    if (byte < 0) return std::nullopt;
    bytes.push_back(static_cast<char>(byte));
    i += c.length;
  }
  return bytes;
}

Status read_normalizer(const Json& root, TokenizerJson& out) {
  QWEN_ASSIGN_OR_RETURN(const auto steps, read_steps(root, "normalizer", "normalizers"));
  for (const Json* step : steps) {
    if (type_of(*step) != "NFC") return unsupported("normalizer " + shown(*step));
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
    if (type_of(*step) != "Split") return unsupported("pre_tokenizer " + shown(*step));
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
Status read_rest(const Json& root) {
  for (const char* part : {"truncation", "padding"}) {
    if (find(root, part) != nullptr) return unsupported(part);
  }
  QWEN_ASSIGN_OR_RETURN(const auto processors, read_steps(root, "post_processor", "processors"));
  for (const Json* step : processors) {
    if (type_of(*step) != "ByteLevel") return unsupported("post_processor " + shown(*step));
  }
  QWEN_ASSIGN_OR_RETURN(const auto decoders, read_steps(root, "decoder", "decoders"));
  if (decoders.size() != 1 || type_of(*decoders[0]) != "ByteLevel") {
    return unsupported("a decoder other than ByteLevel");
  }
  return ok_status();
}

using Vocabulary = std::unordered_map<std::string_view, uint32_t>;  // tokens as they stand in the file

Status put_token(uint64_t id, const std::string& token, std::vector<bool>& taken, TokenizerJson& out) {
  if (id >= kMaxTokens)
    return corrupt("token " + shown(token) + " has the impossible id " + std::to_string(id));
  if (id >= taken.size()) {
    taken.resize(id + 1);
    out.token_bytes.resize(id + 1);
  }
  if (taken[id]) return corrupt("two tokens have the id " + std::to_string(id));
  taken[id] = true;
  // As the ByteLevel decoder has it: a token outside the alphabet stands for itself.
  out.token_bytes[id] = bytes_of_token(token).value_or(token);
  return ok_status();
}

Result<Vocabulary> read_vocabulary(const Json& model, std::vector<bool>& taken, TokenizerJson& out) {
  const Json* vocab = find(model, "vocab");
  if (vocab == nullptr || !vocab->is_object()) return corrupt("model.vocab must map tokens to ids");
  Vocabulary vocabulary;
  vocabulary.reserve(vocab->size());
  for (const auto& [token, id] : vocab->items()) {
    if (!id.is_number_unsigned()) return corrupt("token " + shown(token) + " has no id but " + shown(id));
    QWEN_RETURN_IF_ERROR(put_token(id.get<uint64_t>(), token, taken, out));
    vocabulary.emplace(token, id.get<uint32_t>());
  }
  for (size_t c = 0; c < byte_of_char().size(); ++c) {
    if (byte_of_char()[c] < 0) continue;
    std::string token;
    append_utf8(static_cast<char32_t>(c), token);
    const auto it = vocabulary.find(token);
    if (it == vocabulary.end())
      return unsupported("a vocabulary without a token for each byte (" + shown(token) + ")");
    out.byte_ids[byte_of_char()[c]] = it->second;
  }
  return vocabulary;
}

Status read_merges(const Json& model, const Vocabulary& vocabulary, TokenizerJson& out) {
  const Json* merges = find(model, "merges");
  if (merges == nullptr || !merges->is_array()) return corrupt("model.merges must be a list");
  out.merges.reserve(merges->size());
  std::string merged;
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
    merged.assign(left).append(right);
    const auto ends = {vocabulary.find(left), vocabulary.find(right), vocabulary.find(merged)};
    if (std::find(ends.begin(), ends.end(), vocabulary.end()) != ends.end()) {
      return corrupt("the merge " + shown(merge) + " names a token that model.vocab lacks");
    }
    out.merges.push_back({ends.begin()[0]->second, ends.begin()[1]->second, ends.begin()[2]->second});
  }
  return ok_status();
}

Result<Vocabulary> read_model(const Json& root, std::vector<bool>& taken, TokenizerJson& out) {
  const Json* model = find(root, "model");
  if (model == nullptr || type_of(*model) != "BPE") return unsupported("a model other than BPE");
  for (const char* key : {"continuing_subword_prefix", "end_of_word_suffix"}) {
    const Json* value = find(*model, key);
    if (value != nullptr && *value != "")
      return unsupported("model." + std::string(key) + " " + shown(*value));
  }
  const Json* dropout = find(*model, "dropout");
  if (dropout != nullptr && *dropout != 0.0) return unsupported("model.dropout " + shown(*dropout));
  QWEN_ASSIGN_OR_RETURN(Vocabulary vocabulary, read_vocabulary(*model, taken, out));
  QWEN_RETURN_IF_ERROR(read_merges(*model, vocabulary, out));
  QWEN_ASSIGN_OR_RETURN(const bool ignore_merges, read_bool(*model, "ignore_merges", false));
  if (ignore_merges) {
    for (const auto& [token, id] : vocabulary) {
      if (bytes_of_token(token)) out.whole_words.push_back(id);
    }
  }
  return vocabulary;
}

Status read_added_tokens(const Json& root, Vocabulary vocabulary, std::vector<bool>& taken,
                         TokenizerJson& out) {
  const Json* list = find(root, "added_tokens");
  if (list == nullptr) return ok_status();
  if (!list->is_array()) return corrupt("added_tokens must be a list");
  uint64_t next_id = vocabulary.size();
  std::unordered_set<std::string> contents;
  for (const Json& item : *list) {
    const Json* id = find(item, "id");
    const Json* content = find(item, "content");
    if (id == nullptr || !id->is_number_unsigned() || content == nullptr || !content->is_string() ||
        content->get_ref<const std::string&>().empty()) {
      return corrupt("an added token must have an id and a content, but one is " + shown(item));
    }
    AddedToken token;
    token.content = content->get<std::string>();
    token.id = id->get<int64_t>();
    QWEN_ASSIGN_OR_RETURN(token.special, read_bool(item, "special", false));
    QWEN_ASSIGN_OR_RETURN(token.normalized, read_bool(item, "normalized", !token.special));
    QWEN_ASSIGN_OR_RETURN(token.single_word, read_bool(item, "single_word", false));
    QWEN_ASSIGN_OR_RETURN(token.lstrip, read_bool(item, "lstrip", false));
    QWEN_ASSIGN_OR_RETURN(token.rstrip, read_bool(item, "rstrip", false));
    // Hugging Face's reader gives a new token the next free id, whatever the file says. Where the two differ,
    // no one can tell which one the model was trained with.
    const auto known = vocabulary.find(token.content);
    const uint64_t expected = known != vocabulary.end() ? known->second : next_id;
    if (id->get<uint64_t>() != expected) {
      return corrupt("the added token " + shown(token.content) + " has the id " + shown(*id) + ", expected " +
                     std::to_string(expected));
    }
    if (!contents.insert(token.content).second) {
      return corrupt("the added token " + shown(token.content) + " appears twice");
    }
    if (token.normalized && out.nfc) token.content = to_nfc(token.content);
    if (known != vocabulary.end()) taken[expected] = false;
    QWEN_RETURN_IF_ERROR(put_token(expected, token.content, taken, out));
    next_id = std::max(next_id, expected + 1);
    out.added_tokens.push_back(std::move(token));
  }
  return ok_status();
}

Status read_all(const Json& root, TokenizerJson& out) {
  std::vector<bool> taken;  // by id
  QWEN_RETURN_IF_ERROR(read_normalizer(root, out));
  QWEN_RETURN_IF_ERROR(read_pre_tokenizer(root, out));
  QWEN_RETURN_IF_ERROR(read_rest(root));
  QWEN_ASSIGN_OR_RETURN(Vocabulary vocabulary, read_model(root, taken, out));
  return read_added_tokens(root, std::move(vocabulary), taken, out);
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
  const Status status = read_all(root, out);
  if (!status.ok()) return in_file(status.error());
  return out;
}

}  // namespace qwen
