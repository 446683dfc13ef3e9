// The options of one generation, declared once: the CLI's flags, Python's keyword arguments and the JSON all
// follow from generation_options(). Everything here is a pure function or immutable: safe from any thread.
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
  const char* help;     // one line: meaning, unit, neutral value
  const char* allowed;  // what values it takes, to follow "it must be"
  // Sets the option; returns false, and changes nothing, when the value is not allowed.
  bool (*set)(const nlohmann::json& value, GenerateOptions& options);
  nlohmann::json (*get)(const GenerateOptions& options);
};

// Every option of a generation, in the order help prints them.
std::span<const OptionSpec> generation_options();

// The program's defaults, overridden by `values`, an object of option name to value; null stands for the
// default. Where the result samples and no seed is given, it gets a random one, so that two calls differ.
// Errors: kInvalidArgument naming the option, its value and what is allowed, or for an unknown key the
// nearest known.
Result<GenerateOptions> make_generate_options(const Manifest& manifest, const nlohmann::json& values);

// Which of `known` was probably meant by `name` (hyphens count as underscores); empty when none is near.
std::string nearest_name(std::string_view name, std::span<const std::string> known);

}  // namespace qwen
