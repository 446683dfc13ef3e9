#include "cli_flags.h"

#include <algorithm>
#include <charconv>

#include "options.h"

namespace qwen::cli {
namespace {

constexpr const char* kHowToGetAProgram =
    "`make run` builds the demo's, `python -m qwen_runner.export CHECKPOINT --output DIR` makes one of a "
    "checkpoint";

std::string both_spellings(const std::string& name) {
  std::string hyphens = name;
  std::replace(hyphens.begin(), hyphens.end(), '_', '-');
  return hyphens == name ? "--" + name : "--" + name + ",--" + hyphens;
}

std::string spelled(const CLI::Option& option) { return "--" + option.get_lnames().front(); }

Error not_allowed(const CLI::Option& option, const std::string& value, const std::string& allowed) {
  return {ErrorCode::kInvalidArgument, spelled(option) + " is \"" + value + "\": it must be " + allowed};
}

class Formatter : public CLI::Formatter {
 public:
  std::string make_option_name(const CLI::Option* option, bool is_positional) const override {
    if (is_positional) {
      return CLI::Formatter::make_option_name(option, is_positional);
    }
    const auto& shorts = option->get_snames();
    return (shorts.empty() ? "" : "-" + shorts.front() + ", ") + spelled(*option);
  }
};

template <typename Number>
std::optional<Number> parse_all(const std::string& text) {
  Number number{};
  const char* const end = text.data() + text.size();
  const auto parsed = std::from_chars(text.data(), end, number);
  return parsed.ec == std::errc() && parsed.ptr == end ? std::optional<Number>(number) : std::nullopt;
}

}  // namespace

CLI::Option* add_value(CLI::App& app, const std::string& name, const std::string& label,
                       const std::string& help) {
  return app.add_option(both_spellings(name), help)
      ->type_name(label)
      ->multi_option_policy(CLI::MultiOptionPolicy::TakeLast);
}

CLI::Option* add_values(CLI::App& app, const std::string& name, const std::string& label,
                        const std::string& help) {
  return add_value(app, name, label, help)->multi_option_policy(CLI::MultiOptionPolicy::TakeAll);
}

CLI::Option* add_switch(CLI::App& app, const std::string& name, const std::string& help) {
  return app.add_flag(both_spellings(name), help)->multi_option_policy(CLI::MultiOptionPolicy::TakeLast);
}

CLI::Option* add_program(CLI::App& app) {
  return app.add_option("DIR,--program", "Folder of the program")
      ->type_name("")
      ->multi_option_policy(CLI::MultiOptionPolicy::TakeLast);
}

// results() are the arguments as they were written; CLI11's conversions would take quotes, brackets and
// escapes off.
std::optional<std::string> given_value(const CLI::Option& option) {
  return option.results().empty() ? std::nullopt : std::optional<std::string>(option.results().back());
}

std::vector<std::string> given_values(const CLI::Option& option) { return option.results(); }

Result<std::optional<bool>> given_switch(const CLI::Option& option) {
  const std::optional<std::string> value = given_value(option);
  if (!value) {
    return std::optional<bool>();
  }
  if (*value == "on" || *value == "true" || *value == "1") {
    return std::optional<bool>(true);
  }
  if (*value == "off" || *value == "false" || *value == "0") {
    return std::optional<bool>(false);
  }
  return not_allowed(option, *value, "on or off");
}

Result<std::optional<int64_t>> given_integer(const CLI::Option& option, int64_t minimum) {
  const std::optional<std::string> value = given_value(option);
  if (!value) {
    return std::optional<int64_t>();
  }
  const std::optional<int64_t> number = parse_integer(*value);
  if (!number || *number < minimum) {
    return not_allowed(option, *value, "an integer of at least " + std::to_string(minimum));
  }
  return number;
}

Result<std::string> given_program(const CLI::Option& option) {
  const std::optional<std::string> folder = given_value(option);
  if (!folder || folder->empty()) {
    return Error{ErrorCode::kInvalidArgument,
                 std::string("no program given: name its folder with --program DIR; ") + kHowToGetAProgram};
  }
  return *folder;
}

std::optional<int64_t> parse_integer(const std::string& text) { return parse_all<int64_t>(text); }

std::optional<double> parse_number(const std::string& text) { return parse_all<double>(text); }

void prepare(CLI::App& app) {
  app.allow_extras();
  app.formatter(std::make_shared<Formatter>());
  app.get_help_ptr()->description("Print this help and exit");
}

Status refuse_unknown(const CLI::App& app) {
  const std::vector<std::string> unknown = app.remaining(/*recurse=*/true);
  if (unknown.empty()) {
    return ok_status();
  }
  const auto subcommands = app.get_subcommands();
  const CLI::App& command = subcommands.empty() ? app : *subcommands.front();
  const std::string help =
      "; see " + (&command == &app ? "" : app.get_name() + " ") + command.get_name() + " --help";
  const std::string argument = unknown.front().substr(0, unknown.front().find('='));
  if (!argument.starts_with('-')) {
    return Error{ErrorCode::kInvalidArgument, "unexpected argument \"" + unknown.front() + "\"" +
                                                  (&command == &app ? ": a prompt goes after --prompt" : "") +
                                                  help};
  }
  std::vector<std::string> known;
  for (const CLI::Option* option : command.get_options()) {
    if (!option->get_lnames().empty()) {
      known.push_back(option->get_lnames().front());
    }
  }
  const std::string nearest =
      nearest_name(argument.substr(std::min(argument.find_first_not_of('-'), argument.size())), known);
  return Error{ErrorCode::kInvalidArgument, "unknown flag " + argument +
                                                (nearest.empty() ? "" : "; did you mean --" + nearest + "?") +
                                                (nearest.empty() ? help : "")};
}

}  // namespace qwen::cli
