// The prompt as the command line gives it: text, a file or token ids, plain or as a chat message.
#pragma once

#include <CLI/CLI.hpp>
#include <cstdint>
#include <optional>
#include <string>
#include <vector>

#include "engine.h"
#include "result.h"

namespace qwen::cli {

struct Prompt {
  std::string text;
  std::vector<int64_t> ids;  // instead of text, if not empty
  bool chat = false;
  std::optional<std::string> system;
  std::optional<bool> thinking;  // the template's own default if not given

  // Errors: kUnsupported (a chat template that the program could not take along), kInvalidArgument.
  Result<std::vector<int64_t>> encode(const Engine& engine) const;
};

// The flags that give it. Not thread-safe.
class PromptFlags {
 public:
  // Adds the flags to `app`, which must outlive this.
  explicit PromptFlags(CLI::App& app);

  // Reads the flags, and the file or standard input that they name.
  // Errors: kInvalidArgument (no prompt, an empty one, flags that exclude each other), kNotFound, kIo.
  Result<Prompt> read() const;

 private:
  Status check_combination() const;

  CLI::Option* prompt_;
  CLI::Option* prompt_file_;
  CLI::Option* prompt_ids_;
  CLI::Option* chat_;
  CLI::Option* system_;
  CLI::Option* thinking_;
};

}  // namespace qwen::cli
