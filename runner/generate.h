// Answers to prompts, one or several at a time: prefill, decode until something ends it, text streamed as it
// comes.
//
// The functions keep nothing between calls. A call has its sessions to itself while it runs; answers of
// different sessions of one engine may be generated from different threads.
#pragma once

#include <atomic>
#include <cstdint>
#include <functional>
#include <span>
#include <string>
#include <string_view>
#include <vector>

#include "chat.h"
#include "engine.h"
#include "options.h"
#include "result.h"
#include "session.h"

namespace qwen {

enum class FinishReason {
  kStop,       // an eos token or a stop string
  kLength,     // max_new_tokens, or the slot is full
  kCancelled,  // by the flag or the callback
};
const char* to_string(FinishReason reason);  // "stop", "length", "cancelled"

// 0 where there was nothing to measure: no token, or no second one.
struct Timings {
  double load_ms = 0;  // of the program, once
  double ttft_ms = 0;  // from the call to the first token
  double prefill_tokens_per_second = 0;
  double decode_tokens_per_second = 0;  // of the steps after the first token
};

struct Generation {
  std::string text;  // without an ending stop string; special tokens are not shown
  std::vector<int64_t>
      tokens;  // generated; an ending eos token is not among them, those of a stop string are
  int64_t prompt_tokens = 0;
  FinishReason finish_reason = FinishReason::kStop;
  int64_t seed = 0;  // the one that was used
  Timings timings;
  std::vector<float> logprobs;  // natural logarithm, one a token, if asked for: of the unmodified softmax
};

// Set from any thread or a signal handler; generate() looks at it before every step and every chunk of the
// prompt.
using CancelFlag = std::atomic<bool>;

// Called with every piece of text that is safe to show, whole characters only; returning false cancels.
using PieceCallback = std::function<bool(std::string_view piece)>;

// Encodes plain text (no special tokens are recognized in it).
std::vector<int64_t> encode_prompt(const Engine& engine, std::string_view text);
// Encodes a conversation through the program's chat format; special tokens come from the template alone.
// Errors: kUnsupported, kInvalidArgument.
Result<std::vector<int64_t>> encode_chat(const Engine& engine, std::span<const ChatMessage> messages,
                                         bool thinking, bool add_generation_prompt = true);

// The natural logarithm of softmax(logits)[token]. REQUIRES: 0 <= token < logits.size().
double log_probability(std::span<const float> logits, int64_t token);

// Resets `session`, runs the prompt and generates; the last token is not run, except that on a GPU one that
// ends the answer early may be running already: reset the session before it is used otherwise. With `echo`
// the first piece is the prompt, special tokens included; with `logprobs`, and only then, the session keeps
// its logits. `session` must be of `engine`; `cancel` and `on_piece` may be null/empty. Errors:
// kInvalidArgument (empty prompt, prompt longer than max_seq_len, an id outside the vocabulary), kInternal.
Result<Generation> generate(Engine& engine, Session& session, std::span<const int64_t> prompt,
                            const GenerateOptions& options, const PieceCallback& on_piece = {},
                            const CancelFlag* cancel = nullptr);

struct GenerationRequest {
  std::vector<int64_t> prompt;
  GenerateOptions options;
};

// As PieceCallback, for the request of this index; returning false cancels its answer alone.
using BatchPieceCallback = std::function<bool(size_t index, std::string_view piece)>;

// Answers every request as generate() would, as many at a time as there are sessions: each decode step
// advances all of them, together where the program does that, and a session whose answer has ended takes the
// next request. `cancel` ends all, and those that have not begun before they do. An answer's timings are its
// own: its first token waits for the prompts before it. Errors are those of generate(), of any request; then
// there is no answer.
Result<std::vector<Generation>> generate_batch(Engine& engine, std::span<Session> sessions,
                                               std::span<const GenerationRequest> requests,
                                               const BatchPieceCallback& on_piece = {},
                                               const CancelFlag* cancel = nullptr);

}  // namespace qwen
