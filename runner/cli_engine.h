// Loading a program for a command: the flags of how a GPU runs it, and their warnings.
#pragma once

#include <CLI/CLI.hpp>
#include <memory>
#include <string>

#include "engine.h"
#include "result.h"

namespace qwen::cli {

// --cuda_graph and --expert_activations. Not thread-safe; belongs to its app.
class EngineFlags {
 public:
  explicit EngineFlags(CLI::App& app);

  // Error: kInvalidArgument, naming the flag, its value and what is allowed.
  Result<EngineOptions> options() const;

 private:
  CLI::Option* cuda_graph_;
  CLI::Option* expert_activations_;
};

// Engine::load(); its warnings, and one where something of a GPU's is asked for on a cpu program, are printed
// unless `quiet`.
Result<std::unique_ptr<Engine>> load_engine(const std::string& folder, const EngineOptions& options,
                                            bool quiet);

}  // namespace qwen::cli
