#include "cli_engine.h"

#include "cli_flags.h"
#include "cli_output.h"

namespace qwen::cli {

EngineFlags::EngineFlags(CLI::App& app)
    : cuda_graph_(add_switch(app, "cuda_graph",
                             "Replay decoding from a CUDA graph, as is done by default; "
                             "=off launches every kernel, "
                             "which is slower and gives the same tokens")),
      expert_activations_(add_value(app, "expert_activations", "TYPE",
                                    "What prefill on a GPU rounds the routed experts' inputs to: bfloat16 "
                                    "(default), or int8 or float8, which are faster and less exact")) {}

Result<EngineOptions> EngineFlags::options() const {
  EngineOptions options;
  QWEN_ASSIGN_OR_RETURN(const auto on, given_switch(*cuda_graph_));
  if (on) {
    options.cuda_graph = *on ? EngineOptions::CudaGraph::kOn : EngineOptions::CudaGraph::kOff;
  }
  if (const auto name = given_value(*expert_activations_)) {
    auto parsed = parse_expert_activations(*name);
    if (!parsed.ok()) return Error{parsed.error().code, "--" + parsed.error().message};
    options.expert_activations = *parsed;
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
  if (engine.ok() && !quiet && engine.value()->manifest().device == "cpu") {
    if (options.cuda_graph == EngineOptions::CudaGraph::kOn) {
      print_warning("--cuda_graph has no effect on a cpu program");
    }
    if (options.expert_activations != ExpertActivations::kBfloat16) {
      print_warning("--expert_activations has no effect on a cpu program");
    }
  }
  return engine;
}

}  // namespace qwen::cli
