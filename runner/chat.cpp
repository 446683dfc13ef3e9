#include "chat.h"

#include <algorithm>
#include <array>
#include <nlohmann/json.hpp>
#include <utility>

namespace qwen {
namespace {

using Json = nlohmann::json;

Error invalid_message(size_t index, const std::string& what) {
  return {ErrorCode::kInvalidArgument, "chat message " + std::to_string(index + 1) + " " + what};
}

}  // namespace

// Reads the manifest's object. It keeps the first thing that was wrong; what it returns after that has no
// meaning.
class ChatFormat::Reader {
 public:
  explicit Reader(const Json& chat) : root_(chat) {}

  Status status() const { return error_ ? Status(*error_) : ok_status(); }
  void set_special_tokens(std::vector<std::string> tokens) { special_tokens_ = std::move(tokens); }

  // `path` is a key, or an object's key and a key in it: "user.before".
  const Json* find(std::string_view path) {
    const Json* value = &root_;
    for (std::string_view rest = path; !rest.empty();) {
      const size_t dot = std::min(rest.find('.'), rest.size());
      const auto member = value->find(rest.substr(0, dot));
      if (!value->is_object() || member == value->end()) return fail(path, "is missing");
      value = &*member;
      rest.remove_prefix(std::min(dot + 1, rest.size()));
    }
    return value;
  }

  std::string text(std::string_view path) {
    const Json* value = find(path);
    if (value && !value->is_string()) value = fail(path, "is not a text");
    return value ? value->get<std::string>() : "";
  }

  bool boolean(std::string_view path) {
    const Json* value = find(path);
    if (value && !value->is_boolean()) value = fail(path, "is not true or false");
    return value && value->get<bool>();
  }

  std::vector<std::string> texts(std::string_view path) {
    const Json* value = find(path);
    std::vector<std::string> texts;
    if (value && !value->is_array()) value = fail(path, "is not a list");
    for (const Json& item : value ? *value : Json::array()) {
      if (!item.is_string() || item.get_ref<const std::string&>().empty()) {
        fail(path, "holds something that is not a text");
        break;
      }
      texts.push_back(item.get<std::string>());
    }
    return texts;
  }

  // Whether the object is there; null means that the template has no such thing.
  bool has(std::string_view path) {
    const Json* value = find(path);
    if (value && !value->is_null() && !value->is_object()) value = fail(path, "is not an object or null");
    return value && value->is_object();
  }

  template <typename T, size_t N>
  T choice(std::string_view path, const std::array<std::pair<std::string_view, T>, N>& choices) {
    const std::string name = text(path);
    for (const auto& [known, value] : choices) {
      if (name == known) return value;
    }
    fail(path, "is '" + name + "', which this build does not know");
    return choices[0].second;
  }

  Markers markers(const std::string& path) {
    Markers markers{text(path + ".open"), text(path + ".close")};
    if (markers.open.empty() || markers.close.empty()) fail(path, "has an empty marker");
    return markers;
  }

  Role role(const std::string& path) {
    return {piece(path + ".before"), piece(path + ".after"), boolean(path + ".trim")};
  }

  Reasoning reasoning(const std::string& path) {
    using StripName = std::pair<std::string_view, Strip>;
    constexpr std::array strips = {StripName{"none", Strip::kNone}, StripName{"newlines", Strip::kNewlines},
                                   StripName{"whitespace", Strip::kWhitespace}};
    using ShowName = std::pair<std::string_view, Show>;
    constexpr std::array shows = {ShowName{"never", Show::kNever}, ShowName{"always", Show::kAlways},
                                  ShowName{"after_last_query", Show::kAfterLastQuery}};
    using ShowEmptyName = std::pair<std::string_view, ShowEmpty>;
    constexpr std::array show_empties = {ShowEmptyName{"never", ShowEmpty::kNever},
                                         ShowEmptyName{"last", ShowEmpty::kLast},
                                         ShowEmptyName{"always", ShowEmpty::kAlways}};
    return {.markers = markers(path),
            .before = piece(path + ".before"),
            .after = piece(path + ".after"),
            .trim = choice(path + ".trim", strips),
            .answer_trim = choice(path + ".answer_trim", strips),
            .show = choice(path + ".show", shows),
            .show_empty = choice(path + ".show_empty", show_empties)};
  }

  // Cuts a text of the template at its special tokens, the longest where several begin.
  Piece piece(std::string_view path) {
    Piece piece;
    const std::string whole = text(path);
    std::string plain;
    for (size_t at = 0; at < whole.size();) {
      const std::string* longest = nullptr;
      for (const std::string& token : special_tokens_) {
        if (std::string_view(whole).substr(at).starts_with(token) &&
            (!longest || token.size() > longest->size())) {
          longest = &token;
        }
      }
      if (!longest) {
        plain += whole[at++];
        continue;
      }
      if (!plain.empty()) piece.push_back({std::exchange(plain, {}), false});
      piece.push_back({*longest, true});
      at += longest->size();
    }
    if (!plain.empty()) piece.push_back({plain, false});
    return piece;
  }

 private:
  const Json* fail(std::string_view path, const std::string& what) {
    if (!error_) {
      error_ = Error{ErrorCode::kCorrupt,
                     "manifest.json: chat." + std::string(path) + " " + what + "; export the program again"};
    }
    return nullptr;
  }

