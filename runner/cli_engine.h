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

// Engine::load(); its warnings, and one where CUDA graphs are asked for on a cpu program, are printed unless
// `quiet`.
Result<std::unique_ptr<Engine>> load_engine(const std::string& folder, const EngineOptions& options,
                                            bool quiet);

}  // namespace qwen::cli
