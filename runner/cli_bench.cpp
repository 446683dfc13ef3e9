#include "cli_bench.h"

#include <algorithm>
#include <cmath>
#include <cstdio>
#include <numeric>
#include <random>
#include <string>
#include <utility>
#include <vector>

#include "cli_engine.h"
#include "cli_flags.h"
#include "cli_output.h"
#include "engine.h"
#include "generate.h"
#include "session.h"
#include "stats.h"

namespace qwen::cli {
namespace {

using json = nlohmann::ordered_json;

struct Plan {
  int64_t prompt_tokens = 512;
  int64_t new_tokens = 128;
  int64_t repetitions = 5;
  int64_t batch = 1;
};

struct Samples {
  const char* name;  // of the field of Timings and in the JSON
  const char* label;
  const char* unit;
  double Timings::* field;
  bool in_sum = false;  // over the answers of a batch; else their mean
  std::vector<double> values = {};

  double mean() const {
    return std::accumulate(values.begin(), values.end(), 0.0) / static_cast<double>(values.size());
  }
  // Of the sample, so 0 is all that one value can say.
  double deviation() const {
    const double center = mean();
    double squares = 0;
    for (const double value : values) {
      squares += (value - center) * (value - center);
    }
    return values.size() < 2 ? 0 : std::sqrt(squares / static_cast<double>(values.size() - 1));
  }
};

std::vector<int64_t> random_prompt(int64_t count, int64_t vocab_size, int64_t seed) {
  std::mt19937_64 random(static_cast<uint64_t>(seed));
  std::vector<int64_t> ids(static_cast<size_t>(count));
  for (int64_t& id : ids) {
    id = static_cast<int64_t>(random() % static_cast<uint64_t>(vocab_size));
  }
  return ids;
}

// Lengths not asked for shrink to what the program holds; those asked for must fit.
Status fit(Plan& plan, bool prompt_given, bool new_given, int64_t max_seq_len) {
  if (!new_given) {
    const int64_t room = prompt_given ? max_seq_len - plan.prompt_tokens : max_seq_len / 2;
    plan.new_tokens = std::clamp<int64_t>(room, 1, plan.new_tokens);
  }
  if (!prompt_given) {
    plan.prompt_tokens = std::clamp<int64_t>(max_seq_len - plan.new_tokens, 1, plan.prompt_tokens);
  }
  if (plan.prompt_tokens > max_seq_len - plan.new_tokens) {
    return Error{ErrorCode::kInvalidArgument,
                 "--prompt_tokens " + std::to_string(plan.prompt_tokens) + " and --new_tokens " +
                     std::to_string(plan.new_tokens) + " are more than the " + std::to_string(max_seq_len) +
                     " tokens that the program holds: lower them, or export with a larger --max-seq-len"};
  }
  return ok_status();
}

Status fit_batch(const Plan& plan, const Manifest& manifest) {
  if (plan.batch > manifest.batch) {
    return Error{ErrorCode::kInvalidArgument,
                 "--batch " + std::to_string(plan.batch) + " is more than the " +
                     std::to_string(manifest.batch) +
                     " that a decode step of the program advances together: lower it" +
                     (manifest.device == "cuda" ? ", or export with more --slots or a larger --batch" : "")};
  }
  return ok_status();
}

Status measure(Engine& engine, const Plan& plan, std::vector<Samples>& samples) {
  QWEN_ASSIGN_OR_RETURN(std::vector<Session> sessions, engine.open_sessions(plan.batch));
  // Other prompts for others: the same ones would choose the same experts, whose weights are read once.
  std::vector<GenerationRequest> requests(static_cast<size_t>(plan.batch));
  for (int64_t i = 0; i < plan.batch; ++i) {
    GenerationRequest& request = requests[static_cast<size_t>(i)];
    request.prompt = random_prompt(plan.prompt_tokens, engine.manifest().vocab_size, /*seed=*/i);
    request.options.max_new_tokens = plan.new_tokens;
    request.options.ignore_eos = true;
  }
  for (int64_t i = -1; i < plan.repetitions; ++i) {
    QWEN_ASSIGN_OR_RETURN(const std::vector<Generation> answers, generate_batch(engine, sessions, requests));
    for (Samples& sample : samples) {
      double sum = 0;
      for (const Generation& answer : answers) sum += answer.timings.*sample.field;
      if (i >= 0) {
        sample.values.push_back(sample.in_sum ? sum : sum / static_cast<double>(plan.batch));
      }
    }
  }
  return ok_status();
}

json report_json(const Engine& engine, const Plan& plan, const std::vector<Samples>& samples) {
  const Manifest& manifest = engine.manifest();
  json report = {{"program", manifest.name},
                 {"device", manifest.device},
                 {"isa", manifest.isa},
                 {"dtype", manifest.dtype},
                 {"quantization", manifest.quantization},
                 {"prompt_tokens", plan.prompt_tokens},
                 {"new_tokens", plan.new_tokens},
                 {"repetitions", plan.repetitions},
                 {"batch", plan.batch},
                 {"load_ms", engine.load_stats().load_ms},
                 {"memory", memory_json(measure_memory(engine.load_stats()))}};
  for (const Samples& sample : samples) {
    report[sample.name] = {
        {"mean", sample.mean()}, {"deviation", sample.deviation()}, {"values", sample.values}};
  }
  if (json gpu = gpu_json(engine.device_stats(), engine.load_stats()); !gpu.is_null()) {
    report["gpu"] = std::move(gpu);
  }
  return report;
}

template <typename... Values>
std::string line(const char* pattern, Values... values) {
  char text[160];
  std::snprintf(text, sizeof text, pattern, values...);
  return std::string(text) + "\n";
}

std::string report_table(const Engine& engine, const Plan& plan, const std::vector<Samples>& samples) {
  const Manifest& manifest = engine.manifest();
  const MemoryUsage memory = measure_memory(engine.load_stats());
  constexpr double kMebibyte = 1 << 20;
  std::string text = manifest.name + ", " + manifest.device + ", " + manifest.dtype + ", " +
                     manifest.quantization.value("scheme", "none") + "\n";
  text += line("prompt of %lld tokens, %lld new tokens, %lld repetitions after one to warm up",
               static_cast<long long>(plan.prompt_tokens), static_cast<long long>(plan.new_tokens),
               static_cast<long long>(plan.repetitions));
  if (plan.batch > 1) {
    text += line("%lld answers at once, of which this is the mean; prompts are run one after the other",
                 static_cast<long long>(plan.batch));
  }
  text += '\n';
  text += line("%-14s %12s %12s  %s", "", "mean", "deviation", "unit");
  for (const Samples& sample : samples) {
    text += line("%-14s %12.2f %12.2f  %s", sample.label, sample.mean(), sample.deviation(), sample.unit);
  }
  text += line("%-14s %12.2f %12s  %s", "load", engine.load_stats().load_ms, "", "ms");
  text += line("%-14s %12.2f %12s  %s", "peak memory",
               static_cast<double>(memory.peak_resident_bytes) / kMebibyte, "", "MiB");
  text += line("%-14s %12.2f %12s  %s", "weights", static_cast<double>(memory.weight_bytes) / kMebibyte, "",
               "MiB");
  text +=
      line("%-14s %12.2f %12s  %s", "state", static_cast<double>(memory.state_bytes) / kMebibyte, "", "MiB");
  if (const DeviceStats device = engine.device_stats(); !device.name.empty()) {
    text += line("%-14s %12.2f %12s  %s", "GPU memory",
                 static_cast<double>(device.allocated_bytes) / kMebibyte, "", "MiB");
    text +=
        line("%-14s %12lld %12s  %s", "CUDA graph", static_cast<long long>(device.graph_nodes), "", "nodes");
    text += "on " + device.name + "\n";
  }
  return text;
}

}  // namespace

BenchCommand::BenchCommand(CLI::App& app)
    : program_(add_program(app)),
      prompt_tokens_(add_value(app, "prompt_tokens", "INTEGER", "Length of the prompt (512, or what fits)")),
      new_tokens_(add_value(app, "new_tokens", "INTEGER", "Tokens to generate (128, or what fits)")),
      repetitions_(add_value(app, "repetitions", "INTEGER", "Answers to measure (5)")),
      batch_(add_value(app, "batch", "INTEGER", "Answers to generate at once (1)")),
      engine_flags_(app),
      json_(add_switch(app, "json", "Print one JSON object instead of a table")) {}

Result<int> BenchCommand::run() const {
  Plan plan;
  QWEN_ASSIGN_OR_RETURN(const auto prompt_tokens, given_integer(*prompt_tokens_, 1));
  QWEN_ASSIGN_OR_RETURN(const auto new_tokens, given_integer(*new_tokens_, 1));
  QWEN_ASSIGN_OR_RETURN(const auto repetitions, given_integer(*repetitions_, 1));
  QWEN_ASSIGN_OR_RETURN(const auto batch, given_integer(*batch_, 1));
  QWEN_ASSIGN_OR_RETURN(const EngineOptions load_options, engine_flags_.options());
  QWEN_ASSIGN_OR_RETURN(const auto as_json, given_switch(*json_));
  QWEN_ASSIGN_OR_RETURN(const std::string folder, given_program(*program_));
  plan.prompt_tokens = prompt_tokens.value_or(plan.prompt_tokens);
  plan.new_tokens = new_tokens.value_or(plan.new_tokens);
  plan.repetitions = repetitions.value_or(plan.repetitions);
  plan.batch = batch.value_or(plan.batch);

  QWEN_ASSIGN_OR_RETURN(const std::unique_ptr<Engine> engine,
                        load_engine(folder, load_options, /*quiet=*/false));
  QWEN_RETURN_IF_ERROR(
      fit(plan, prompt_tokens.has_value(), new_tokens.has_value(), engine->manifest().max_seq_len));
  QWEN_RETURN_IF_ERROR(fit_batch(plan, engine->manifest()));
  std::vector<Samples> samples = {
      {"prefill_tokens_per_second", "prefill", "tok/s", &Timings::prefill_tokens_per_second},
      {"ttft_ms", "first token", "ms", &Timings::ttft_ms}};
  if (plan.new_tokens > 1) {
    samples.push_back({"decode_tokens_per_second", "decode", "tok/s", &Timings::decode_tokens_per_second});
  }
  if (plan.new_tokens > 1 && plan.batch > 1) {
    samples.push_back({"decode_tokens_per_second_in_sum", "decode, in sum", "tok/s",
                       &Timings::decode_tokens_per_second, /*in_sum=*/true});
  }
  QWEN_RETURN_IF_ERROR(measure(*engine, plan, samples));
  Output output;
  if (as_json.value_or(false)) {
    output.write_json(report_json(*engine, plan, samples), /*indent=*/2);
  } else {
    output.write(report_table(*engine, plan, samples));
  }
  QWEN_RETURN_IF_ERROR(output.status());
  return 0;
}

}  // namespace qwen::cli
