// How a cuda program is run, of what the program leaves open.
#pragma once

#include <algorithm>
#include <string>
#include <string_view>

#include "result.h"

namespace qwen {

// What a prefill rounds the inputs of the routed experts to, for speed or for accuracy: the weights are the
// same. Decoding is not affected. The order is that of cuda::ExpertActivations.
enum class ExpertActivations : int { kBfloat16, kInt8, kFloat8 };

inline constexpr std::string_view kExpertActivations[] = {"bfloat16", "int8", "float8"};

struct GpuOptions {
  bool graph = true;  // decode steps are replayed from a CUDA graph, else launched kernel by kernel
  ExpertActivations expert_activations = ExpertActivations::kBfloat16;
};

inline Result<ExpertActivations> parse_expert_activations(const std::string& name) {
  const auto* const found = std::find(std::begin(kExpertActivations), std::end(kExpertActivations), name);
  if (found == std::end(kExpertActivations)) {
    return Error{ErrorCode::kInvalidArgument,
                 "expert_activations is \"" + name + "\": it must be bfloat16, int8 or float8"};
  }
  return static_cast<ExpertActivations>(found - std::begin(kExpertActivations));
}

// Error: kUnsupported, where a GPU of this architecture (80 for 8.0) cannot compute so.
inline Status check_supported(const GpuOptions& options, int architecture, const std::string& gpu) {
  if (options.expert_activations != ExpertActivations::kFloat8 || architecture >= 89) return ok_status();
  return Error{ErrorCode::kUnsupported,
               "expert_activations float8 needs a GPU of compute capability 8.9 or "
               "later, " +
                   gpu + " is of an earlier one; use int8"};
}

}  // namespace qwen
