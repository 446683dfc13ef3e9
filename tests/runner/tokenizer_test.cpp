#include "tokenizer.h"

#include <gtest/gtest.h>

#include <thread>

#include "small_tokenizer.h"

namespace qwen {
namespace {

using nlohmann::json;
using Ids = std::vector<int64_t>;

class TokenizerTest : public testing::Test {
 protected:
  Ids encode(std::string_view text, bool parse_special = false) const {
    return tokenizer_.encode(text, parse_special);
  }

  json file_ = small_tokenizer_json();
  Tokenizer tokenizer_ = load_tokenizer(file_);
};

TEST_F(TokenizerTest, MergesByRankThenFromTheLeft) {
  EXPECT_EQ(encode("hello"), (Ids{259}));
  EXPECT_EQ(encode("hellhe"), (Ids{258, 256}));
  EXPECT_EQ(encode("aaaaaaa"), (Ids{261, 260, 'a'}));
  EXPECT_EQ(encode("aaa"), (Ids{260, 'a'}));
  EXPECT_EQ(encode(""), Ids{});
}

TEST_F(TokenizerTest, MergesOnlyWithinWords) {
  EXPECT_EQ(encode("hello2hello"), (Ids{259, '2', 259}));
  EXPECT_EQ(encode("he llhe"), (Ids{256, ' ', 257, 256}));
}

TEST_F(TokenizerTest, DoesNotDependOnTheLibrariesUnicodeVersions) {
  // U+10D40 is a digit since Unicode 16, so no word with the letter behind it: a library that does not know
  // it would let its last byte merge with the letter.
  file_["model"]["vocab"][byte_to_alphabet(0x80) + "a"] = 263;
  file_["model"]["merges"].push_back({byte_to_alphabet(0x80), "a"});
  for (int i = 0; i < 3; ++i) file_["added_tokens"][i]["id"] = 264 + i;
  EXPECT_EQ(load_tokenizer(file_).encode("\U00010D40a", false), (Ids{0xF0, 0x90, 0xB5, 0x80, 'a'}));
  EXPECT_EQ(load_tokenizer(file_).encode("\u2000\u0300a", false).back(), 263);
  // U+0898 is a combining mark since Unicode 14. In Unicode 9, by which NFC is done, it is not: nothing moves
  // past it.
  EXPECT_EQ(tokenizer_.decode(encode("x\u0301\u0898\u0316"), false), "x\u0301\u0898\u0316");
}

TEST_F(TokenizerTest, NormalizesWhereTheFileSaysSo) {
  EXPECT_EQ(encode("e\u0301"), (Ids{0xC3, 0xA9}));
  EXPECT_EQ(tokenizer_.decode(encode("q\u0301\u0316"), false), "q\u0316\u0301");
  EXPECT_EQ(encode("\u1100\u1161\u11A8"), encode("\uAC01"));
  file_["normalizer"] = nullptr;
  EXPECT_EQ(load_tokenizer(file_).encode("e\u0301", false), (Ids{'e', 0xCC, 0x81}));
}

TEST_F(TokenizerTest, ReadsInvalidUtf8AsReplacementCharacters) {
  const std::pair<std::string, std::string> cases[] = {
      {"a\xFFz", "a\uFFFDz"},
      {"\xF0\x9F\x98", "\uFFFD"},
      {"\xF0\x9F\x98x", "\uFFFDx"},
      {"\xE0\x80\x80", "\uFFFD\uFFFD\uFFFD"},
      {"\xED\xA0\x80", "\uFFFD\uFFFD\uFFFD"},
      {"\xF4\x90\x80\x80", "\uFFFD\uFFFD\uFFFD\uFFFD"},
      {"\xC3\xC3\xA9", "\uFFFD\u00E9"},
      {"\xC0\xAF", "\uFFFD\uFFFD"},
  };
  for (const auto& [bytes, text] : cases) {
    EXPECT_EQ(encode(bytes), encode(text)) << text;
    const Ids each(reinterpret_cast<const uint8_t*>(bytes.data()),
                   reinterpret_cast<const uint8_t*>(bytes.data()) + bytes.size());
    EXPECT_EQ(tokenizer_.decode(each, false), text);
  }
}

TEST_F(TokenizerTest, FindsAddedTokensOnlyWhereAskedTo) {
  EXPECT_EQ(encode("he<|end|><think>2", true), (Ids{256, 263, 265}));
  EXPECT_EQ(encode("<think>", true), (Ids{264}));
  for (const char* text : {"<|end|>", "<think>", "he<|end|>he"}) {
    for (const int64_t id : encode(text)) EXPECT_LT(id, 263);
    EXPECT_EQ(tokenizer_.decode(encode(text), true), text);
  }
}

TEST_F(TokenizerTest, HonoursTheFlagsOfAddedTokens) {
  auto with = [&](const char* flag) {
    json file = file_;
    file["added_tokens"][1][flag] = true;
    return load_tokenizer(file);
  };
  EXPECT_EQ(with("lstrip").encode("a \n<think> a", true), (Ids{'a', 264, ' ', 'a'}));
  EXPECT_EQ(with("rstrip").encode("a <think> \u3000a", true), (Ids{'a', ' ', 264, 'a'}));
  EXPECT_EQ(with("single_word").encode("a<think> <think>", true).back(), 264);
  EXPECT_NE(with("single_word").encode("a<think> ", true)[1], 264);
}

TEST_F(TokenizerTest, LooksForNormalizedTokensInNormalizedText) {
  file_["added_tokens"][1]["content"] = "<\u00E9>";
  EXPECT_NE(load_tokenizer(file_).encode("<e\u0301>", true), (Ids{264}));
  file_["added_tokens"][1]["normalized"] = true;
  EXPECT_EQ(load_tokenizer(file_).encode("<e\u0301>", true), (Ids{264}));
}

TEST_F(TokenizerTest, DecodesWithAndWithoutSpecialTokens) {
  const Ids ids = {259, 263, 264, 'a', -1, 100000};
  EXPECT_EQ(tokenizer_.decode(ids, true), "hello<think>a");
  EXPECT_EQ(tokenizer_.decode(ids, false), "hello<|end|><think>a");
}

TEST_F(TokenizerTest, TellsAboutTokens) {
  EXPECT_EQ(tokenizer_.vocab_size(), 266u);
  for (int64_t id = 0; id < 266; ++id) EXPECT_EQ(tokenizer_.token_id(tokenizer_.token_bytes(id)), id);
  EXPECT_EQ(tokenizer_.token_id("<|end|>"), 263);
  EXPECT_EQ(tokenizer_.token_id("no such token"), std::nullopt);
  EXPECT_TRUE(tokenizer_.is_special(263));
  EXPECT_FALSE(tokenizer_.is_special(264));
  for (const int64_t id : {int64_t{-1}, int64_t{266}, INT64_MAX, INT64_MIN}) {
    EXPECT_EQ(tokenizer_.token_bytes(id), "");
    EXPECT_FALSE(tokenizer_.is_special(id));
  }
}

TEST_F(TokenizerTest, TakesWholeWordsWhereMergesAreIgnored) {
  file_["model"]["vocab"]["ola"] = 263;
  for (int i = 0; i < 3; ++i) file_["added_tokens"][i]["id"] = 264 + i;
  EXPECT_EQ(load_tokenizer(file_).encode("ola", false), (Ids{'o', 'l', 'a'}));
  file_["model"]["ignore_merges"] = true;
  EXPECT_EQ(load_tokenizer(file_).encode("ola hello", false), (Ids{263, ' ', 259}));
  EXPECT_EQ(load_tokenizer(file_).encode("<think>", false).size(), 7u);
}

TEST_F(TokenizerTest, ReadsMergesAsStringsToo) {
  for (json& merge : file_["model"]["merges"])
    merge = merge[0].get<std::string>() + " " + merge[1].get<std::string>();
  file_["model"]["merges"].insert(file_["model"]["merges"].begin(), "#version: 0.2");
  EXPECT_EQ(load_tokenizer(file_).encode("helloaaaa", false), (Ids{259, 261}));
}

TEST_F(TokenizerTest, SplitsByGpt2sPatternWhereByteLevelDoes) {
  file_["pre_tokenizer"] = {{"type", "ByteLevel"}, {"add_prefix_space", false}};
  EXPECT_EQ(load_tokenizer(file_).encode("aa's aa", false), (Ids{260, '\'', 's', ' ', 260}));
}

TEST_F(TokenizerTest, TakesAMegabyteOfOneWord) {
  const Ids ids = encode(std::string(1 << 20, 'a'));
  EXPECT_EQ(ids, Ids((1 << 20) / 4, 261));
  for (const char c : {' ', '\n', '-'}) EXPECT_EQ(encode(std::string(1 << 20, c)), Ids(1 << 20, c));
  std::string marks = "q";
  for (int i = 0; i < 1 << 17; ++i) marks += "\u0301\u0316";
  const std::string normalized = tokenizer_.decode(encode(marks), false);
  EXPECT_EQ(normalized.size(), marks.size());
  EXPECT_EQ(normalized.substr(0, 5), "q\u0316\u0316");
}

// A group repeated a million times outgrows the matcher's fast stack: it must go on without it.
TEST_F(TokenizerTest, TakesAMegabyteThatBacktracks) {
  file_["pre_tokenizer"]["pretokenizers"][0]["pattern"]["Regex"] = R"((?:\p{L}|\p{M})+(?!\p{N}))";
  const Ids ids = load_tokenizer(file_).encode(std::string((1 << 20) + 1, 'a') + "1", false);
  EXPECT_EQ(ids.size(), (1 << 18) + 2u);
  EXPECT_EQ(Ids(ids.end() - 3, ids.end()), (Ids{261, 'a', '1'}));
}

TEST_F(TokenizerTest, GivesTheSameIdsOnManyThreads) {
  std::string text;
  for (int i = 0; i < 2000; ++i) text += "hello <think> caf\u00E9 " + std::to_string(i);
  const Ids expected = encode(text, true);
  std::vector<Ids> results(4);
  std::vector<std::thread> threads;
  for (Ids& result : results) threads.emplace_back([&] { result = encode(text, true); });
  for (std::thread& thread : threads) thread.join();
  for (const Ids& result : results) EXPECT_EQ(result, expected);
}

}  // namespace
}  // namespace qwen
