#include "answer.h"

#include <algorithm>
#include <utility>

namespace qwen {
namespace {

double seconds_between(Answer::Clock::time_point from, Answer::Clock::time_point to) {
  return std::chrono::duration<double>(to - from).count();
}

double per_second(int64_t count, double seconds) {
  return seconds > 0 ? static_cast<double>(count) / seconds : 0;
}

}  // namespace

Answer::Answer(Engine& engine, Session& session, const GenerateOptions& options, PieceCallback on_piece,
               const CancelFlag* cancel, Clock::time_point asked)
    : engine_(engine),
      session_(session),
      options_(options),
      on_piece_(std::move(on_piece)),
      cancel_(cancel),
      stream_(engine.tokenizer(), options.stop),
      asked_(asked) {
  generation_.seed = options.sampling.seed;
  generation_.timings.load_ms = engine.load_stats().load_ms;
}

Status Answer::begin(std::span<const int64_t> prompt) {
  QWEN_RETURN_IF_ERROR(session_.reset());
  session_.set_generated_from(static_cast<int64_t>(prompt.size()));
  session_.keep_logits(options_.logprobs);
  generation_.prompt_tokens = static_cast<int64_t>(prompt.size());
  if (options_.echo) {
    emit(engine_.tokenizer().decode(prompt, /*skip_special=*/false));
  }
  if (cancelled()) {
    end_ = FinishReason::kCancelled;
    return ok_status();
  }
  if (options_.max_new_tokens == 0) {
    end_ = FinishReason::kLength;
    return ok_status();
  }
  QWEN_ASSIGN_OR_RETURN(const std::optional<int64_t> first, prefill(prompt));
  if (!first) {
    end_ = FinishReason::kCancelled;
    return ok_status();
  }
  token_ = *first;
  QWEN_ASSIGN_OR_RETURN(end_, take(token_));
  return ok_status();
}

// The first token, or nothing when cancelled. Chunk by chunk, so that a long prompt can be cancelled inside.
Result<std::optional<int64_t>> Answer::prefill(std::span<const int64_t> prompt) {
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
  timings.ttft_ms = 1e3 * seconds_between(asked_, ended);
  timings.prefill_tokens_per_second = per_second(generation_.prompt_tokens, seconds_between(began, ended));
  return std::optional<int64_t>(token);
}

DecodeRow Answer::next() {
  if (steps_ == 0) decoding_since_ = Clock::now();
  // Whether another step follows, if the token that this one samples does not end the answer.
  const bool go_on = static_cast<int64_t>(generation_.tokens.size()) + 1 < options_.max_new_tokens;
  return {&session_, token_, options_.sampling, /*ahead=*/go_on};
}

Status Answer::accept(int64_t token) {
  token_ = token;
  steps_ += 1;
  QWEN_ASSIGN_OR_RETURN(end_, take(token));
  if (end_) {
    generation_.timings.decode_tokens_per_second =
        per_second(steps_, seconds_between(decoding_since_, Clock::now()));
  }
  return ok_status();
}

// Takes a sampled token into the answer; returns why the answer ends with it, or nothing.
Result<std::optional<FinishReason>> Answer::take(int64_t token) {
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

Generation Answer::finish() {
  emit(stream_.finish());
  generation_.finish_reason = refused_ ? FinishReason::kCancelled : *end_;
  return std::move(generation_);
}

void Answer::emit(std::string_view piece) {
  if (piece.empty() || refused_) {
    return;
  }
  generation_.text += piece;
  refused_ = on_piece_ && !on_piece_(piece);
}

bool Answer::cancelled() const {
  return refused_ || (cancel_ != nullptr && cancel_->load(std::memory_order_relaxed));
}

}  // namespace qwen
