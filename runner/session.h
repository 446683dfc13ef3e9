// Session: one conversation's state, that is one slot of an engine and the position reached in it.
//
// Not thread-safe: one thread at a time steps a session. Different sessions of one engine may be stepped from
// different threads. Any error while stepping poisons the session until reset().
#pragma once

#include <cstddef>
#include <cstdint>
#include <optional>
#include <span>
#include <string>
#include <vector>

#include "result.h"
#include "sampling.h"

namespace qwen {

class Engine;
class Session;
struct Step;

// One session's part of Session::decode_together().
struct DecodeRow {
  Session* session;
  int64_t token;
  SamplingOptions sampling;
  bool ahead = false;
};

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

  // Runs one token as run() does. With `ahead` a GPU begins to run the token that this returns before it
  // returns, so that it need not wait for the caller: the session then goes on by decode() or run() of that
  // very token with the same sampling, or by reset(). Without effect where the slot would be full, and while
  // logits are kept. Error, beside those of run(): kInvalidArgument for another token than the one run ahead.
  Result<int64_t> decode(int64_t token, const SamplingOptions& sampling, bool ahead);

  // Runs one token of each session (at least one, all of one engine) as its decode() would, and returns the
  // tokens sampled: on a GPU together, as many a step as the program's batch, else one after the other. Who
  // steps the sessions again does best to name them in the same order. Where one keeps logits none runs
  // ahead. A session's tokens depend on the others by rounding alone: a step of one row may sum in another
  // order than a step of several, whose number makes no difference. Errors: kInvalidArgument, those of
  // decode() and for a session named twice, where nothing was run; kInternal and kOutOfMemory, after which
  // all have failed.
  static Result<std::vector<int64_t>> decode_together(std::span<const DecodeRow> rows);

  // Whether run() copies the logits out for logits(); off at first, since a copy of [vocab_size] a step is
  // not free. What ran ahead before has none: the session then goes on by reset() alone, or without them.
  void keep_logits(bool keep);
  // Logits [vocab_size] float32 of the last run(); valid until the next. Error: kInvalidArgument unless kept.
  Result<std::span<const float>> logits() const;

  // Zero-fills the slot and returns to position 0; clears a poisoned session.
  Status reset();

  // Another session that begins where this one is, in a slot of its own: a copy of the state, after which
  // neither knows of the other. Errors: kInvalidArgument (no slot is free, or this session has failed or run
  // ahead), kInternal.
  Result<Session> fork();

  int64_t position() const;  // tokens in the state
  int64_t slot() const;
  // The position from which tokens count as generated rather than prompt.
  void set_generated_from(int64_t position);

  // This slot's bytes of the state tensor `name`, copied, for tests and inspection. Errors: kNotFound,
  // kInternal.
  Result<std::vector<std::byte>> read_state(const std::string& name) const;
  // Overwrites them, for tests. Errors: kNotFound, kInvalidArgument (another size), kInternal.
  Status write_state(const std::string& name, std::span<const std::byte> bytes);

 private:
  friend class Engine;
  // What the GPU runs before it was asked for.
  struct Ahead {
    int64_t token;
    SamplingOptions sampling;
    int64_t generated_from;
  };

  Session(Engine* engine, int64_t slot);
  // A step of tokens that were checked, at most a chunk of them. Until finish() the session has failed.
  Step begin(std::span<const int64_t> tokens, const SamplingOptions& sampling, bool ahead);
  void finish(const Step& step, int64_t sampled);
  bool can_run_ahead() const;
  Status check(std::span<const int64_t> tokens, const SamplingOptions& sampling) const;
  Engine* engine_ = nullptr;
  int64_t slot_ = -1;
  int64_t position_ = 0;
  int64_t generated_from_ = INT64_MAX;
  bool poisoned_ = false;
  std::optional<Ahead> ahead_;
  bool keep_logits_ = false;
  std::vector<float> logits_;
};

}  // namespace qwen
