// `qwen_runner bench DIR`: the speed of a program, over several answers of a fixed length to a fixed random
// prompt.
#pragma once

#include <CLI/CLI.hpp>

#include "cli_engine.h"
#include "result.h"

namespace qwen::cli {

// Not thread-safe.
class BenchCommand {
 public:
  // Adds the flags to `app`, which must outlive this.
  explicit BenchCommand(CLI::App& app);

  // Returns the exit status. One answer warms up and is not counted; each is greedy and goes on past its end.
  // One new token leaves nothing to say of decoding. With a batch, so many answers to prompts of their own
  // are generated at once: what is said of one is the mean of all. Errors: those of loading and generating;
  // kInvalidArgument where the lengths do not fit into a slot or the batch into a decode step.
  Result<int> run() const;

 private:
  CLI::Option* program_;
  CLI::Option* prompt_tokens_;
  CLI::Option* new_tokens_;
  CLI::Option* repetitions_;
  CLI::Option* batch_;
  EngineFlags engine_flags_;
  CLI::Option* json_;
};

}  // namespace qwen::cli
