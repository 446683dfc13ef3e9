// How the next token is chosen from the logits. Plain data; the program itself applies it, on the device.
#pragma once

#include <cstdint>

namespace qwen {

struct SamplingOptions {
  double temperature = 0.0;         // 0 is greedy: exactly the arg-max
  int64_t top_k = 0;                // keep the k most likely tokens; 0 keeps all
  double top_p = 1.0;               // keep the smallest set with at least this probability; 1 keeps all
  double min_p = 0.0;               // drop tokens under this fraction of the most likely one's probability
  double presence_penalty = 0.0;    // subtracted once from every token generated before
  double repetition_penalty = 1.0;  // divides (or multiplies, if negative) the logits of tokens seen before
  int64_t seed = 0;                 // same seed, prompt and program: same text

  bool operator==(const SamplingOptions&) const = default;
};

}  // namespace qwen
