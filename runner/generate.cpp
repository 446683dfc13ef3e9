#include "generate.h"

#include <algorithm>
#include <chrono>
#include <cmath>
#include <optional>

#include "text_stream.h"
#include "tokenizer.h"

namespace qwen {
namespace {

using Clock = std::chrono::steady_clock;

double seconds_between(Clock::time_point from, Clock::time_point to) {
  return std::chrono::duration<double>(to - from).count();
}

double per_second(int64_t count, double seconds) {
  return seconds > 0 ? static_cast<double>(count) / seconds : 0;
}

Status check_prompt(std::span<const int64_t> prompt, const Manifest& manifest) {
  if (prompt.empty()) {
    return Error{ErrorCode::kInvalidArgument, "the prompt is empty: give at least one token"};
  }
  if (static_cast<int64_t>(prompt.size()) > manifest.max_seq_len) {
    return Error{ErrorCode::kInvalidArgument, "the prompt has " + std::to_string(prompt.size()) +
                                                  " tokens, but the program holds " +
                                                  std::to_string(manifest.max_seq_len) +
                                                  ": shorten it, or export with a larger --max-seq-len"};
  }
  return ok_status();
}

// One call of generate(). The clock starts with it.
class Answer {
 public:
  Answer(Engine& engine, Session& session, const GenerateOptions& options, const PieceCallback& on_piece,
         const CancelFlag* cancel)
      : engine_(engine),
        session_(session),
        options_(options),
        on_piece_(on_piece),
        cancel_(cancel),
        stream_(engine.tokenizer(), options.stop) {
    generation_.seed = options.sampling.seed;
    generation_.timings.load_ms = engine.load_stats().load_ms;
  }

  Result<Generation> run(std::span<const int64_t> prompt) {
    QWEN_RETURN_IF_ERROR(session_.reset());
    session_.set_generated_from(static_cast<int64_t>(prompt.size()));
    session_.keep_logits(options_.logprobs);
    generation_.prompt_tokens = static_cast<int64_t>(prompt.size());
    if (options_.echo) {
      emit(engine_.tokenizer().decode(prompt, /*skip_special=*/false));
    }
    QWEN_ASSIGN_OR_RETURN(generation_.finish_reason, prefill_and_decode(prompt));
    emit(stream_.finish());
    if (refused_) {
      generation_.finish_reason = FinishReason::kCancelled;
    }
    return std::move(generation_);
  }

 private:
  Result<FinishReason> prefill_and_decode(std::span<const int64_t> prompt) {
    if (cancelled()) {
      return FinishReason::kCancelled;
    }
    if (options_.max_new_tokens == 0) {
      return FinishReason::kLength;
    }
    QWEN_ASSIGN_OR_RETURN(const std::optional<int64_t> first, prefill(prompt));
    return first ? decode(*first) : FinishReason::kCancelled;
  }

  // The first token, or nothing when cancelled. Chunk by chunk, so that a long prompt can be cancelled
  // inside.
  Result<std::optional<int64_t>> prefill(std::span<const int64_t> prompt) {
    const auto began = Clock::now();
    const auto chunk = static_cast<size_t>(engine_.manifest().chunk);
    int64_t token = 0;
    for (size_t done = 0; done < prompt.size(); done += chunk) {
      if (cancelled()) {
        return std::optional<int64_t>();
      }
      const auto piece = prompt.subspan(done, std::min(chunk, prompt.size() - done));
      QWEN_ASSIGN_OR_RETURN(token, session_.run(piece, options_.sampling));
    }
    const auto ended = Clock::now();
    Timings& timings = generation_.timings;
    timings.ttft_ms = 1e3 * seconds_between(start_, ended);
    timings.prefill_tokens_per_second = per_second(generation_.prompt_tokens, seconds_between(began, ended));
    return std::optional<int64_t>(token);
  }

