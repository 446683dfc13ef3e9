#include "stats.h"

#include <cstdarg>
#include <cstdio>
#include <fstream>

namespace qwen {
namespace {

std::string format(const char* pattern, ...) __attribute__((format(printf, 1, 2)));
std::string format(const char* pattern, ...) {
  char line[256];
  va_list values;
  va_start(values, pattern);
  std::vsnprintf(line, sizeof line, pattern, values);
  va_end(values);
  return line;
}

}  // namespace

MemoryUsage measure_memory(const LoadStats& load) {
  MemoryUsage memory;
  memory.weight_bytes = load.weight_bytes;
  memory.state_bytes = load.state_bytes;
  std::ifstream status("/proc/self/status");
  for (std::string line; std::getline(status, line);) {
    unsigned long long kib = 0;
    if (std::sscanf(line.c_str(), "VmHWM: %llu kB", &kib) == 1) {
      memory.peak_resident_bytes = kib * 1024;
    } else if (std::sscanf(line.c_str(), "VmRSS: %llu kB", &kib) == 1) {
      memory.resident_bytes = kib * 1024;
    }
  }
  return memory;
}

nlohmann::ordered_json memory_json(const MemoryUsage& memory) {
  return {{"peak_resident_bytes", memory.peak_resident_bytes},
          {"resident_bytes", memory.resident_bytes},
          {"weight_bytes", memory.weight_bytes},
          {"state_bytes", memory.state_bytes}};
}

nlohmann::ordered_json timings_json(const Timings& timings) {
  return {{"load_ms", timings.load_ms},
          {"ttft_ms", timings.ttft_ms},
          {"prefill_tokens_per_second", timings.prefill_tokens_per_second},
          {"decode_tokens_per_second", timings.decode_tokens_per_second}};
}

nlohmann::ordered_json gpu_json(const DeviceStats& device, const LoadStats& load) {
  if (device.name.empty()) return nullptr;
  return {{"name", device.name},
          {"allocated_bytes", device.allocated_bytes},
          {"used_bytes", device.used_bytes},
          {"total_bytes", device.total_bytes},
          {"cuda_graph", device.graph_nodes > 0},
          {"graph_nodes", device.graph_nodes},
          {"load_weights_ms", load.weights_ms}};
}

nlohmann::ordered_json generation_json(const Generation& generation, const MemoryUsage& memory,
                                       const nlohmann::ordered_json& gpu) {
  nlohmann::ordered_json object = {{"text", generation.text},
                                   {"tokens", generation.tokens},
                                   {"prompt_tokens", generation.prompt_tokens},
                                   {"finish_reason", to_string(generation.finish_reason)},
                                   {"seed", generation.seed},
                                   {"timings", timings_json(generation.timings)},
                                   {"memory", memory_json(memory)}};
  if (!generation.logprobs.empty()) {
    object["logprobs"] = generation.logprobs;
  }
  if (!gpu.is_null()) {
    object["gpu"] = gpu;
  }
  return object;
}

std::string statistics_line(const Generation& generation, const MemoryUsage& memory,
                            const DeviceStats& device) {
  const Timings& timings = generation.timings;
  std::string line =
      format("prompt %lld tokens, answer %zu tokens (%s)", static_cast<long long>(generation.prompt_tokens),
             generation.tokens.size(), to_string(generation.finish_reason));
  if (timings.ttft_ms > 0) {
    line += format(", first token %.1f ms, prefill %.1f tok/s", timings.ttft_ms,
                   timings.prefill_tokens_per_second);
  }
  if (timings.decode_tokens_per_second > 0) {
    line += format(", decode %.1f tok/s", timings.decode_tokens_per_second);
  }
  line += format(", load %.0f ms, peak memory %.0f MiB", timings.load_ms,
                 static_cast<double>(memory.peak_resident_bytes) / (1 << 20));
  if (!device.name.empty()) {
    line += format(", GPU memory %.0f MiB", static_cast<double>(device.allocated_bytes) / (1 << 20));
  }
  if (generation.seed != 0) {
    line += format(", seed %lld", static_cast<long long>(generation.seed));
  }
  return line;
}

}  // namespace qwen