  const Json& root_;
  std::vector<std::string> special_tokens_;
  std::optional<Error> error_;
};

// Gathers the segments, joining neighbouring texts: the tokenizer must see them whole to cut them as it cuts
// the prompt.
class ChatFormat::Writer {
 public:
  void text(std::string_view text) {
    if (text.empty()) return;
    if (segments_.empty() || segments_.back().is_template) segments_.emplace_back();
    segments_.back().text += text;
  }

  void piece(const Piece& piece) {
    for (const Segment& segment : piece) {
      if (segment.is_template) {
        segments_.push_back(segment);
      } else {
        text(segment.text);
      }
    }
  }

  std::vector<Segment> take() { return std::move(segments_); }

 private:
  std::vector<Segment> segments_;
};

Result<ChatFormat> ChatFormat::from_json(const nlohmann::json& chat) {
  if (!chat.is_object()) {
    return Error{ErrorCode::kCorrupt, "manifest.json: chat is not an object; export the program again"};
  }
  Reader reader(chat);
  ChatFormat format;
  if (!reader.boolean("supported")) {
    format.unsupported_reason_ = reader.text("reason");
    QWEN_RETURN_IF_ERROR(reader.status());
    return format;
  }
  reader.set_special_tokens(reader.texts("special_tokens"));
  format.start_ = reader.piece("start");
  format.system_ = reader.role("system");
  format.user_ = reader.role("user");
  format.assistant_ = reader.role("assistant");
  if (reader.has("tool_response")) format.tool_response_ = reader.markers("tool_response");
  if (reader.has("reasoning")) format.reasoning_ = reader.reasoning("reasoning");
  format.thinking_prompt_ = reader.piece("generation_prompt.thinking");
  format.no_thinking_prompt_ = reader.piece("generation_prompt.no_thinking");
  format.thinking_by_default_ = reader.boolean("thinking_by_default");
  QWEN_RETURN_IF_ERROR(reader.status());
  return format;
}

Result<std::vector<ChatFormat::Segment>> ChatFormat::render(std::span<const ChatMessage> messages,
                                                            bool thinking, bool add_generation_prompt) const {
  if (unsupported_reason_) {
    return Error{ErrorCode::kUnsupported,
                 "this program cannot chat without Jinja: " + *unsupported_reason_ +
                     "; use Python's Runner.chat, or --prompt with the whole prompt"};
  }
  QWEN_ASSIGN_OR_RETURN(const size_t query, last_query(messages));
  Writer writer;
  if (messages[0].role != "system") writer.piece(start_);
  for (size_t i = 0; i < messages.size(); ++i) {
    const ChatMessage& message = messages[i];
    const Role& role = message.role == "system" ? system_ : message.role == "user" ? user_ : assistant_;
    const std::string_view content =
        strip_both(message.content, role.trim ? Strip::kWhitespace : Strip::kNone);
    writer.piece(role.before);
    if (&role == &assistant_) {
      write_assistant(content, i > query, i + 1 == messages.size(), writer);
    } else {
      writer.text(content);
    }
    writer.piece(role.after);
  }
  if (add_generation_prompt) writer.piece(thinking ? thinking_prompt_ : no_thinking_prompt_);
  return writer.take();
}

// The index of the last user message that is no tool's response. Refuses what the pieces do not render.
Result<size_t> ChatFormat::last_query(std::span<const ChatMessage> messages) const {
  std::optional<size_t> last;
  for (size_t i = 0; i < messages.size(); ++i) {
    const auto& [role, content] = messages[i];
    if (role == "system" && i > 0) {
      return invalid_message(i, "is a system message; only the first message may be one");
    }
    if (role == "tool") {
      return invalid_message(i, "is a tool's; tools need the template itself, with Python's Runner.chat");
    }
    if (role != "system" && role != "user" && role != "assistant") {
      return invalid_message(i, "has the role '" + role + "'; use 'system', 'user' or 'assistant'");
    }
    if (role != "user") continue;
    const std::string_view text = strip_both(content, user_.trim ? Strip::kWhitespace : Strip::kNone);
    if (!tool_response_ || !text.starts_with(tool_response_->open) ||
        !text.ends_with(tool_response_->close)) {
      last = i;
    }
  }
  if (!last) {
    return Error{ErrorCode::kInvalidArgument, "the chat has no user message that asks something; add one"};
  }
  return *last;
}

void ChatFormat::write_assistant(std::string_view content, bool after_query, bool is_last,
                                 Writer& writer) const {
  if (!reasoning_) {
    writer.text(content);
    return;
  }
  const Reasoning& form = *reasoning_;
  const auto& [open, close] = form.markers;
  std::string_view thought;
  if (const size_t first = content.find(close); first != std::string_view::npos) {
    thought = content.substr(0, first);
    if (const size_t begin = thought.rfind(open); begin != std::string_view::npos) {
      thought.remove_prefix(begin + open.size());
    }
    thought = strip_both(thought, form.trim);
    content = strip_left(content.substr(content.rfind(close) + close.size()), form.answer_trim);
  }
  const bool place = form.show == Show::kAlways || (form.show == Show::kAfterLastQuery && after_query);
  const bool empty_too =
      form.show_empty == ShowEmpty::kAlways || (form.show_empty == ShowEmpty::kLast && is_last);
  if (place && (!thought.empty() || empty_too)) {
    writer.piece(form.before);
    writer.text(thought);
    writer.piece(form.after);
    content = strip_left(content, form.answer_trim);
  }
  writer.text(content);
}

}  // namespace qwen
