// `qwen_runner --program DIR --prompt TEXT`: one answer, streamed on standard output.
#pragma once

#include <CLI/CLI.hpp>
#include <nlohmann/json.hpp>
#include <optional>
#include <vector>

#include "cli_engine.h"
#include "cli_prompt.h"
#include "engine.h"
#include "result.h"

namespace qwen::cli {

// Not thread-safe: an answer takes SIGINT for itself. The first one ends the answer, a second one the
// process.
class GenerateCommand {
 public:
  // Adds the flags to `app`, which must outlive this.
  explicit GenerateCommand(CLI::App& app);

  // Returns the exit status. Everything that can be checked before the program is loaded is.
  Result<int> run() const;

 private:
  // The options given, by name, to be checked by make_generate_options().
  Result<nlohmann::json> option_values() const;

  CLI::Option* program_;
  PromptFlags prompt_;
  std::vector<CLI::Option*> options_;  // in the order of generation_options()
  std::optional<EngineFlags> engine_flags_;
  CLI::Option* json_;
  CLI::Option* quiet_;
};

}  // namespace qwen::cli
