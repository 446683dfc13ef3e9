// ChatFormat: a chat template as pieces, from which the prompt of a conversation is rendered without Jinja.
//
// The pieces are the object "chat" of a program's manifest. Export derives them from the checkpoint's
// template and proves them equal to Jinja's output (export/chat_template.py). The schema and the rules of
// rendering stand in export/chat_pieces.py; this is the same in C++, and a test holds the two equal.
//
//     {"supported": false, "reason": TEXT}
//     {"supported": true, "special_tokens": [TEXT...], "start": TEXT,
//      "system": ROLE, "user": ROLE, "assistant": ROLE,
//      "tool_response": {"open": TEXT, "close": TEXT} | null,
//      "reasoning": {"open": TEXT, "close": TEXT, "before": TEXT, "after": TEXT, "trim": STRIP,
//                    "answer_trim": STRIP, "show": NAME, "show_empty": NAME} | null,
//      "generation_prompt": {"thinking": TEXT, "no_thinking": TEXT},
//      "thinking_by_default": BOOL, "proof": {...}}
//     ROLE = {"before": TEXT, "after": TEXT, "trim": BOOL}
//
// A ChatFormat is immutable: any number of threads may use one.
#pragma once

#include <nlohmann/json_fwd.hpp>
#include <optional>
#include <span>
#include <string>
#include <string_view>
#include <vector>

#include "result.h"
#include "strip.h"

namespace qwen {

struct ChatMessage {
  std::string role;     // "system" (first only), "user" or "assistant"
  std::string content;  // UTF-8; what stands here never becomes a special token
};

class ChatFormat {
 public:
  // A stretch of the prompt. With `is_template` it is exactly one special token of the template, to be
  // encoded as such; else it is text, the template's and the messages', to be encoded without special tokens.
  // No two texts are neighbours, so encoding segment by segment gives the tokens of the whole prompt, except
  // that the text of a special token inside a message stays text.
  struct Segment {
    std::string text;
    bool is_template = false;

    bool operator==(const Segment&) const = default;
  };

  // Reads the manifest's "chat" object. A template that pieces cannot express loads too, and refuses in
  // render(). Errors: kCorrupt, naming the key, where the object is not of the schema.
  static Result<ChatFormat> from_json(const nlohmann::json& chat);

  // Whether render() can succeed.
  bool supported() const { return !unsupported_reason_; }

  // Whether the template thinks where the user says nothing of it. False if !supported().
  bool thinking_by_default() const { return thinking_by_default_; }

  // The prompt of `messages`, with the start of an answer if `add_generation_prompt`; `thinking` chooses how
  // that starts. Errors: kUnsupported, with export's reason, if !supported(); kInvalidArgument, naming the
  // message (from 1), for a conversation that has a role other than the three (tool messages need the
  // template itself: Python's Runner.chat), a system message that is not the first, or no user message but
  // tools' responses.
  Result<std::vector<Segment>> render(std::span<const ChatMessage> messages, bool thinking,
                                      bool add_generation_prompt) const;

 private:
  enum class Show { kNever, kAfterLastQuery, kAlways };
  enum class ShowEmpty { kNever, kLast, kAlways };

  // A text of the template, cut at its special tokens.
  using Piece = std::vector<Segment>;

  struct Role {
    Piece before;
    Piece after;
    bool trim = false;
  };
  struct Markers {
    std::string open;
    std::string close;
  };
  struct Reasoning {
    Markers markers;
    Piece before;
    Piece after;
    Strip trim = Strip::kNone;
    Strip answer_trim = Strip::kNone;
    Show show = Show::kNever;
    ShowEmpty show_empty = ShowEmpty::kNever;
  };
  class Reader;
  class Writer;

  ChatFormat() = default;

  Result<size_t> last_query(std::span<const ChatMessage> messages) const;
  void write_assistant(std::string_view content, bool after_query, bool is_last, Writer& writer) const;

  std::optional<std::string> unsupported_reason_;
  Piece start_;
  Role system_;
  Role user_;
  Role assistant_;
  std::optional<Markers> tool_response_;
  std::optional<Reasoning> reasoning_;
  Piece thinking_prompt_;
  Piece no_thinking_prompt_;
  bool thinking_by_default_ = false;
};

}  // namespace qwen
