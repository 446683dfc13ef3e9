// The options of one generation, declared once: the CLI's flags, Python's keyword arguments and the JSON all follow from
// generation_options().
#pragma once

#include <cstdint>
#include <nlohmann/json.hpp>
#include <span>
#include <string>
#include <string_view>
#include <vector>

#include "manifest.h"
#include "result.h"
#include "sampling.h"

namespace qwen {

struct GenerateOptions {
  SamplingOptions sampling;
  int64_t max_new_tokens = 256;
  std::vector<std::string> stop;  // the answer ends before any of these
  bool ignore_eos = false;
  bool echo = false;      // the text begins with the prompt
  bool logprobs = false;  // return the log-probability of every generated token
};

enum class OptionType { kInteger, kNumber, kBoolean, kStrings };

struct OptionSpec {
  const char* name;  // snake_case: `--name` (or with hyphens), the keyword argument and the JSON key
  OptionType type;
  const char* help;  // one line: meaning, unit, neutral value
  // Reads the value and checks it. Error: kInvalidArgument naming option, value and what is allowed.
  Status (*apply)(const nlohmann::json& value, GenerateOptions& options);
  nlohmann::json (*get)(const GenerateOptions& options);
};

// Every option of a generation, in the order help prints them.
std::span<const OptionSpec> generation_options();

// The program's defaults, overridden by `values`, an object of option name to value. Unknown keys are errors that name
// the nearest known one. Error: kInvalidArgument.
Result<GenerateOptions> make_generate_options(const Manifest& manifest, const nlohmann::json& values);

}  // namespace qwen
