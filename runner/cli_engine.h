// Loading a program for a command: the --cuda_graph flag and its warning.
#pragma once

#include <CLI/CLI.hpp>
#include <memory>
#include <string>

#include "engine.h"
#include "result.h"

namespace qwen::cli {

CLI::Option* add_cuda_graph(CLI::App& app);

// Error: kInvalidArgument, where the flag's value is neither on nor off.
Result<EngineOptions> engine_options(const CLI::Option& cuda_graph);

// Engine::load(); asking for CUDA graphs on a cpu program is a warning, unless `quiet`.
Result<std::unique_ptr<Engine>> load_engine(const std::string& folder, const EngineOptions& options,
                                            bool quiet);

}  // namespace qwen::cli
