#include "kernels/sample/cpu.h"

#include <algorithm>
#include <cmath>
#include <functional>
#include <limits>

#include "kernels/parallel.h"
#include "kernels/sample/philox.h"

namespace qwen::cpu {
namespace {

constexpr uint8_t kPromptBit = 1;
constexpr uint8_t kGeneratedBit = 2;
constexpr float kInfinity = std::numeric_limits<float>::infinity();
// No Gumbel noise is larger: -log(-log(1 - 2^-33)) = 22.87.
constexpr double kMostNoise = 23.0;

// The settings of one session.
struct Settings {
  float temperature;
  int64_t top_k;
  float top_p, min_p, presence, repetition;
  int64_t seed;
};

// The noise of a token: a hash of (seed, position, id), so that a draw repeats anywhere.
double gumbel(int64_t id, int64_t position, int64_t seed) {
  const auto low = [](int64_t v) { return static_cast<uint32_t>(static_cast<uint64_t>(v)); };
  const auto high = [](int64_t v) { return static_cast<uint32_t>(static_cast<uint64_t>(v) >> 32); };
  const uint32_t word = philox({low(id), low(position), high(position), 0}, {low(seed), high(seed)})[0];
  return -std::log(-std::log((static_cast<double>(word) + 0.5) * 0x1p-32));
}

// A session's logits and what of them is still kept.
class Candidates {
 public:
  Candidates(float* logits, int64_t* ids, int64_t vocabulary)
      : logits_(logits), ids_(ids), vocabulary_(vocabulary) {}

  int64_t best() const { return std::max_element(logits_, logits_ + vocabulary_) - logits_; }

  void penalize(const float* raw, const uint8_t* seen, float presence, float repetition);
  // Subtracts the largest logit, so that no temperature above zero overflows, and keeps what is above
  // -infinity.
  void scale(float temperature, int64_t best);
  void keep_top_k(int64_t k);
  void keep_top_p(float p);
  void keep_min_p(float p);
  int64_t draw(int64_t position, int64_t seed) const;

