// Answer: one answer in the making. It runs its prompt; who owns it runs its decode steps, alone or beside
// those of others. Internal to generate.cpp. Not thread-safe.
#pragma once

#include <chrono>
#include <cstdint>
#include <optional>
#include <span>
#include <string_view>

#include "generate.h"
#include "text_stream.h"

namespace qwen {

class Answer {
 public:
  using Clock = std::chrono::steady_clock;

  // `session` must be of `engine`; all but the callback must outlive the answer, and `asked` is when the
  // caller asked for it. `cancel` and `on_piece` may be null/empty.
  Answer(Engine& engine, Session& session, const GenerateOptions& options, PieceCallback on_piece,
         const CancelFlag* cancel, Clock::time_point asked);

  // Resets the session and runs the prompt; takes in the first token.
  Status begin(std::span<const int64_t> prompt);
  bool ended() const { return end_.has_value(); }
  // The decode step that it needs, and what that has sampled. REQUIRES: begun and not ended.
  DecodeRow next();
  Status accept(int64_t token);
  // REQUIRES: ended; nothing is called after it.
  Generation finish();

 private:
  Result<std::optional<int64_t>> prefill(std::span<const int64_t> prompt);
  Result<std::optional<FinishReason>> take(int64_t token);
  void emit(std::string_view piece);
  bool cancelled() const;

  Engine& engine_;
  Session& session_;
  const GenerateOptions& options_;
  const PieceCallback on_piece_;
  const CancelFlag* const cancel_;
  TextStream stream_;
  Generation generation_;
  std::optional<FinishReason> end_;
  bool refused_ = false;  // the callback returned false
  int64_t token_ = 0;     // the last sampled
  int64_t steps_ = 0;     // of decoding
  const Clock::time_point asked_;
  Clock::time_point decoding_since_;
};

}  // namespace qwen
