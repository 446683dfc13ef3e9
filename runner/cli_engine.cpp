#include "cli_engine.h"

#include "cli_flags.h"
#include "cli_output.h"

namespace qwen::cli {

CLI::Option* add_cuda_graph(CLI::App& app) {
  return add_switch(app, "cuda_graph",
                    "Replay decoding from a CUDA graph, as is done by default; "
                    "=off launches every kernel, "
                    "which is slower and gives the same tokens");
}

Result<EngineOptions> engine_options(const CLI::Option& cuda_graph) {
  EngineOptions options;
  QWEN_ASSIGN_OR_RETURN(const auto on, given_switch(cuda_graph));
  if (on) {
    options.cuda_graph = *on ? EngineOptions::CudaGraph::kOn : EngineOptions::CudaGraph::kOff;
  }
  return options;
}

Result<std::unique_ptr<Engine>> load_engine(const std::string& folder, const EngineOptions& options,
                                            bool quiet) {
  EngineOptions with_warnings = options;
  if (!quiet) {
    with_warnings.on_warning = print_warning;
  }
  auto engine = Engine::load(folder, with_warnings);
  if (engine.ok() && !quiet && options.cuda_graph == EngineOptions::CudaGraph::kOn &&
      engine.value()->manifest().device == "cpu") {
    print_warning("--cuda_graph has no effect on a cpu program");
  }
  return engine;
}

}  // namespace qwen::cli
