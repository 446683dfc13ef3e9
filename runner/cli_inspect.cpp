#include "cli_inspect.h"

#include <cstdio>
#include <filesystem>
#include <string>
#include <system_error>

#include "cli_flags.h"
#include "cli_output.h"
#include "file.h"
#include "manifest.h"
#include "options.h"

namespace qwen::cli {
namespace {

using json = nlohmann::ordered_json;

Result<Manifest> read_manifest(const std::string& folder) {
  std::error_code error;
  if (!std::filesystem::is_directory(folder, error)) {
    return Error{ErrorCode::kNotFound, "there is no program folder " + folder + ": check the path"};
  }
  const std::string path = folder + "/" + kManifestFile;
  if (!std::filesystem::exists(path, error)) {
    return Error{ErrorCode::kNotFound, folder + " has no " + kManifestFile +
                                           ": it is not a program; python -m qwen_runner.export writes one"};
  }
  QWEN_ASSIGN_OR_RETURN(const std::string text, read_file(path));
  return Manifest::parse(text, path);
}

Status check_sizes(const Manifest& manifest, const std::string& folder) {
  for (const auto& [name, digest] : manifest.files) {
    const std::string path = folder + "/" + name;
    std::error_code error;
    const uint64_t size = std::filesystem::file_size(path, error);
    if (error) {
      return Error{ErrorCode::kNotFound, path + " is missing: export or copy the program again"};
    }
    if (size != digest.size) {
      return Error{ErrorCode::kCorrupt, path + " has " + std::to_string(size) + " bytes instead of " +
                                            std::to_string(digest.size) +
                                            ": export or copy the program again"};
    }
  }
  return ok_status();
}

// The defaults of every option of the sampling, as the manifest sets them.
json sampling_defaults(const Manifest& manifest) {
  GenerateOptions options;
  options.sampling = manifest.sampling;
  json defaults = json::object();
  for (const OptionSpec& spec : generation_options()) {
    if (spec.type == OptionType::kInteger || spec.type == OptionType::kNumber) {
      defaults[spec.name] = spec.get(options);
    }
  }
  defaults.erase("seed");  // random where none is given
  return defaults;
}

json description(const Manifest& manifest) {
  json files = json::object();
  uint64_t total = 0;
  for (const auto& [name, digest] : manifest.files) {
    files[name] = digest.size;
    total += digest.size;
  }
  return {{"name", manifest.name},
          {"format_version", kProgramFormatVersion},
          {"target", {{"device", manifest.device}, {"isa", manifest.isa}}},
          {"dtype", manifest.dtype},
          {"quantization", manifest.quantization},
          {"max_seq_len", manifest.max_seq_len},
          {"chunk", manifest.chunk},
          {"slots", manifest.slots},
          {"batch", manifest.batch},
          {"vocab_size", manifest.vocab_size},
          {"eos_token_ids", manifest.eos_token_ids},
          {"chat", manifest.chat.value("supported", false)},
          {"defaults", sampling_defaults(manifest)},
          {"model", manifest.model},
          {"versions", manifest.versions},
          {"files", files},
          {"total_bytes", total}};
}

std::string plain(const json& value) {
  return value.is_string() ? value.get<std::string>()
                           : value.dump(-1, ' ', false, json::error_handler_t::replace);
}

std::string row(const std::string& label, const std::string& value) {
  constexpr size_t kLabelWidth = 34;
  return label + std::string(label.size() < kLabelWidth ? kLabelWidth - label.size() : 1, ' ') + value + "\n";
}

std::string section(const std::string& title, const json& object, const std::string& unit = "") {
  std::string text = "\n" + title + "\n";
  for (const auto& [key, value] : object.items()) {
    text += row("  " + key, plain(value) + unit);
  }
  return text;
}

std::string bytes(uint64_t count) {
  char text[32];
  std::snprintf(text, sizeof text, "%.1f MiB", static_cast<double>(count) / (1 << 20));
  return text;
}

std::string table(const Manifest& manifest, const json& all) {
  const std::string chat = manifest.chat.value("supported", false)
                               ? "yes"
                               : "no: " + manifest.chat.value("reason", "the model has no template");
  std::string text =
      row("program", manifest.name) + row("format", std::to_string(kProgramFormatVersion)) +
      row("target", manifest.device + (manifest.device == "cpu" ? " (" + manifest.isa + ")" : "")) +
      row("activations", manifest.dtype) + row("weights", manifest.quantization.value("scheme", "none")) +
      row("longest sequence", std::to_string(manifest.max_seq_len) + " tokens") +
      row("prefill chunk", std::to_string(manifest.chunk) + " tokens") +
      row("sessions at once", std::to_string(manifest.slots)) +
      row("sessions a decode step", std::to_string(manifest.batch)) +
      row("vocabulary", std::to_string(manifest.vocab_size)) +
      row("end of answer", plain(all["eos_token_ids"])) + row("chat", chat) +
      row("size", bytes(all["total_bytes"].get<uint64_t>()));
  return text + section("quantization", all["quantization"]) + section("defaults", all["defaults"]) +
         section("model", all["model"]) + section("versions", all["versions"]) +
         section("files", all["files"], " bytes");
}

}  // namespace

InspectCommand::InspectCommand(CLI::App& app)
    : program_(add_program(app)),
      json_(add_switch(app, "json", "Print one JSON object instead of a table")) {}

Result<int> InspectCommand::run() const {
  QWEN_ASSIGN_OR_RETURN(const auto as_json, given_switch(*json_));
  QWEN_ASSIGN_OR_RETURN(const std::string folder, given_program(*program_));
  QWEN_ASSIGN_OR_RETURN(const Manifest manifest, read_manifest(folder));
  QWEN_RETURN_IF_ERROR(check_sizes(manifest, folder));
  const json all = description(manifest);
  Output output;
  if (as_json.value_or(false)) {
    output.write_json(all, /*indent=*/2);
  } else {
    output.write(table(manifest, all));
  }
  QWEN_RETURN_IF_ERROR(output.status());
  return 0;
}

}  // namespace qwen::cli
