#include "cli_generate.h"

#include <cctype>
#include <csignal>

#include "cli_engine.h"
#include "cli_flags.h"
#include "cli_output.h"
#include "generate.h"
#include "options.h"
#include "session.h"
#include "stats.h"

namespace qwen::cli {
namespace {

using nlohmann::json;

CancelFlag interrupted = false;
static_assert(CancelFlag::is_always_lock_free, "a signal handler sets it");

void cancel_on_interrupt() {
  struct sigaction action{};
  action.sa_handler = [](int) { interrupted = true; };
  action.sa_flags = static_cast<int>(SA_RESETHAND | SA_RESTART);
  sigaction(SIGINT, &action, nullptr);
}

const char* label(OptionType type) {
  return type == OptionType::kInteger ? "INTEGER" : type == OptionType::kNumber ? "NUMBER" : "TEXT";
}

CLI::Option* add_option(CLI::App& app, const OptionSpec& spec) {
  std::string help = spec.help;
  help.front() = static_cast<char>(std::toupper(help.front()));
  CLI::Option* const option = spec.type == OptionType::kBoolean ? add_switch(app, spec.name, help)
                              : spec.type == OptionType::kStrings
                                  ? add_values(app, spec.name, label(spec.type), help)
                                  : add_value(app, spec.name, label(spec.type), help);
  return option->group("Generation (defaults: the program's, then the model's)");
}

// A number that cannot be read stays text, which the option's own check then refuses by its own words.
Result<json> option_value(const OptionSpec& spec, const CLI::Option& option) {
  const std::string text = given_value(option).value_or("");
  switch (spec.type) {
    case OptionType::kBoolean: {
      QWEN_ASSIGN_OR_RETURN(const auto on, given_switch(option));
      return json(on.value_or(false));
    }
    case OptionType::kStrings:
      return json(given_values(option));
    case OptionType::kInteger:
      if (const auto number = parse_integer(text)) {
        return json(*number);
      }
      return json(text);
    case OptionType::kNumber:
      if (const auto number = parse_number(text)) {
        return json(*number);
      }
      return json(text);
  }
  return json(text);
}

}  // namespace

GenerateCommand::GenerateCommand(CLI::App& app)
    : program_(add_value(app, "program", "DIR",
                         "Folder of the program, as python -m qwen_runner.export writes it")),
      prompt_(app) {
  for (const OptionSpec& spec : generation_options()) {
    options_.push_back(add_option(app, spec));
  }
  engine_flags_.emplace(app);
  json_ = add_switch(app, "json",
                     "Print one JSON object at the end, statistics included, instead of streaming text");
  quiet_ = add_switch(app, "quiet", "No statistics and no warnings on stderr");
}

Result<json> GenerateCommand::option_values() const {
  json values = json::object();
  const auto specs = generation_options();
  for (size_t i = 0; i < specs.size(); ++i) {
    if (options_[i]->count() != 0) {
      QWEN_ASSIGN_OR_RETURN(values[specs[i].name], option_value(specs[i], *options_[i]));
    }
  }
  return values;
}

Result<int> GenerateCommand::run() const {
  QWEN_ASSIGN_OR_RETURN(const json values, option_values());
  QWEN_RETURN_IF_ERROR(make_generate_options(Manifest{}, values));
  QWEN_ASSIGN_OR_RETURN(const EngineOptions load_options, engine_flags_->options());
  QWEN_ASSIGN_OR_RETURN(const auto json_flag, given_switch(*json_));
  QWEN_ASSIGN_OR_RETURN(const auto quiet_flag, given_switch(*quiet_));
  const bool as_json = json_flag.value_or(false);
  const bool quiet = quiet_flag.value_or(false);
  if (!as_json && values.value("logprobs", false)) {
    return Error{ErrorCode::kInvalidArgument, "--logprobs has nowhere to go in plain text: add --json"};
  }
  QWEN_ASSIGN_OR_RETURN(const std::string folder, given_program(*program_));
  QWEN_ASSIGN_OR_RETURN(const Prompt prompt, prompt_.read());

  QWEN_ASSIGN_OR_RETURN(const std::unique_ptr<Engine> engine, load_engine(folder, load_options, quiet));
  QWEN_ASSIGN_OR_RETURN(const GenerateOptions options, make_generate_options(engine->manifest(), values));
  QWEN_ASSIGN_OR_RETURN(const std::vector<int64_t> tokens, prompt.encode(*engine));
  QWEN_ASSIGN_OR_RETURN(Session session, engine->open_session());

  Output output;
  const PieceCallback stream = [&output](std::string_view piece) { return output.write(piece); };
  cancel_on_interrupt();
  const Result<Generation> generation =
      generate(*engine, session, tokens, options, as_json ? PieceCallback() : stream, &interrupted);
  output.end_line();
  if (!generation.ok()) {
    return generation.error();
  }
  const MemoryUsage memory = measure_memory(engine->load_stats());
  if (as_json) {
    output.write_json(
        generation_json(*generation, memory, gpu_json(engine->device_stats(), engine->load_stats())));
  }
  QWEN_RETURN_IF_ERROR(output.status());
  if (output.closed()) {
    return 0;
  }
  if (!as_json && !quiet) {
    print_line(statistics_line(*generation, memory, engine->device_stats()));
  }
  return generation->finish_reason == FinishReason::kCancelled ? kInterruptedStatus : 0;
}

}  // namespace qwen::cli
