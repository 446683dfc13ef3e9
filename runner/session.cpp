#include "session.h"

#include <algorithm>
#include <cstdint>
#include <mutex>
#include <string>
#include <utility>

#include "engine_impl.h"

namespace qwen {

Session::Session(Engine* engine, int64_t slot) : engine_(engine), slot_(slot) {}

Session::Session(Session&& other) noexcept
    : engine_(std::exchange(other.engine_, nullptr)),
      slot_(other.slot_),
      position_(other.position_),
      generated_from_(other.generated_from_),
      poisoned_(other.poisoned_),
      ahead_(other.ahead_),
      keep_logits_(other.keep_logits_),
      logits_(std::move(other.logits_)) {}

Session& Session::operator=(Session&& other) noexcept {
  std::swap(engine_, other.engine_);
  std::swap(slot_, other.slot_);
  std::swap(position_, other.position_);
  std::swap(generated_from_, other.generated_from_);
  std::swap(poisoned_, other.poisoned_);
  std::swap(ahead_, other.ahead_);
  std::swap(keep_logits_, other.keep_logits_);
  std::swap(logits_, other.logits_);
  return *this;
}

Session::~Session() {
  if (engine_ != nullptr) engine_->impl_->give_back(slot_);
}

Status Session::check(std::span<const int64_t> tokens, const SamplingOptions& sampling) const {
  const Manifest& manifest = engine_->manifest();
  if (poisoned_) {
    return Error{ErrorCode::kInvalidArgument, "the session failed before; reset it before the next step"};
  }
  if (tokens.empty())
    return Error{ErrorCode::kInvalidArgument, "there are no tokens to run; give at least one"};
  const auto count = static_cast<int64_t>(tokens.size());
  if (count > manifest.max_seq_len - position_) {
    return Error{ErrorCode::kInvalidArgument,
                 std::to_string(count) + " tokens after " + std::to_string(position_) +
                     " do not fit the program's " + std::to_string(manifest.max_seq_len) +
                     " positions; shorten the prompt or export with a larger --max-seq-len"};
  }
  for (const int64_t token : tokens) {
    if (token < 0 || token >= manifest.vocab_size) {
      return Error{ErrorCode::kInvalidArgument, "token id " + std::to_string(token) + " is not in [0, " +
                                                    std::to_string(manifest.vocab_size) + ")"};
    }
  }
  if (ahead_ && (count != 1 || tokens[0] != ahead_->token || sampling != ahead_->sampling ||
                 generated_from_ != ahead_->generated_from)) {
    return Error{ErrorCode::kInvalidArgument, "the session has run token " + std::to_string(ahead_->token) +
                                                  " ahead and can go on with nothing else; reset it first"};
  }
  // The step that ran ahead kept none, and another session's may have come after it.
  if (ahead_ && keep_logits_) {
    return Error{ErrorCode::kInvalidArgument,
                 "the session has run token " + std::to_string(ahead_->token) +
                     " ahead without its logits; keep logits before running ahead, or reset it first"};
  }
  return ok_status();
}

bool Session::can_run_ahead() const {
  return !engine_->impl_->program->device().is_host() && !keep_logits_ &&
         position_ + 1 < engine_->manifest().max_seq_len;
}

Step Session::begin(std::span<const int64_t> tokens, const SamplingOptions& sampling, bool ahead) {
  ahead_.reset();
  poisoned_ = true;
  return {.tokens = tokens,
          .position = position_,
          .slot = slot_,
          .sampling = sampling,
          .generated_from = generated_from_,
          .ahead = ahead && can_run_ahead(),
          .logits = keep_logits_ ? &logits_ : nullptr};
}

void Session::finish(const Step& step, int64_t sampled) {
  poisoned_ = false;
  position_ += static_cast<int64_t>(step.tokens.size());
  if (step.ahead) ahead_ = {sampled, step.sampling, step.generated_from};
}

Result<int64_t> Session::run(std::span<const int64_t> tokens, const SamplingOptions& sampling,
                             int64_t chunk) {
  QWEN_RETURN_IF_ERROR(check(tokens, sampling));
  const int64_t longest = engine_->manifest().chunk;
  const auto most = static_cast<size_t>(chunk > 0 ? std::min(chunk, longest) : longest);
  int64_t next = -1;
  while (!tokens.empty()) {
    const auto piece = tokens.first(std::min(tokens.size(), most));
    const Step step = begin(piece, sampling, /*ahead=*/false);
    QWEN_ASSIGN_OR_RETURN(const std::vector<int64_t> sampled, engine_->impl_->run({&step, 1}));
    next = sampled[0];
    finish(step, next);
    tokens = tokens.subspan(piece.size());
  }
  return next;
}

Result<int64_t> Session::decode(int64_t token, const SamplingOptions& sampling, bool ahead) {
  const DecodeRow row = {this, token, sampling, ahead};
  QWEN_ASSIGN_OR_RETURN(const std::vector<int64_t> sampled, decode_together({&row, 1}));
  return sampled[0];
}

Result<std::vector<int64_t>> Session::decode_together(std::span<const DecodeRow> rows) {
  for (const DecodeRow& row : rows) {
    QWEN_RETURN_IF_ERROR(row.session->check({&row.token, 1}, row.sampling));
    const auto same = [&](const DecodeRow& other) { return other.session == row.session; };
    if (std::ranges::count_if(rows, same) != 1) {
      return Error{ErrorCode::kInvalidArgument,
                   "a session is named twice in one step; it can run one token at a time"};
    }
    if (row.session->engine_ != rows[0].session->engine_) {
      return Error{ErrorCode::kInvalidArgument, "sessions of two engines cannot be stepped together"};
    }
  }
  Engine::Impl& engine = *rows[0].session->engine_->impl_;
  const bool ahead =
      std::ranges::none_of(rows, [](const DecodeRow& row) { return row.session->keep_logits_; });
  std::vector<Step> steps;
  for (const DecodeRow& row : rows) {
    steps.push_back(row.session->begin({&row.token, 1}, row.sampling, row.ahead && ahead));
  }
  const auto batch = static_cast<size_t>(engine.program->manifest().batch);
  std::vector<int64_t> sampled;
  while (sampled.size() < steps.size()) {
    const auto rest = std::span<const Step>(steps).subspan(sampled.size());
    QWEN_ASSIGN_OR_RETURN(const std::vector<int64_t> part,
                          engine.run(rest.first(std::min(rest.size(), batch))));
    sampled.insert(sampled.end(), part.begin(), part.end());
  }
  for (size_t i = 0; i < rows.size(); ++i) rows[i].session->finish(steps[i], sampled[i]);
  return sampled;
}

void Session::keep_logits(bool keep) {
  keep_logits_ = keep;
  logits_.clear();
}

Result<std::span<const float>> Session::logits() const {
  if (logits_.empty()) {
    return Error{ErrorCode::kInvalidArgument, "no logits were kept; call keep_logits(true) before the step"};
  }
  return std::span<const float>(logits_);
}

Status Session::reset() {
  const std::lock_guard lock(engine_->impl_->mutex);
  ahead_.reset();
  poisoned_ = true;
  QWEN_RETURN_IF_ERROR(engine_->impl_->program->clear_slot(slot_));
  position_ = 0;
  generated_from_ = INT64_MAX;
  poisoned_ = false;
  return ok_status();
}

Result<Session> Session::fork() {
  if (poisoned_ || ahead_) {
    return Error{ErrorCode::kInvalidArgument, std::string("a session that ") +
                                                  (poisoned_ ? "has failed" : "has run a token ahead") +
                                                  " cannot be forked; reset it first"};
  }
  QWEN_ASSIGN_OR_RETURN(const int64_t slot, engine_->impl_->take_slot());
  Session copy(engine_, slot);  // gives the slot back where the rest fails
  copy.position_ = position_;
  copy.generated_from_ = generated_from_;
  copy.keep_logits_ = keep_logits_;
  copy.logits_ = logits_;
  const std::lock_guard lock(engine_->impl_->mutex);
  QWEN_RETURN_IF_ERROR(engine_->impl_->program->copy_slot(slot_, slot));
  return copy;
}

int64_t Session::position() const { return position_; }
int64_t Session::slot() const { return slot_; }
void Session::set_generated_from(int64_t position) { generated_from_ = position; }

Result<std::vector<std::byte>> Session::read_state(const std::string& name) const {
  const std::lock_guard lock(engine_->impl_->mutex);
  return engine_->impl_->program->constants().read_state(name, slot_);
}

Status Session::write_state(const std::string& name, std::span<const std::byte> bytes) {
  const std::lock_guard lock(engine_->impl_->mutex);
  return engine_->impl_->program->constants().write_state(name, slot_, bytes);
}

}  // namespace qwen
