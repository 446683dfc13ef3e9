#include "cli_prompt.h"

#include <algorithm>
#include <cerrno>
#include <cstdio>
#include <cstring>
#include <memory>

#include "cli_flags.h"
#include "generate.h"

namespace qwen::cli {
namespace {

Error usage(const std::string& message) { return {ErrorCode::kInvalidArgument, message}; }

// `path` or, for "-", standard input.
Result<std::string> read_prompt_file(const std::string& path) {
  const bool is_stdin = path == "-";
  const std::unique_ptr<std::FILE, int (*)(std::FILE*)> opened(
      is_stdin ? nullptr : std::fopen(path.c_str(), "rb"), std::fclose);
  std::FILE* const file = is_stdin ? stdin : opened.get();
  std::string text;
  if (file != nullptr) {
    char buffer[1 << 16];
    while (const size_t count = std::fread(buffer, 1, sizeof buffer, file)) {
      text.append(buffer, count);
    }
  }
  if (file == nullptr || std::ferror(file) != 0) {
    return Error{
        errno == ENOENT ? ErrorCode::kNotFound : ErrorCode::kIo,
        "cannot read the prompt from " + (is_stdin ? "standard input" : path) + ": " + std::strerror(errno)};
  }
  return text;
}

// Editors and `echo` end a file with a line's end that nobody means as part of the prompt.
void drop_final_line_end(std::string& text) {
  if (text.ends_with('\n')) {
    text.pop_back();
  }
  if (text.ends_with('\r')) {
    text.pop_back();
  }
}

Result<std::vector<int64_t>> parse_ids(const std::string& list) {
  std::vector<int64_t> ids;
  for (size_t start = 0; start <= list.size();) {
    const size_t end = std::min(list.find(',', start), list.size());
    std::string item = list.substr(start, end - start);
    item.erase(0, item.find_first_not_of(' '));
    item.erase(item.find_last_not_of(' ') + 1);
    const std::optional<int64_t> id = parse_integer(item);
    if (!id || *id < 0) {
      return usage("--prompt_ids holds \"" + item +
                   "\": it must be token ids with commas between, such as 1,2,3");
    }
    ids.push_back(*id);
    start = end + 1;
  }
  return ids;
}

}  // namespace

Result<std::vector<int64_t>> Prompt::encode(const Engine& engine) const {
  if (!ids.empty()) {
    return ids;
  }
  if (!chat) {
    return encode_prompt(engine, text);
  }
  std::vector<ChatMessage> messages;
  if (system) {
    messages.push_back({"system", *system});
  }
  messages.push_back({"user", text});
  return encode_chat(engine, messages, thinking.value_or(engine.chat().thinking_by_default()));
}

PromptFlags::PromptFlags(CLI::App& app)
    : prompt_(add_value(app, "prompt", "TEXT", "Text to go on from")),
      prompt_file_(add_value(app, "prompt_file", "FILE",
                             "The same from a file, less its last line's end; - is stdin")),
      prompt_ids_(add_value(app, "prompt_ids", "1,2,3", "The same as token ids")),
      chat_(add_switch(app, "chat", "The prompt is a message to answer, in the model's chat format")),
      system_(add_value(app, "system", "TEXT", "With --chat: the system message")),
      thinking_(add_switch(
          app, "thinking",
          "With --chat: --thinking or --thinking=off; the model's chat template decides if not given")) {}

Status PromptFlags::check_combination() const {
  const size_t sources = (prompt_->count() != 0) + (prompt_file_->count() != 0) + (prompt_ids_->count() != 0);
  if (sources != 1) {
    return usage(
        std::string(sources == 0 ? "no prompt given: use" : "more than one prompt given: use only one of") +
        " --prompt TEXT, --prompt_file FILE (- is stdin) or --prompt_ids 1,2,3");
  }
  QWEN_ASSIGN_OR_RETURN(const auto chat, given_switch(*chat_));
  if (chat.value_or(false)) {
    return prompt_ids_->count() == 0 ? ok_status()
                                     : usage("--chat needs text, not --prompt_ids: use --prompt");
  }
  for (const CLI::Option* option : {system_, thinking_}) {
    if (option->count() != 0) {
      return usage("--" + option->get_lnames().front() + " is for chats only: add --chat");
    }
  }
  return ok_status();
}

Result<Prompt> PromptFlags::read() const {
  QWEN_RETURN_IF_ERROR(check_combination());
  Prompt prompt;
  QWEN_ASSIGN_OR_RETURN(const auto chat, given_switch(*chat_));
  prompt.chat = chat.value_or(false);
  prompt.system = given_value(*system_);
  QWEN_ASSIGN_OR_RETURN(prompt.thinking, given_switch(*thinking_));
  if (const auto list = given_value(*prompt_ids_); list && !list->empty()) {
    QWEN_ASSIGN_OR_RETURN(prompt.ids, parse_ids(*list));
    return prompt;
  }
  if (const auto path = given_value(*prompt_file_)) {
    QWEN_ASSIGN_OR_RETURN(prompt.text, read_prompt_file(*path));
    drop_final_line_end(prompt.text);
  } else {
    prompt.text = given_value(*prompt_).value_or("");
  }
  if (prompt.text.empty()) {
    return usage("the prompt is empty: give at least one character");
  }
  return prompt;
}

}  // namespace qwen::cli
