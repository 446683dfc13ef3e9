// ChatFormat by itself: what the pieces say, what is refused, and which segments are tokens of the template.
// That it equals Jinja is shown in test_chat.py.
#include "chat.h"

#include <gtest/gtest.h>

#include <nlohmann/json.hpp>
#include <string>
#include <vector>

namespace qwen {
namespace {

using Json = nlohmann::json;
using Messages = std::vector<ChatMessage>;
using Segments = std::vector<ChatFormat::Segment>;

Json pieces() {
  return Json::parse(R"({
    "supported": true,
    "special_tokens": ["<|im_start|>", "<|im_end|>", "<think>", "</think>"],
    "start": "",
    "system": {"before": "<|im_start|>system\n", "after": "<|im_end|>\n", "trim": true},
    "user": {"before": "<|im_start|>user\n", "after": "<|im_end|>\n", "trim": true},
    "assistant": {"before": "<|im_start|>assistant\n", "after": "<|im_end|>\n", "trim": true},
    "tool_response": {"open": "<tool_response>", "close": "</tool_response>"},
    "reasoning": {"open": "<think>", "close": "</think>", "before": "<think>\n", "after": "\n</think>\n\n",
                  "trim": "whitespace", "answer_trim": "newlines",
                  "show": "after_last_query", "show_empty": "always"},
    "generation_prompt": {"thinking": "<|im_start|>assistant\n<think>\n",
                          "no_thinking": "<|im_start|>assistant\n<think>\n\n</think>\n\n"},
    "thinking_by_default": true,
    "proof": {"conversations": 500, "rendered": 480, "refused": 20}})");
}

ChatFormat load(const Json& chat) {
  Result<ChatFormat> format = ChatFormat::from_json(chat);
  EXPECT_TRUE(format.ok()) << format.error().message;
  return std::move(format).value();
}

std::string text_of(const Result<Segments>& rendered) {
  if (!rendered.ok()) return "error: " + rendered.error().message;
  std::string text;
  for (const ChatFormat::Segment& segment : rendered.value()) text += segment.text;
  return text;
}

std::string render(const Messages& messages, bool thinking = true, bool prompt = false) {
  return text_of(load(pieces()).render(messages, thinking, prompt));
}

TEST(ChatTest, CutsThePromptAtTheTemplatesTokensAlone) {
  const auto rendered = load(pieces()).render(Messages{{"user", " Say <|im_end|>!\n"}}, false, true);
  ASSERT_TRUE(rendered.ok());
  const Segments expected = {{"<|im_start|>", true}, {"user\nSay <|im_end|>!", false},
                             {"<|im_end|>", true},   {"\n", false},
                             {"<|im_start|>", true}, {"assistant\n", false},
                             {"<think>", true},      {"\n\n", false},
                             {"</think>", true},     {"\n\n", false}};
  EXPECT_EQ(rendered.value(), expected);
}

TEST(ChatTest, ThinkingChoosesTheStartOfTheAnswer) {
  const std::string user = "<|im_start|>user\nHi<|im_end|>\n";
  EXPECT_EQ(render({{"user", "Hi"}}), user);
  EXPECT_EQ(render({{"user", "Hi"}}, true, true), user + "<|im_start|>assistant\n<think>\n");
  EXPECT_EQ(render({{"user", "Hi"}}, false, true), user + "<|im_start|>assistant\n<think>\n\n</think>\n\n");
  EXPECT_TRUE(load(pieces()).thinking_by_default());
}

TEST(ChatTest, StartStandsOnlyWhereThereIsNoSystemMessage) {
  Json chat = pieces();
  chat["start"] = "<s>";
  EXPECT_EQ(text_of(load(chat).render(Messages{{"user", "a"}}, true, false)),
            "<s><|im_start|>user\na<|im_end|>\n");
  EXPECT_EQ(text_of(load(chat).render(Messages{{"system", "b"}, {"user", "a"}}, true, false)),
            "<|im_start|>system\nb<|im_end|>\n<|im_start|>user\na<|im_end|>\n");
}

TEST(ChatTest, TrimsAsPythonDoes) {
  const std::string around = " \n\t\v\f\r\x1c\x1f\u0085\u00a0\u1680\u2003\u2028\u202f\u205f\u3000";
  EXPECT_EQ(render({{"user", around + "a b" + around}}), "<|im_start|>user\na b<|im_end|>\n");
  EXPECT_EQ(render({{"user", "\u200ba\ufeff"}}), "<|im_start|>user\n\u200ba\ufeff<|im_end|>\n");
  EXPECT_EQ(render({{"user", around}}), "<|im_start|>user\n<|im_end|>\n");
}

TEST(ChatTest, DropsReasoningBeforeTheLastQueryAndShowsItAfter) {
  const ChatMessage answer = {"assistant", "<think>\n why \n</think>\n\n 4"};
  const std::string user = "<|im_start|>user\nq<|im_end|>\n";
  const std::string shown = "<|im_start|>assistant\n<think>\nwhy\n</think>\n\n 4<|im_end|>\n";
  EXPECT_EQ(render({{"user", "q"}, answer, {"user", "q"}}),
            user + "<|im_start|>assistant\n 4<|im_end|>\n" + user);
  EXPECT_EQ(render({{"user", "q"}, answer}), user + shown);
  EXPECT_EQ(render({{"user", "q"}, {"assistant", "4"}}),
            user + "<|im_start|>assistant\n<think>\n\n</think>\n\n4<|im_end|>\n");
  // A tool's response is no query, so the answer before it still comes after the last.
  const ChatMessage response = {"user", " <tool_response>4</tool_response>\n"};
  EXPECT_EQ(render({{"user", "q"}, answer, response}),
            user + shown + "<|im_start|>user\n<tool_response>4</tool_response><|im_end|>\n");
}

TEST(ChatTest, ReadsTornReasoningAsPythonsSplitDoes) {
  const std::string start = "<|im_start|>user\nq<|im_end|>\n<|im_start|>assistant\n<think>\n";
  const auto answer = [&](const std::string& content) {
    const std::string text = render({{"user", "q"}, {"assistant", content}});
    EXPECT_TRUE(text.starts_with(start)) << text;
    return text.substr(start.size());
  };
  EXPECT_EQ(answer("a<think>b<think>c</think>d</think>e"), "c\n</think>\n\ne<|im_end|>\n");
  EXPECT_EQ(answer("no open</think>e"), "no open\n</think>\n\ne<|im_end|>\n");
  EXPECT_EQ(answer("<think>no close"), "\n</think>\n\n<think>no close<|im_end|>\n");
}

TEST(ChatTest, ShowEmptyDecidesWhereThereIsNoReasoning) {
  const Messages messages = {{"user", "q"}, {"assistant", "a"}, {"assistant", "b"}};
  const auto blocks = [&](const char* show_empty) {
    Json chat = pieces();
    chat["reasoning"]["show_empty"] = show_empty;
    const std::string text = text_of(load(chat).render(messages, true, false));
    return std::pair(text.find("\n\na") != std::string::npos, text.find("\n\nb") != std::string::npos);
  };
  EXPECT_EQ(blocks("always"), std::pair(true, true));
  EXPECT_EQ(blocks("last"), std::pair(false, true));
  EXPECT_EQ(blocks("never"), std::pair(false, false));
}

TEST(ChatTest, RefusesWhatItCannotRenderAndNamesTheMessage) {
  const ChatFormat format = load(pieces());
  const auto refusal = [&](const Messages& messages) {
    const auto rendered = format.render(messages, true, true);
    EXPECT_FALSE(rendered.ok());
    if (rendered.ok()) return std::string();
    EXPECT_EQ(rendered.error().code, ErrorCode::kInvalidArgument);
    return rendered.error().message;
  };
  EXPECT_NE(refusal({}).find("no user message"), std::string::npos);
  EXPECT_NE(refusal({{"system", "s"}, {"assistant", "a"}}).find("no user message"), std::string::npos);
  EXPECT_NE(refusal({{"user", "<tool_response></tool_response>"}}).find("no user message"),
            std::string::npos);
  EXPECT_NE(refusal({{"user", "u"}, {"system", "s"}}).find("message 2 is a system"), std::string::npos);
  EXPECT_NE(refusal({{"user", "u"}, {"tool", "4"}}).find("Runner.chat"), std::string::npos);
  EXPECT_NE(refusal({{"User", "u"}}).find("message 1 has the role 'User'"), std::string::npos);
}

TEST(ChatTest, AnUnsupportedTemplateLoadsAndRefusesWithItsReason) {
  const ChatFormat format = load(Json{{"supported", false}, {"reason", "it writes the date"}});
  EXPECT_FALSE(format.supported());
  const auto rendered = format.render(Messages{{"user", "u"}}, true, true);
  ASSERT_FALSE(rendered.ok());
  EXPECT_EQ(rendered.error().code, ErrorCode::kUnsupported);
  EXPECT_NE(rendered.error().message.find("it writes the date"), std::string::npos);
}

// Every key, missing or of another type, is an error that names it.
TEST(ChatTest, NamesTheKeyThatIsWrong) {
  std::vector<Json::json_pointer> places;
  const Json flat = pieces().flatten();
  for (const auto& [path, value] : flat.items()) places.emplace_back(path);
  for (const auto& place : places) {
    const std::string path = place.to_string();
    if (path.starts_with("/proof") || path.starts_with("/special_tokens")) continue;
    for (const bool missing : {true, false}) {
      Json chat = pieces();
      if (missing) {
        chat.at(place.parent_pointer()).erase(place.back());
      } else {
        chat[place] = 7;
      }
      const auto format = ChatFormat::from_json(chat);
      ASSERT_FALSE(format.ok()) << path;
      EXPECT_EQ(format.error().code, ErrorCode::kCorrupt);
      EXPECT_NE(format.error().message.find(place.back()), std::string::npos) << format.error().message;
    }
  }
}

TEST(ChatTest, RefusesPiecesOfAnotherForm) {
  const auto refused = [](const char* place, const Json& value) {
    Json chat = pieces();
    chat[Json::json_pointer(place)] = value;
    return !ChatFormat::from_json(chat).ok();
  };
  EXPECT_TRUE(refused("/special_tokens", Json{{"a", "b"}}));
  EXPECT_TRUE(refused("/special_tokens/0", ""));
  EXPECT_TRUE(refused("/special_tokens/0", 7));
  EXPECT_TRUE(refused("/user", Json::array()));
  EXPECT_TRUE(refused("/reasoning", "yes"));
  EXPECT_TRUE(refused("/reasoning/close", ""));
  EXPECT_TRUE(refused("/reasoning/show", "sometimes"));
  EXPECT_FALSE(refused("/reasoning", nullptr));
  EXPECT_FALSE(refused("/tool_response", nullptr));
  EXPECT_FALSE(ChatFormat::from_json(Json::array()).ok());
}

}  // namespace
}  // namespace qwen
