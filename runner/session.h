// Session: one conversation's state, that is one slot of an engine and the position reached in it.
//
// Not thread-safe: one thread at a time steps a session. Different sessions of one engine may be stepped from
// different threads. Any error while stepping poisons the session until reset().
#pragma once

#include <cstdint>
#include <span>
#include <vector>

#include "result.h"
#include "sampling.h"

namespace qwen {

class Engine;

class Session {
 public:
  Session(Session&& other) noexcept;
  Session& operator=(Session&& other) noexcept;
  Session(const Session&) = delete;
  Session& operator=(const Session&) = delete;
  ~Session();  // gives the slot back

  // Runs `tokens` (at least one) from the current position, in chunks of the program's size, and returns the
  // token sampled after the last one. Tokens at positions from set_generated_from() on count as generated for
  // the presence penalty. `chunk` > 0 asks for smaller chunks than the program's (1 runs token by token).
  // Errors: kInvalidArgument (no tokens, an id outside the vocabulary, more than max_seq_len positions),
  // kInternal.
  Result<int64_t> run(std::span<const int64_t> tokens, const SamplingOptions& sampling, int64_t chunk = 0);

  // Whether run() copies the logits out for logits(); off at first, since a copy of [vocab_size] a step is
  // not free.
  void keep_logits(bool keep);
  // Logits [vocab_size] float32 of the last run(); valid until the next. Error: kInvalidArgument unless kept.
  Result<std::span<const float>> logits() const;

  // Zero-fills the slot and returns to position 0; clears a poisoned session.
  Status reset();

  int64_t position() const;  // tokens in the state
  int64_t slot() const;
  // The position from which tokens count as generated rather than prompt.
  void set_generated_from(int64_t position);

  // This slot's bytes of the state tensor `name`, for tests and inspection. Errors: kNotFound.
  Result<std::span<std::byte>> state(const char* name);

 private:
  friend class Engine;
  Session(Engine* engine, int64_t slot);
  Engine* engine_ = nullptr;
  int64_t slot_ = -1;
  int64_t position_ = 0;
  int64_t generated_from_ = INT64_MAX;
  bool poisoned_ = false;
  bool keep_logits_ = false;
  std::vector<float> logits_;
};

}  // namespace qwen
