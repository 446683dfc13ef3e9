#include "text_stream.h"

#include <gtest/gtest.h>

#include <random>

#include "small_tokenizer.h"

namespace qwen {
namespace {

using Ids = std::vector<int64_t>;

bool is_valid_utf8(const std::string& text) { return replace_invalid_utf8(text) == text; }

class TextStreamTest : public testing::Test {
 protected:
  // The pieces of all tokens, and last that of finish(). Each byte of `text` is a token.
  static std::vector<std::string> pieces(TextStream& stream, const std::string& text) {
    std::vector<std::string> out;
    for (const char c : text) out.push_back(stream.push(static_cast<uint8_t>(c)));
    out.push_back(stream.finish());
    return out;
  }
  std::string joined(const std::string& text, std::vector<std::string> stops) const {
    TextStream stream(tokenizer_, std::move(stops));
    std::string out;
    for (const std::string& piece : pieces(stream, text)) out += piece;
    return out;
  }

  Tokenizer tokenizer_ = load_tokenizer(small_tokenizer_json());
};

TEST_F(TextStreamTest, EmitsWholeCharactersAtOnce) {
  TextStream stream(tokenizer_, {});
  EXPECT_EQ(pieces(stream, "a\u00E9\U0001F600"),
            (std::vector<std::string>{"a", "", "\u00E9", "", "", "", "\U0001F600", ""}));
  EXPECT_FALSE(stream.stopped());
}

TEST_F(TextStreamTest, JoinsCharactersAcrossTokensAndSkippedOnes) {
  TextStream stream(tokenizer_, {});
  EXPECT_EQ(stream.push(262), "");
  EXPECT_EQ(stream.push(263), "");  // special, so no text
  EXPECT_EQ(stream.push(0x98), "");
  EXPECT_EQ(stream.push(0x80), "\U0001F600");
  EXPECT_EQ(stream.push(264), "<think>");
  EXPECT_EQ(stream.push(9999), "");
  EXPECT_EQ(stream.push(-1), "");
}

TEST_F(TextStreamTest, EmitsSpecialTokensWhereAskedTo) {
  TextStream stream(tokenizer_, {}, /*skip_special=*/false);
  EXPECT_EQ(stream.push(263), "<|end|>");
}

TEST_F(TextStreamTest, ReplacesWhatIsNeverCompleted) {
  TextStream stream(tokenizer_, {});
  EXPECT_EQ(pieces(stream, "\xE2\x82x\xF0\x9F"),
            (std::vector<std::string>{"", "", "\uFFFDx", "", "", "\uFFFD"}));
  EXPECT_EQ(stream.finish(), "");
}

TEST_F(TextStreamTest, HoldsBackWhatMayBeginAStopString) {
  TextStream stream(tokenizer_, {"END"});
  EXPECT_EQ(pieces(stream, "xENxEEND"), (std::vector<std::string>{"x", "", "", "ENx", "", "E", "", "", ""}));
  EXPECT_TRUE(stream.stopped());
  EXPECT_EQ(stream.push('a'), "");
  EXPECT_EQ(stream.finish(), "");
}

TEST_F(TextStreamTest, EmitsWhatIsHeldAtTheEnd) {
  TextStream stream(tokenizer_, {"END"});
  EXPECT_EQ(pieces(stream, "xEN"), (std::vector<std::string>{"x", "", "", "EN"}));
  EXPECT_FALSE(stream.stopped());
}

TEST_F(TextStreamTest, FindsAStopStringWithinOneTokenAndAcrossTwo) {
  TextStream within(tokenizer_, {"ell"});
  EXPECT_EQ(within.push(259), "h");
  EXPECT_TRUE(within.stopped());
  TextStream across(tokenizer_, {"oh"});
  EXPECT_EQ(across.push(259), "hell");
  EXPECT_EQ(across.push(259), "");
  EXPECT_TRUE(across.stopped());
}

TEST_F(TextStreamTest, TellsOverlappingCandidatesApart) {
  EXPECT_EQ(joined("aabaabaaab", {"aabaaa"}), "aab");
  EXPECT_EQ(joined("abcabd", {"abd", "bca"}), "a");  // "bca" is complete first
  EXPECT_EQ(joined("xabcd", {"d", "abcd"}), "x");    // complete together: the longest
  EXPECT_EQ(joined("xabcx", {"abcd", "bc"}), "xa");
  EXPECT_EQ(joined("abab", {"abc", "abd", ""}), "abab");
  EXPECT_EQ(joined("aaaa", {"aaa"}), "");
}

TEST_F(TextStreamTest, StopsAtStringsOfManyBytes) {
  EXPECT_EQ(joined("caf\u00E8 caf\u00E9!", {"\u00E9"}), "caf\u00E8 caf");
  EXPECT_EQ(joined("\U0001F601\U0001F600x", {"\U0001F600"}), "\U0001F601");
  EXPECT_EQ(joined("a\xFF"
                   "b",
                   {"\uFFFD"}),
            "a");
  EXPECT_EQ(joined("a\xE2\x82", {"\uFFFD"}), "a");  // complete only in finish()
  EXPECT_EQ(joined("a\xFF"
                   "b",
                   {"\xFF"}),
            "a");  // a stop string is text too
}

// The text up to the stop string that is complete first, by search in the whole text.
std::string cut(const std::string& text, const std::vector<std::string>& stops) {
  for (size_t end = 1; end <= text.size(); ++end) {
    size_t longest = 0;
    for (const std::string& stop : stops) {
      if (text.substr(0, end).ends_with(stop)) longest = std::max(longest, stop.size());
    }
    if (longest > 0) return text.substr(0, end - longest);
  }
  return text;
}

TEST_F(TextStreamTest, AnyTokensGiveTheTextOfAllInValidPieces) {
  std::mt19937 random(11);
  const std::string bytes = "ab\xC3\xA9\xA8\xF0\x9F\x98\x80\xE2\x82\xAC\xFF\xED\xA0";
  const std::vector<std::string> candidates = {"ab",      "aba",        "bab",    "\u00E9",
                                               "\u00E9a", "\U0001F600", "\uFFFD", "b\uFFFD"};
  for (int round = 0; round < 20000; ++round) {
    std::vector<std::string> stops;
    for (int n = static_cast<int>(random() % 4); n > 0; --n)
      stops.push_back(candidates[random() % candidates.size()]);
    const bool skip_special = random() % 2 == 0;
    Ids ids;
    for (int n = static_cast<int>(random() % 25); n > 0; --n) {
      const bool any = random() % 8 == 0;
      ids.push_back(any ? static_cast<int64_t>(random() % 268)
                        : static_cast<uint8_t>(bytes[random() % bytes.size()]));
    }
    TextStream stream(tokenizer_, stops, skip_special);
    std::string streamed;
    for (size_t i = 0; i <= ids.size(); ++i) {
      const std::string piece = i < ids.size() ? stream.push(ids[i]) : stream.finish();
      ASSERT_TRUE(is_valid_utf8(piece));
      streamed += piece;
    }
    const std::string whole = tokenizer_.decode(ids, skip_special);
    ASSERT_EQ(streamed, cut(whole, stops));
    ASSERT_EQ(stream.stopped(), streamed != whole);
  }
}

// Nothing is held longer than it must be: what is held could still become a stop string or a character.
TEST_F(TextStreamTest, HoldsNoMoreThanItMust) {
  std::mt19937 random(12);
  const std::vector<std::string> stops = {"abab", "ba"};
  for (int round = 0; round < 2000; ++round) {
    TextStream stream(tokenizer_, stops);
    std::string text;
    std::string streamed;
    for (int i = 0; i < 20 && !stream.stopped(); ++i) {
      text += "abc"[random() % 3];
      streamed += stream.push(text.back());
      const std::string held = text.substr(streamed.size());
      const bool may_stop =
          std::any_of(stops.begin(), stops.end(), [&](const auto& s) { return s.starts_with(held); });
      ASSERT_TRUE(stream.stopped() || may_stop) << text << " holds " << held;
    }
  }
}

}  // namespace
}  // namespace qwen