 private:
  float* logits_;  // [V]
  int64_t* ids_;   // [V], the first count_ are kept; ascending until keep_top_p
  int64_t vocabulary_;
  int64_t count_ = 0;
};

void Candidates::penalize(const float* raw, const uint8_t* seen, float presence, float repetition) {
  const bool neutral = presence == 0.0f && repetition == 1.0f;
  for (int64_t v = 0; v < vocabulary_; ++v) {
    float logit = raw[v];
    if (!neutral && seen[v] != 0) {
      logit = logit > 0 ? logit / repetition : logit * repetition;
      if ((seen[v] & kGeneratedBit) != 0) {
        logit -= presence;
      }
    }
    logits_[v] = std::isnan(logit) ? -kInfinity : logit;
  }
}

void Candidates::scale(float temperature, int64_t best) {
  const float largest = logits_[best];
  for (int64_t v = 0; v < vocabulary_; ++v) {
    logits_[v] = (logits_[v] - largest) / temperature;
    ids_[count_] = v;
    count_ += logits_[v] > -kInfinity ? 1 : 0;
  }
}

void Candidates::keep_top_k(int64_t k) {
  if (k <= 0 || k >= count_) {
    return;
  }
  // A heap of the k largest seen so far, the least of them in front: for the usual small k, one comparison a
  // token.
  const auto least_first = [this](int64_t a, int64_t b) { return logits_[a] > logits_[b]; };
  int64_t* heap_end = ids_ + k;
  std::make_heap(ids_, heap_end, least_first);
  for (int64_t i = k; i < count_; ++i) {
    if (logits_[ids_[i]] > logits_[ids_[0]]) {
      std::pop_heap(ids_, heap_end, least_first);
      std::swap(heap_end[-1], ids_[i]);
      std::push_heap(ids_, heap_end, least_first);
    }
  }
  const float threshold = logits_[ids_[0]];
  // What equals the k-th stays too.
  count_ =
      std::partition(ids_ + k, ids_ + count_, [&](int64_t id) { return logits_[id] >= threshold; }) - ids_;
}

void Candidates::keep_top_p(float p) {
  if (!(p < 1.0f)) {
    return;
  }
  double total = 0;
  for (int64_t i = 0; i < count_; ++i) {
    total += std::exp(static_cast<double>(logits_[ids_[i]]));
  }
  const auto less_likely = [this](int64_t a, int64_t b) {
    return logits_[a] < logits_[b] || (logits_[a] == logits_[b] && a > b);
  };
  // The most likely tokens gather at the end of the array, in order.
  std::make_heap(ids_, ids_ + count_, less_likely);
  int64_t left = count_;
  double reached = 0;
  do {
    std::pop_heap(ids_, ids_ + left, less_likely);
    --left;
    reached += std::exp(static_cast<double>(logits_[ids_[left]])) / total;
  } while (left > 0 && reached < static_cast<double>(p));
  std::copy(ids_ + left, ids_ + count_, ids_);
  count_ -= left;
}

void Candidates::keep_min_p(float p) {
  if (!(p > 0.0f)) {
    return;
  }
  // The largest logit is 0, and is kept by every filter.
  const float least = std::min(p, 1.0f);
  count_ =
      std::remove_if(ids_, ids_ + count_, [&](int64_t id) { return std::exp(logits_[id]) < least; }) - ids_;
}

int64_t Candidates::draw(int64_t position, int64_t seed) const {
  int64_t chosen = 0;
  double most = -std::numeric_limits<double>::infinity();
  for (int64_t i = 0; i < count_; ++i) {
    const int64_t id = ids_[i];
    const double logit = logits_[id];
    if (logit + kMostNoise < most) {
      continue;
    }
    const double score = logit + gumbel(id, position, seed);
    if (score > most || (score == most && id < chosen)) {
      most = score;
      chosen = id;
    }
  }
  return chosen;
}

int64_t choose(const float* logits, const uint8_t* seen, const Settings& settings, int64_t position,
               float* scratch, int64_t* ids, int64_t vocabulary) {
  Candidates candidates(scratch, ids, vocabulary);
  candidates.penalize(logits, seen, settings.presence, settings.repetition);
  const int64_t best = candidates.best();
  if (!(settings.temperature > 0.0f) || !std::isfinite(scratch[best])) {
    return best;
  }
  candidates.scale(settings.temperature, best);
  candidates.keep_top_k(settings.top_k);
  candidates.keep_top_p(settings.top_p);
  candidates.keep_min_p(settings.min_p);
  return candidates.draw(position, settings.seed);
}

}  // namespace

int sample(const SampleInputs& in, uint8_t* seen, int64_t* next, const SampleShape& shape) {
  const int64_t sessions = shape.sessions, vocabulary = shape.vocabulary;
  if (sessions <= 0 || vocabulary <= 0 || shape.tokens <= 0 || (sessions != 1 && sessions != shape.tokens)) {
    return kBadShape;
  }
  for (int64_t i = 0; i < sessions; ++i) {
    if (in.slot[i] < 0 || in.slot[i] >= shape.num_slots || in.position[i] < 0) {
      return kOutOfRange;
    }
  }
  for (int64_t t = 0; t < shape.tokens; ++t) {
    if (in.tokens[t] < 0 || in.tokens[t] >= vocabulary) {
      return kOutOfRange;
    }
  }
  const auto logits = make_scratch<float>(vocabulary);
  const auto ids = make_scratch<int64_t>(vocabulary);
  if (!logits || !ids) {
    return kOutOfMemory;
  }
  const int64_t rows = shape.tokens / sessions;
  for (int64_t t = 0; t < shape.tokens; ++t) {
    const int64_t session = t / rows, position = in.position[session] + t % rows;
    seen[in.slot[session] * vocabulary + in.tokens[t]] |=
        position >= in.generated_from[session] ? kGeneratedBit : kPromptBit;
  }
  for (int64_t i = 0; i < sessions; ++i) {
    const Settings settings = {
        in.temperature[i],        in.top_k[i], in.top_p[i], in.min_p[i], in.presence_penalty[i],
        in.repetition_penalty[i], in.seed[i]};
    next[i] = choose(in.logits + i * vocabulary, seen + in.slot[i] * vocabulary, settings,
                     in.position[i] + rows - 1, logits.get(), ids.get(), vocabulary);
  }
  return kOk;
}

}  // namespace qwen::cpu
