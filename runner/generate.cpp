#include "generate.h"

#include <algorithm>
#include <cmath>
#include <optional>

#include "answer.h"
#include "tokenizer.h"

namespace qwen {
namespace {

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

using Seat = std::optional<Answer>;

// Runs one decode step of every answer that is in a seat.
Status step(std::span<Seat> seats) {
  std::vector<DecodeRow> rows;
  for (Seat& seat : seats) {
    if (seat) rows.push_back(seat->next());
  }
  QWEN_ASSIGN_OR_RETURN(const std::vector<int64_t> tokens, Session::decode_together(rows));
  auto token = tokens.begin();
  for (Seat& seat : seats) {
    if (seat) QWEN_RETURN_IF_ERROR(seat->accept(*token++));
  }
  return ok_status();
}

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
  const auto asked = Answer::Clock::now();
  QWEN_RETURN_IF_ERROR(check_prompt(prompt, engine.manifest()));
  Answer answer(engine, session, options, on_piece, cancel, asked);
  QWEN_RETURN_IF_ERROR(answer.begin(prompt));
  while (!answer.ended()) {
    const DecodeRow row = answer.next();
    QWEN_ASSIGN_OR_RETURN(const int64_t token, session.decode(row.token, row.sampling, row.ahead));
    QWEN_RETURN_IF_ERROR(answer.accept(token));
  }
  return answer.finish();
}

Result<std::vector<Generation>> generate_batch(Engine& engine, std::span<Session> sessions,
                                               std::span<const GenerationRequest> requests,
                                               const BatchPieceCallback& on_piece, const CancelFlag* cancel) {
  const auto asked = Answer::Clock::now();
  if (sessions.empty()) {
    return Error{ErrorCode::kInvalidArgument, "there is no session to answer in: open at least one"};
  }
  for (const GenerationRequest& request : requests) {
    QWEN_RETURN_IF_ERROR(check_prompt(request.prompt, engine.manifest()));
  }
  std::vector<Generation> answers(requests.size());
  std::vector<Seat> seats(sessions.size());
  std::vector<size_t> seated(sessions.size());  // whose answer is in the seat
  size_t next = 0;
  const auto leave_if_ended = [&](size_t seat) {
    if (!seats[seat] || !seats[seat]->ended()) return;
    answers[seated[seat]] = seats[seat]->finish();
    seats[seat].reset();
  };
  const auto take = [&](size_t seat) {
    const size_t index = seated[seat] = next++;
    PieceCallback callback;
    if (on_piece) callback = [&on_piece, index](std::string_view piece) { return on_piece(index, piece); };
    seats[seat].emplace(engine, sessions[seat], requests[index].options, std::move(callback), cancel, asked);
    return seats[seat]->begin(requests[index].prompt);
  };
  for (;;) {
    for (size_t seat = 0; seat < seats.size(); ++seat) {
      leave_if_ended(seat);
      while (!seats[seat] && next < requests.size()) {
        QWEN_RETURN_IF_ERROR(take(seat));
        leave_if_ended(seat);
      }
    }
    if (std::ranges::none_of(seats, [](const Seat& seat) { return seat.has_value(); })) return answers;
    QWEN_RETURN_IF_ERROR(step(seats));
  }
}

}  // namespace qwen
