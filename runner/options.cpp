#include "options.h"

#include <algorithm>
#include <cmath>
#include <numeric>
#include <random>
#include <utility>

namespace qwen {
namespace {

using nlohmann::json;

bool set_integer(const json& value, int64_t minimum, int64_t& field) {
  const bool representable =
      value.is_number_integer() && !(value.is_number_unsigned() && value.get<uint64_t>() > INT64_MAX);
  if (!representable || value.get<int64_t>() < minimum) {
    return false;
  }
  field = value.get<int64_t>();
  return true;
}

// The limits are inclusive; NaN and infinities are outside of any.
bool set_number(const json& value, double minimum, double maximum, double& field) {
  if (!value.is_number() || !(value.get<double>() >= minimum && value.get<double>() <= maximum)) {
    return false;
  }
  field = value.get<double>();
  return true;
}

bool set_boolean(const json& value, bool& field) {
  if (!value.is_boolean()) {
    return false;
  }
  field = value.get<bool>();
  return true;
}

bool is_text(const json& value) { return value.is_string() && !value.get_ref<const std::string&>().empty(); }

bool set_strings(const json& value, std::vector<std::string>& field) {
  if (is_text(value)) {
    field = {value.get<std::string>()};
    return true;
  }
  if (!value.is_array() || !std::all_of(value.begin(), value.end(), is_text)) {
    return false;
  }
  field = value.get<std::vector<std::string>>();
  return true;
}

// The bounds of temperature and penalties are where float32, in which the program computes, still resolves
// them.
constexpr OptionSpec kOptions[] = {
    {"max_new_tokens", OptionType::kInteger, "most tokens to generate; 256 if not given",
     "an integer of at least 0",
     [](const json& v, GenerateOptions& o) { return set_integer(v, 0, o.max_new_tokens); },
     [](const GenerateOptions& o) -> json { return o.max_new_tokens; }},
    {"temperature", OptionType::kNumber, "randomness of the answer; 0 always takes the most likely token",
     "a number from 0 to 100",
     [](const json& v, GenerateOptions& o) { return set_number(v, 0, 100, o.sampling.temperature); },
     [](const GenerateOptions& o) -> json { return o.sampling.temperature; }},
    {"top_k", OptionType::kInteger, "sample among the k most likely tokens; 0 among all",
     "an integer of at least 0",
     [](const json& v, GenerateOptions& o) { return set_integer(v, 0, o.sampling.top_k); },
     [](const GenerateOptions& o) -> json { return o.sampling.top_k; }},
    {"top_p", OptionType::kNumber,
     "sample among the most likely tokens that together reach this probability; 1 among all",
     "a number above 0 and at most 1",
     [](const json& v, GenerateOptions& o) {
       return set_number(v, std::nextafter(0.0, 1.0), 1, o.sampling.top_p);
     },
     [](const GenerateOptions& o) -> json { return o.sampling.top_p; }},
    {"min_p", OptionType::kNumber,
     "drop tokens less likely than this fraction of the most likely one; 0 drops none",
     "a number from 0 to 1",
     [](const json& v, GenerateOptions& o) { return set_number(v, 0, 1, o.sampling.min_p); },
     [](const GenerateOptions& o) -> json { return o.sampling.min_p; }},
    {"presence_penalty", OptionType::kNumber,
     "subtracted from the logit of every token generated before; 0 is off", "a number from -100 to 100",
     [](const json& v, GenerateOptions& o) { return set_number(v, -100, 100, o.sampling.presence_penalty); },
     [](const GenerateOptions& o) -> json { return o.sampling.presence_penalty; }},
    {"repetition_penalty", OptionType::kNumber,
     "divides the logit of every token seen before, prompt included; 1 is off", "a number from 0.01 to 100",
     [](const json& v, GenerateOptions& o) {
       return set_number(v, 0.01, 100, o.sampling.repetition_penalty);
     },
     [](const GenerateOptions& o) -> json { return o.sampling.repetition_penalty; }},
    {"seed", OptionType::kInteger, "same seed, same text; random when not given",
     "an integer from 0 to 2^63-1",
     [](const json& v, GenerateOptions& o) { return set_integer(v, 0, o.sampling.seed); },
     [](const GenerateOptions& o) -> json { return o.sampling.seed; }},
    {"stop", OptionType::kStrings, "end the answer before this text; may be given more than once",
     "text that is not empty, or a list of such",
     [](const json& v, GenerateOptions& o) { return set_strings(v, o.stop); },
     [](const GenerateOptions& o) -> json { return o.stop; }},
    {"ignore_eos", OptionType::kBoolean, "generate on past the end of the answer", "true or false",
     [](const json& v, GenerateOptions& o) { return set_boolean(v, o.ignore_eos); },
     [](const GenerateOptions& o) -> json { return o.ignore_eos; }},
    {"echo", OptionType::kBoolean, "begin the text with the prompt", "true or false",
     [](const json& v, GenerateOptions& o) { return set_boolean(v, o.echo); },
     [](const GenerateOptions& o) -> json { return o.echo; }},
    {"logprobs", OptionType::kBoolean, "return the log-probability of every generated token", "true or false",
     [](const json& v, GenerateOptions& o) { return set_boolean(v, o.logprobs); },
     [](const GenerateOptions& o) -> json { return o.logprobs; }},
};

// JSON, but with the numbers that JSON has no word for.
std::string describe(const json& value) {
  if (value.is_number_float() && !std::isfinite(value.get<double>())) {
    const double number = value.get<double>();
    return std::isnan(number) ? "nan" : number > 0 ? "inf" : "-inf";
  }
  return value.dump(-1, ' ', false, json::error_handler_t::replace);
}

std::vector<std::string> option_names() {
  std::vector<std::string> names;
  for (const OptionSpec& spec : kOptions) {
    names.emplace_back(spec.name);
  }
  return names;
}

Error unknown_option(const std::string& name) {
  const std::vector<std::string> names = option_names();
  const std::string nearest = nearest_name(name, names);
  std::string message = "there is no option " + describe(name) + "; ";
  if (!nearest.empty()) {
    return {ErrorCode::kInvalidArgument, message + "did you mean \"" + nearest + "\"?"};
  }
  message += "the options are ";
  for (const std::string& known : names) {
    message += (known == names.front() ? "" : ", ") + known;
  }
  return {ErrorCode::kInvalidArgument, message};
}

int64_t edit_distance(std::string_view a, std::string_view b) {
  std::vector<int64_t> row(b.size() + 1);
  std::iota(row.begin(), row.end(), 0);
  for (size_t i = 1; i <= a.size(); ++i) {
    int64_t diagonal = std::exchange(row[0], static_cast<int64_t>(i));
    for (size_t j = 1; j <= b.size(); ++j) {
      const int64_t replaced = diagonal + (a[i - 1] == b[j - 1] ? 0 : 1);
      diagonal = row[j];
      row[j] = std::min({row[j] + 1, row[j - 1] + 1, replaced});
    }
  }
  return row.back();
}

int64_t random_seed() { return static_cast<int64_t>(std::random_device{}()); }

}  // namespace

std::span<const OptionSpec> generation_options() { return kOptions; }

Result<GenerateOptions> make_generate_options(const Manifest& manifest, const json& values) {
  if (!values.is_object()) {
    return Error{ErrorCode::kInvalidArgument,
                 "the options are " + describe(values) + ": they must be an object of names and values"};
  }
  GenerateOptions options;
  options.sampling = manifest.sampling;
  bool seeded = false;
  for (const auto& item : values.items()) {
    const std::string& name = item.key();
    const json& value = item.value();
    const auto* spec = std::find_if(std::begin(kOptions), std::end(kOptions),
                                    [&](const OptionSpec& s) { return s.name == name; });
    if (spec == std::end(kOptions)) {
      return unknown_option(name);
    }
    if (value.is_null()) {
      continue;
    }
    if (!spec->set(value, options)) {
      return Error{ErrorCode::kInvalidArgument,
                   name + " is " + describe(value) + ": it must be " + spec->allowed};
    }
    seeded = seeded || name == "seed";
  }
  if (options.sampling.temperature > 0 && !seeded) {
    options.sampling.seed = random_seed();
  }
  return options;
}

std::string nearest_name(std::string_view name, std::span<const std::string> known) {
  std::string wanted(name);
  std::replace(wanted.begin(), wanted.end(), '-', '_');
  std::string nearest;
  // Half the letters may differ ("max_tokens" for "max_new_tokens"); one more is not a misspelling.
  int64_t best = std::max<int64_t>(2, static_cast<int64_t>(wanted.size()) / 2) + 1;
  for (const std::string& candidate : known) {
    const bool abbreviated = wanted.size() >= 3 && candidate.starts_with(wanted);
    const int64_t distance = abbreviated ? 1 : edit_distance(wanted, candidate);
    if (distance < best) {
      best = distance;
      nearest = candidate;
    }
  }
  return nearest;
}

}  // namespace qwen
