// `qwen_runner inspect DIR`: what a program is, from its manifest alone, so also one for another machine.
#pragma once

#include <CLI/CLI.hpp>

#include "result.h"

namespace qwen::cli {

// Not thread-safe.
class InspectCommand {
 public:
  // Adds the flags to `app`, which must outlive this.
  explicit InspectCommand(CLI::App& app);

  // Returns the exit status. Files are checked to be there in their size; their digests are checked by
  // loading. Errors: kInvalidArgument, kNotFound, kCorrupt, kUnsupported, kIo.
  Result<int> run() const;

 private:
  CLI::Option* program_;
  CLI::Option* json_;
};

}  // namespace qwen::cli
