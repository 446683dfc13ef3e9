// The program `qwen_runner`: reads the command line and hands over to one of its commands.
#include <CLI/CLI.hpp>
#include <csignal>
#include <exception>
#include <new>

#include "cli_bench.h"
#include "cli_flags.h"
#include "cli_generate.h"
#include "cli_inspect.h"
#include "cli_output.h"

namespace {

using qwen::Error;
using qwen::ErrorCode;
using qwen::Result;

constexpr const char* kFooter = R"(Examples:
  qwen_runner --program DIR --prompt "Once upon a time"
  echo "What is a prime?" | qwen_runner --program DIR --chat --prompt_file -
  qwen_runner --program DIR --prompt "1, 2, 3," --temperature 0 --max_new_tokens 32 --json

The answer goes to stdout, one line of statistics or of error to stderr. Flags may be written with hyphens too.
Ctrl-C ends the answer and keeps its statistics; a second one ends the process.
Exit status: 0, 1 for a failure, 2 for a wrong command line, 130 after Ctrl-C.)";

Result<int> run(int argc, char** argv) {
  CLI::App app("Generates text with an exported Qwen3.5-MoE program.", "qwen_runner");
  qwen::cli::prepare(app);
  app.set_version_flag("--version", "qwen_runner " QWEN_VERSION, "Print the version and exit");
  const qwen::cli::GenerateCommand generate(app);

  CLI::App& inspect_app = *app.add_subcommand("inspect", "Print what a program is");
  qwen::cli::prepare(inspect_app);
  const qwen::cli::InspectCommand inspect(inspect_app);

  CLI::App& bench_app = *app.add_subcommand("bench", "Measure the speed of a program");
  qwen::cli::prepare(bench_app);
  const qwen::cli::BenchCommand bench(bench_app);

  app.footer(kFooter);  // last, since subcommands inherit what is there before them

  try {
    app.parse(argc, argv);
  } catch (const CLI::Success& help_or_version) {
    return app.exit(help_or_version);
  } catch (const CLI::ParseError& error) {
    return Error{ErrorCode::kInvalidArgument, std::string(error.what()) + "; see qwen_runner --help"};
  }
  QWEN_RETURN_IF_ERROR(qwen::cli::refuse_unknown(app));
  return inspect_app.parsed() ? inspect.run() : bench_app.parsed() ? bench.run() : generate.run();
}

int report(const Error& error) {
  qwen::cli::print_error(error);
  return qwen::cli::exit_status(error);
}

}  // namespace

int main(int argc, char** argv) {
  std::signal(SIGPIPE, SIG_IGN);  // a reader that has gone is seen where it is written to
  try {
    const Result<int> status = run(argc, argv);
    return status.ok() ? status.value() : report(status.error());
  } catch (const std::bad_alloc&) {
    return report({ErrorCode::kOutOfMemory, "out of memory"});
  } catch (const std::exception& exception) {
    return report({ErrorCode::kInternal, exception.what()});
  }
}
