#include "options.h"

#include <gtest/gtest.h>

#include <limits>
#include <set>

namespace qwen {
namespace {

using nlohmann::json;

GenerateOptions made(const json& values, const Manifest& manifest = {}) {
  auto options = make_generate_options(manifest, values);
  EXPECT_TRUE(options.ok()) << options.error().message;
  return options.ok() ? options.value() : GenerateOptions{};
}

std::string refused(const json& values) {
  const auto options = make_generate_options({}, values);
  if (options.ok()) {
    ADD_FAILURE() << values.dump() << " was accepted";
    return "";
  }
  EXPECT_EQ(options.error().code, ErrorCode::kInvalidArgument);
  EXPECT_EQ(options.error().message.find('\n'), std::string::npos);
  return options.error().message;
}

TEST(OptionTable, NamesAreUniqueAndDocumented) {
  std::set<std::string> names;
  for (const OptionSpec& spec : generation_options()) {
    EXPECT_TRUE(names.insert(spec.name).second) << spec.name;
    EXPECT_EQ(std::string(spec.name).find_first_not_of("abcdefghijklmnopqrstuvwxyz_"), std::string::npos);
    EXPECT_STRNE(spec.help, "") << spec.name;
    EXPECT_STRNE(spec.allowed, "") << spec.name;
  }
}

// A wrongly wired row of the table would set or read another option's field.
TEST(OptionTable, EachOptionChangesItselfAlone) {
  for (const OptionSpec& spec : generation_options()) {
    const json value = spec.type == OptionType::kInteger   ? json(7)
                       : spec.type == OptionType::kNumber  ? json(0.5)
                       : spec.type == OptionType::kBoolean ? json(true)
                                                           : json({"a", "b"});
    const GenerateOptions defaults;
    GenerateOptions options;
    ASSERT_TRUE(spec.set(value, options)) << spec.name;
    for (const OptionSpec& other : generation_options()) {
      EXPECT_EQ(other.get(options), std::string(other.name) == spec.name ? value : other.get(defaults))
          << "setting " << spec.name << " and reading " << other.name;
    }
  }
}

TEST(MakeGenerateOptions, ProgramDefaultsHoldUntilAValueIsGiven) {
  Manifest manifest;
  manifest.sampling.temperature = 0.6;
  manifest.sampling.top_k = 20;
  const GenerateOptions options = made({{"temperature", 0.9}, {"top_k", nullptr}}, manifest);
  EXPECT_EQ(options.sampling.temperature, 0.9);
  EXPECT_EQ(options.sampling.top_k, 20);
  EXPECT_EQ(made(json::object(), manifest).sampling.temperature, 0.6);
}

TEST(MakeGenerateOptions, TakesIntegersForNumbersAndOneStringForStop) {
  EXPECT_EQ(made({{"temperature", 1}}).sampling.temperature, 1.0);
  EXPECT_EQ(made({{"stop", "end"}}).stop, std::vector<std::string>{"end"});
  EXPECT_EQ(made({{"stop", json::array()}}).stop, std::vector<std::string>{});
}

TEST(MakeGenerateOptions, LimitsAreInclusiveWhereSaid) {
  const std::pair<const char*, json> allowed[] = {{"max_new_tokens", 0},
                                                  {"temperature", 0},
                                                  {"temperature", 100},
                                                  {"top_k", 0},
                                                  {"top_p", 1},
                                                  {"top_p", 1e-9},
                                                  {"min_p", 0},
                                                  {"min_p", 1},
                                                  {"presence_penalty", -100},
                                                  {"presence_penalty", 100},
                                                  {"seed", 0},
                                                  {"seed", INT64_MAX},
                                                  {"repetition_penalty", 0.01}};
  for (const auto& [name, value] : allowed) {
    made({{name, value}});
  }
}

TEST(MakeGenerateOptions, RefusesWhatIsOutsideAndNamesOptionValueAndRange) {
  constexpr double kNan = std::numeric_limits<double>::quiet_NaN();
  constexpr double kInfinity = std::numeric_limits<double>::infinity();
  const std::tuple<const char*, json, const char*> cases[] = {
      {"max_new_tokens", -1, "-1"},
      {"max_new_tokens", 1.0, "1.0"},
      {"max_new_tokens", true, "true"},
      {"max_new_tokens", UINT64_MAX, "18446744073709551615"},
      {"temperature", -0.1, "-0.1"},
      {"temperature", kNan, "nan"},
      {"temperature", kInfinity, "inf"},
      {"temperature", "hot", "\"hot\""},
      {"top_k", -1, "-1"},
      {"top_p", 0, "0"},
      {"top_p", 1.5, "1.5"},
      {"top_p", kNan, "nan"},
      {"min_p", -0.5, "-0.5"},
      {"min_p", 1.01, "1.01"},
      {"presence_penalty", -kInfinity, "-inf"},
      {"repetition_penalty", 0, "0"},
      {"repetition_penalty", -1, "-1"},
      {"seed", -1, "-1"},
      {"seed", 9223372036854775808ULL, "9223372036854775808"},
      {"stop", "", "\"\""},
      {"stop", json({"a", ""}), "[\"a\",\"\"]"},
      {"stop", json({1}), "[1]"},
      {"ignore_eos", 1, "1"},
      {"echo", "yes", "\"yes\""}};
  for (const auto& [name, value, shown] : cases) {
    const std::string message = refused({{name, value}});
    EXPECT_TRUE(message.starts_with(std::string(name) + " is " + shown + ": it must be ")) << message;
  }
  EXPECT_NE(refused({{"top_p", 2}}).find("above 0 and at most 1"), std::string::npos);
}

TEST(MakeGenerateOptions, InvalidUtf8InAValueIsShownNotThrown) {
  EXPECT_TRUE(refused({{"seed", "\xff\xfe"}}).starts_with("seed is \""));
}

TEST(MakeGenerateOptions, AnUnknownNameSuggestsTheNearest) {
  EXPECT_NE(refused({{"temprature", 1}}).find("did you mean \"temperature\"?"), std::string::npos);
  EXPECT_NE(refused({{"max_tokens", 1}}).find("did you mean \"max_new_tokens\"?"), std::string::npos);
  EXPECT_NE(refused({{"top-k", 1}}).find("did you mean \"top_k\"?"), std::string::npos);
  const std::string message = refused({{"zzzzzzzzzzzz", 1}});
  for (const OptionSpec& spec : generation_options()) {
    EXPECT_NE(message.find(spec.name), std::string::npos) << message;
  }
  EXPECT_NE(refused(json::array()).find("must be an object"), std::string::npos);
}

TEST(MakeGenerateOptions, SamplingWithoutASeedGetsARandomOne) {
  EXPECT_EQ(made({{"temperature", 0}}).sampling.seed, 0);
  EXPECT_EQ(made({{"temperature", 1}, {"seed", 0}}).sampling.seed, 0);
  std::set<int64_t> seeds;
  for (int i = 0; i < 8; ++i) {
    seeds.insert(made({{"temperature", 1}}).sampling.seed);
  }
  EXPECT_GT(seeds.size(), 1U);
  EXPECT_GE(*seeds.begin(), 0);
}

TEST(NearestName, FindsMisspellingsAndAbbreviationsOnly) {
  const std::vector<std::string> known = {"prompt", "prompt_file", "temperature", "top_p"};
  EXPECT_EQ(nearest_name("promt", known), "prompt");
  EXPECT_EQ(nearest_name("prompt-fil", known), "prompt_file");
  EXPECT_EQ(nearest_name("temp", known), "temperature");
  EXPECT_EQ(nearest_name("topp", known), "top_p");
  EXPECT_EQ(nearest_name("xyz", known), "");
  EXPECT_EQ(nearest_name("prompt", {}), "");
}

}  // namespace
}  // namespace qwen
