// Flags of the command line. Each is accepted with underscores or hyphens (--top_k, --top-k) and shown once
// in the help; of a flag given twice the last one counts; an unknown one is an error that names the nearest
// known.
//
// Not thread-safe, as CLI11 is not. The options returned belong to their app.
#pragma once

#include <CLI/CLI.hpp>
#include <cstdint>
#include <memory>
#include <optional>
#include <string>
#include <vector>

#include "result.h"

namespace qwen::cli {

// `--name LABEL`.
CLI::Option* add_value(CLI::App& app, const std::string& name, const std::string& label,
                       const std::string& help);
// `--name LABEL`, every time it is given.
CLI::Option* add_values(CLI::App& app, const std::string& name, const std::string& label,
                        const std::string& help);
// `--name`, `--name=on` or `--name=off`.
CLI::Option* add_switch(CLI::App& app, const std::string& name, const std::string& help);
// The folder of a program, as `DIR` or `--program DIR`.
CLI::Option* add_program(CLI::App& app);

// What was given, if anything was. Errors: kInvalidArgument naming flag, value and what is allowed.
std::optional<std::string> given_value(const CLI::Option& option);
std::vector<std::string> given_values(const CLI::Option& option);
Result<std::optional<bool>> given_switch(const CLI::Option& option);
Result<std::optional<int64_t>> given_integer(const CLI::Option& option, int64_t minimum);
Result<std::string> given_program(const CLI::Option& option);

// All of `text` as a number, or nothing.
std::optional<int64_t> parse_integer(const std::string& text);
std::optional<double> parse_number(const std::string& text);

// Prepares an app or subcommand: unknown arguments are left to refuse_unknown(), and help shows each flag
// once.
void prepare(CLI::App& app);

// Error: kInvalidArgument for the first argument that neither `app` nor its subcommand knows.
Status refuse_unknown(const CLI::App& app);

}  // namespace qwen::cli
