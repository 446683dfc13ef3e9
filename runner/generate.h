// One answer to one prompt: prefill, decode until something ends it, text streamed as it comes.
#pragma once

#include <atomic>
#include <cstdint>
#include <functional>
#include <string>
#include <string_view>
#include <vector>

#include "chat.h"
#include "engine.h"
#include "options.h"
#include "result.h"
#include "session.h"

namespace qwen {

enum class FinishReason { kStop, kLength, kCancelled };
const char* to_string(FinishReason reason);  // "stop", "length", "cancelled"

struct Timings {
  double load_ms = 0;
  double ttft_ms = 0;  // from the call to the first token
  double prefill_tokens_per_second = 0;
  double decode_tokens_per_second = 0;  // of the tokens after the first
};

struct Generation {
  std::string text;
  std::vector<int64_t> tokens;  // generated; an ending eos token is not among them
  int64_t prompt_tokens = 0;
  FinishReason finish_reason = FinishReason::kStop;
  Timings timings;
  std::vector<float> logprobs;  // natural logarithm, one a token, if asked for: of the unmodified softmax
};

// Set from any thread or a signal handler; generate() looks at it before every step.
using CancelFlag = std::atomic<bool>;

// Called with every piece of text that is safe to show; returning false cancels.
using PieceCallback = std::function<bool(std::string_view piece)>;

// Encodes plain text (no special tokens are recognized in it).
std::vector<int64_t> encode_prompt(const Engine& engine, std::string_view text);
// Encodes a conversation through the program's chat format. Errors: kUnsupported, kInvalidArgument.
Result<std::vector<int64_t>> encode_chat(const Engine& engine, std::span<const ChatMessage> messages, bool thinking,
                                         bool add_generation_prompt = true);

// Resets `session`, runs the prompt and generates. `cancel` and `on_piece` may be null/empty.
// Errors: kInvalidArgument (empty prompt, prompt longer than max_seq_len), kInternal.
Result<Generation> generate(Engine& engine, Session& session, std::span<const int64_t> prompt,
                            const GenerateOptions& options, const PieceCallback& on_piece = {},
                            const CancelFlag* cancel = nullptr);

}  // namespace qwen