  Result<FinishReason> decode(int64_t token) {
    const auto began = Clock::now();
    for (int64_t steps = 0;; ++steps) {
      QWEN_ASSIGN_OR_RETURN(const std::optional<FinishReason> end, accept(token));
      if (end) {
        generation_.timings.decode_tokens_per_second =
            per_second(steps, seconds_between(began, Clock::now()));
        return *end;
      }
      // Whether another step follows, if the token that this one samples does not end the answer.
      const bool go_on = static_cast<int64_t>(generation_.tokens.size()) + 1 < options_.max_new_tokens;
      QWEN_ASSIGN_OR_RETURN(token, session_.decode(token, options_.sampling, /*ahead=*/go_on));
    }
  }

  // Takes a sampled token into the answer; returns why the answer ends with it, or nothing.
  Result<std::optional<FinishReason>> accept(int64_t token) {
    using End = std::optional<FinishReason>;
    const auto& eos = engine_.manifest().eos_token_ids;
    if (!options_.ignore_eos && std::find(eos.begin(), eos.end(), token) != eos.end()) {
      return End(FinishReason::kStop);
    }
    generation_.tokens.push_back(token);
    if (options_.logprobs) {
      QWEN_ASSIGN_OR_RETURN(const std::span<const float> logits, session_.logits());
      generation_.logprobs.push_back(static_cast<float>(log_probability(logits, token)));
    }
    emit(stream_.push(token));
    if (stream_.stopped()) {
      return End(FinishReason::kStop);
    }
    const bool slot_is_full = session_.position() >= engine_.manifest().max_seq_len;
    if (slot_is_full || static_cast<int64_t>(generation_.tokens.size()) >= options_.max_new_tokens) {
      return End(FinishReason::kLength);
    }
    return cancelled() ? End(FinishReason::kCancelled) : End();
  }

  void emit(std::string_view piece) {
    if (piece.empty() || refused_) {
      return;
    }
    generation_.text += piece;
    refused_ = on_piece_ && !on_piece_(piece);
  }

  bool cancelled() const {
    return refused_ || (cancel_ != nullptr && cancel_->load(std::memory_order_relaxed));
  }

  Engine& engine_;
  Session& session_;
  const GenerateOptions& options_;
  const PieceCallback& on_piece_;
  const CancelFlag* cancel_;
  TextStream stream_;
  Generation generation_;
  bool refused_ = false;  // the callback returned false
  const Clock::time_point start_ = Clock::now();
};

}  // namespace

const char* to_string(FinishReason reason) {
  switch (reason) {
    case FinishReason::kStop:
      return "stop";
    case FinishReason::kLength:
      return "length";
    case FinishReason::kCancelled:
      return "cancelled";
  }
  return "unknown";
}

std::vector<int64_t> encode_prompt(const Engine& engine, std::string_view text) {
  return engine.tokenizer().encode(text, /*parse_special=*/false);
}

Result<std::vector<int64_t>> encode_chat(const Engine& engine, std::span<const ChatMessage> messages,
                                         bool thinking, bool add_generation_prompt) {
  QWEN_ASSIGN_OR_RETURN(const auto segments, engine.chat().render(messages, thinking, add_generation_prompt));
  std::vector<int64_t> tokens;
  for (const ChatFormat::Segment& segment : segments) {
    const std::vector<int64_t> ids = engine.tokenizer().encode(segment.text, segment.is_template);
    tokens.insert(tokens.end(), ids.begin(), ids.end());
  }
  return tokens;
}

double log_probability(std::span<const float> logits, int64_t token) {
  const double largest = *std::max_element(logits.begin(), logits.end());
  double sum = 0;
  for (const float logit : logits) {
    sum += std::exp(logit - largest);
  }
  return logits[static_cast<size_t>(token)] - largest - std::log(sum);
}

Result<Generation> generate(Engine& engine, Session& session, std::span<const int64_t> prompt,
                            const GenerateOptions& options, const PieceCallback& on_piece,
                            const CancelFlag* cancel) {
  QWEN_RETURN_IF_ERROR(check_prompt(prompt, engine.manifest()));
  return Answer(engine, session, options, on_piece, cancel).run(prompt);
}

}  // namespace qwen
