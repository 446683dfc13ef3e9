// What a run took: memory of this process, and the statistics of an answer as JSON or as one line.
// Thread-safe.
#pragma once

#include <cstdint>
#include <nlohmann/json.hpp>
#include <string>

#include "engine.h"
#include "generate.h"

namespace qwen {

// In bytes. What the kernel does not tell is 0.
struct MemoryUsage {
  uint64_t peak_resident_bytes = 0;  // the most this process ever held, mapped files it touched included
  uint64_t resident_bytes = 0;       // what it holds now
  uint64_t weight_bytes = 0;         // of the program, one copy
  uint64_t state_bytes = 0;          // of the program, all slots
};

MemoryUsage measure_memory(const LoadStats& load);

// The keys are the fields' names.
nlohmann::ordered_json memory_json(const MemoryUsage& memory);
nlohmann::ordered_json timings_json(const Timings& timings);

// {"name", "allocated_bytes", "used_bytes", "total_bytes", "cuda_graph", "graph_nodes", "load_weights_ms"} of
// a cuda program; null for a cpu program.
nlohmann::ordered_json gpu_json(const DeviceStats& device, const LoadStats& load);

// {"text", "tokens", "prompt_tokens", "finish_reason", "seed", "timings", "memory"}, and "logprobs" and "gpu"
// where there are any.
nlohmann::ordered_json generation_json(const Generation& generation, const MemoryUsage& memory,
                                       const nlohmann::ordered_json& gpu);

// For a person, one line without its end: what was not measured is left out.
std::string statistics_line(const Generation& generation, const MemoryUsage& memory,
                            const DeviceStats& device);

}  // namespace qwen
