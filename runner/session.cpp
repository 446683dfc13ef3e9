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
      keep_logits_(other.keep_logits_),
      logits_(std::move(other.logits_)) {}

Session& Session::operator=(Session&& other) noexcept {
  std::swap(engine_, other.engine_);
  std::swap(slot_, other.slot_);
  std::swap(position_, other.position_);
  std::swap(generated_from_, other.generated_from_);
  std::swap(poisoned_, other.poisoned_);
  std::swap(keep_logits_, other.keep_logits_);
  std::swap(logits_, other.logits_);
  return *this;
}

Session::~Session() {
  if (engine_ == nullptr) return;
  const std::lock_guard lock(engine_->impl_->mutex);
  engine_->impl_->slot_taken[static_cast<size_t>(slot_)] = false;
}

Result<int64_t> Session::run(std::span<const int64_t> tokens, const SamplingOptions& sampling,
                             int64_t chunk) {
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
  const int64_t most = chunk > 0 ? std::min(chunk, manifest.chunk) : manifest.chunk;
  int64_t next = -1;
  while (!tokens.empty()) {
    const auto piece = tokens.first(std::min<size_t>(tokens.size(), static_cast<size_t>(most)));
    const std::lock_guard lock(engine_->impl_->mutex);
    auto sampled = engine_->impl_->program->step(piece, position_, slot_, sampling, generated_from_);
    if (!sampled.ok()) {
      poisoned_ = true;
      return sampled.error();
    }
    next = *sampled;
    if (keep_logits_) {
      const auto logits = engine_->impl_->program->logits();
      logits_.assign(logits.begin(), logits.end());
    }
    position_ += static_cast<int64_t>(piece.size());
    tokens = tokens.subspan(piece.size());
  }
  return next;
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
  engine_->impl_->program->constants().zero_slot(slot_);
  position_ = 0;
  generated_from_ = INT64_MAX;
  poisoned_ = false;
  return ok_status();
}

int64_t Session::position() const { return position_; }
int64_t Session::slot() const { return slot_; }
void Session::set_generated_from(int64_t position) { generated_from_ = position; }

Result<std::span<std::byte>> Session::state(const char* name) {
  const Tensor* state = engine_->impl_->program->constants().find_state(name);
  if (state == nullptr) {
    return Error{ErrorCode::kNotFound, std::string("the program has no state ") + name};
  }
  return ConstantStore::slot(*state, slot_);
}

}  // namespace qwen
