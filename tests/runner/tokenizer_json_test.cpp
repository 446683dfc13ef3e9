// Damaged and unsupported tokenizer.json files: one line that names what is wrong, and never a crash.
#include <gtest/gtest.h>

#include <random>

#include "small_tokenizer.h"
#include "tokenizer.h"

namespace qwen {
namespace {

using nlohmann::json;

class TokenizerJsonTest : public testing::Test {
 protected:
  json file_ = small_tokenizer_json();
};

// What must be refused: where in the file, what stands there, the error's code, and what its message must
// name.
struct Refused {
  const char* pointer;
  json value;
  ErrorCode code;
  const char* names;
};

TEST_F(TokenizerJsonTest, RefusesWhatItDoesNotDoAndSaysWhat) {
  const auto kUnsupported = ErrorCode::kUnsupported;
  const auto kCorrupt = ErrorCode::kCorrupt;
  const std::string regex = "/pre_tokenizer/pretokenizers/0/pattern/Regex";
  const std::vector<Refused> cases = {
      {"/normalizer", {{"type", "NFKC"}}, kUnsupported, "NFKC"},
      {"/normalizer", {{"type", "Sequence"}}, kCorrupt, "normalizers"},
      {"/normalizer", "NFC", kUnsupported, "NFC"},
      {"/pre_tokenizer", nullptr, kUnsupported, "pre_tokenizer"},
      {"/pre_tokenizer/pretokenizers/0/type", "Digits", kUnsupported, "Digits"},
      {"/pre_tokenizer/pretokenizers/0/behavior", "Removed", kUnsupported, "Isolated"},
      {"/pre_tokenizer/pretokenizers/0/invert", true, kUnsupported, "inverted"},
      {"/pre_tokenizer/pretokenizers/0/pattern", {{"String", " "}}, kUnsupported, "Regex"},
      {"/pre_tokenizer/pretokenizers/1/add_prefix_space", true, kUnsupported, "add_prefix_space"},
      {regex.c_str(), "(", kCorrupt, "pattern"},
      {regex.c_str(), "\\p{Han}+", kUnsupported, "\\p{Ha"},
      {regex.c_str(), "\\w+", kUnsupported, "\\w"},
      {regex.c_str(), "^a", kUnsupported, "^"},
      {regex.c_str(), "[[:alpha:]]", kUnsupported, "bracket"},
      {regex.c_str(), "[a-z&&b]", kUnsupported, "&&"},
      {regex.c_str(), "(?<=a)b", kUnsupported, "(?<="},
      {regex.c_str(), "(?i:ss)", kUnsupported, "ss"},
      {regex.c_str(), "a{1,2}+", kUnsupported, "{n,m}"},
      {regex.c_str(), "a{,2}", kUnsupported, "{"},
      {regex.c_str(), "\u00E9", kUnsupported, "ASCII"},
      {"/post_processor", {{"type", "TemplateProcessing"}}, kUnsupported, "TemplateProcessing"},
      {"/decoder", nullptr, kUnsupported, "decoder"},
      {"/decoder", {{"type", "WordPiece"}}, kUnsupported, "decoder"},
      {"/truncation", {{"max_length", 5}}, kUnsupported, "truncation"},
      {"/padding", {{"length", 5}}, kUnsupported, "padding"},
      {"/model", nullptr, kUnsupported, "BPE"},
      {"/model/type", "Unigram", kUnsupported, "BPE"},
      {"/model/dropout", 0.1, kUnsupported, "dropout"},
      {"/model/end_of_word_suffix", "</w>", kUnsupported, "end_of_word_suffix"},
      {"/model/ignore_merges", 1, kCorrupt, "ignore_merges"},
      {"/model/vocab", json::object(), kUnsupported, "byte 0"},
      {"/model/vocab", json::array(), kCorrupt, "vocab"},
      {"/model/vocab/A", 66, kCorrupt, "66"},
      {"/model/vocab/A", -1, kCorrupt, "-1"},
      {"/model/vocab/A", 1.5, kCorrupt, "1.5"},
      {"/model/vocab/A", 4294967361, kCorrupt, "4294967361"},
      {"/model/merges", nullptr, kCorrupt, "merges"},
      {"/model/merges/0", {"h", "\u1234"}, kCorrupt, "merge"},
      {"/model/merges/0", "he", kCorrupt, "he"},
      {"/model/merges/0", {"x", "y"}, kCorrupt, "[\"x\",\"y\"]"},
      {"/model/merges/0", 7, kCorrupt, "7"},
      {"/added_tokens", json::object(), kCorrupt, "added_tokens"},
      {"/added_tokens/0/id", 1000, kCorrupt, "263"},
      {"/added_tokens/0/id", nullptr, kCorrupt, "id"},
      {"/added_tokens/0/content", "", kCorrupt, "content"},
      {"/added_tokens/0/special", "yes", kCorrupt, "special"},
  };
  for (const Refused& refused : cases) {
    json file = file_;
    file[json::json_pointer(refused.pointer)] = refused.value;
    const auto result = Tokenizer::from_json(file.dump(), "some/tokenizer.json");
    ASSERT_FALSE(result.ok()) << refused.pointer << " " << refused.value;
    const Error& error = result.error();
    EXPECT_EQ(error.code, refused.code) << error.message;
    EXPECT_TRUE(error.message.starts_with("some/tokenizer.json: ")) << error.message;
    EXPECT_NE(error.message.find(refused.names), std::string::npos) << error.message;
    EXPECT_EQ(error.message.find('\n'), std::string::npos) << error.message;
  }
  file_["added_tokens"][1]["content"] = "<|end|>";
  EXPECT_FALSE(Tokenizer::from_json(file_.dump(), "tokenizer.json").ok());
}

// Damage is an error, or a tokenizer that still works; never a crash.
void expect_no_crash(const std::string& text) {
  const auto result = Tokenizer::from_json(text, "damaged.json");
  if (!result.ok()) {
    EXPECT_TRUE(result.error().message.starts_with("damaged.json: "));
    EXPECT_EQ(result.error().message.find('\n'), std::string::npos) << result.error().message;
    return;
  }
  const std::vector<int64_t> ids = result.value().encode("hello <|end|> e\u0301 12", true);
  (void)result.value().decode(ids, false);
}

TEST_F(TokenizerJsonTest, SurvivesTruncation) {
  const std::string text = file_.dump();
  for (size_t length = 0; length < text.size(); length += 1 + length % 13) {
    EXPECT_FALSE(Tokenizer::from_json(std::string_view(text).substr(0, length), "damaged.json").ok())
        << length;
  }
}

TEST_F(TokenizerJsonTest, SurvivesGarbling) {
  const std::string text = file_.dump();
  std::mt19937 random(5);
  for (int i = 0; i < 1500; ++i) {
    std::string garbled = text;
    for (int n = 1 + i % 3; n > 0; --n) {
      const size_t at = random() % garbled.size();
      switch (random() % 4) {
        case 0:
          garbled[at] = static_cast<char>(random());
          break;
        case 1:
          garbled[at] = "0123456789\"{}[],:-"[random() % 18];
          break;
        case 2:
          garbled.erase(at, random() % 40);
          break;
        default:
          garbled.insert(at, garbled.substr(random() % garbled.size(), random() % 40));
      }
    }
    expect_no_crash(garbled);
  }
  expect_no_crash(std::string(1000000, '['));
  std::string nested = R"({"normalizer":)";
  for (int i = 0; i < 50000; ++i) nested += R"({"type":"Sequence","normalizers":[)";
  for (int i = 0; i < 50000; ++i) nested += "]}";
  expect_no_crash(nested + "}");
  expect_no_crash("null");
  expect_no_crash("");
}

// Every value of the file in turn replaced by one of another type.
TEST_F(TokenizerJsonTest, SurvivesValuesOfWrongTypes) {
  const json flat = file_.flatten();
  int seen = 0;
  for (const auto& [pointer, value] : flat.items()) {
    if (pointer.starts_with("/model/vocab") && ++seen % 20 != 0) continue;
    for (const json& wrong :
         {json(nullptr), json("x"), json(-3), json(1e300), json::array(), json::object(), json(true)}) {
      json file = file_;
      file[json::json_pointer(pointer)] = wrong;
      expect_no_crash(file.dump());
    }
  }
}

}  // namespace
}  // namespace qwen
