// What the kernels of one call share: where a session's scratch lies, and the number that orders its tokens.
//
// The likelihood of a token is exp(-distance), where distance = (largest - logit) / temperature >= 0 after
// penalties. Tokens are ordered by distance, equals by id; a token at infinite distance is never drawn. Sums
// of likelihoods are integers, so that they do not depend on the order of summation.
#pragma once

#include "kernels/sample/block.cuh"
#include "kernels/sample/cuda.h"

namespace qwen::cuda::sampling {

inline constexpr uint8_t kPromptBit = 1;
inline constexpr uint8_t kGeneratedBit = 2;

// Tokens of a block: four a thread.
inline constexpr int kChunk = 4 * kThreads;

// Bins of distances: 128 an octave from 2^-10 to 2^6, where a likelihood is 2^-92; the first and the last
// hold the rest. Of a model's logits few share a bin with a threshold.
inline constexpr int kBins = 4 * kThreads;
inline constexpr uint32_t kFirstBin = (127 - 10) * 128;
inline constexpr uint32_t kInfinity = 0x7f800000;  // a distance's bits order as the distance does

// Input tokens of a session; a division would come between the loads.
__device__ inline int64_t rows_of(const SampleArguments& in) {
  return in.sessions == 1 ? in.tokens_count : 1;
}

enum class Mode {
  kGreedy,  // the largest logit
  kDraw,    // every token is kept
  kFilter,  // top-k or top-p drop some
};

// May be called before wait_for_previous_kernel(): see launch.h. A largest logit that is not finite is chosen
// in every mode.
__device__ inline Mode session_mode(const SampleArguments& in, int session) {
  const int64_t top_k = __ldcg(in.top_k + session);
  const float temperature = __ldcg(in.temperature + session), top_p = __ldcg(in.top_p + session);
  if (!(temperature > 0.0F)) return Mode::kGreedy;
  return (top_k > 0 && top_k < in.vocabulary) || top_p < 1.0F ? Mode::kFilter : Mode::kDraw;
}

// Tokens in bins below `first` are kept; those in first to last and in `rank` are candidates, others are
// dropped.
struct Bins {
  uint32_t first = kBins, last = 0;
  uint32_t rank = kBins;  // of the top_k-th token, kBins when top-k drops none
};

// Where the filters of a session cut.
struct alignas(16) State {
  Bins bins;
  uint32_t candidates = 0;   // tokens in Scratch::keys
  uint32_t before_rank = 0;  // tokens in the bins before
  uint64_t mass_before_rank = 0;
  uint64_t mass_before_first = 0;
  uint64_t total = 0;  // mass of all tokens
};

struct Score {
  double value;
  int64_t id;
};

// The scratch of a session.
struct Scratch {
  State* state;
  uint64_t* bests;   // [blocks]: of each block's tokens, see best_key
  Score* scores;     // [blocks]: the best kept token of each block
  uint32_t* counts;  // [kBins]: tokens
  uint64_t* masses;  // [kBins]: likelihoods
  uint64_t* keys;    // [V]: candidates, see token_key
  double* draws;     // [V]: their scores
};

__host__ __device__ inline int blocks_of(int vocabulary) { return (vocabulary + kChunk - 1) / kChunk; }

__host__ __device__ inline size_t scratch_bytes(int vocabulary) {
  const size_t block = sizeof(uint64_t) + sizeof(Score), bin = sizeof(uint32_t) + sizeof(uint64_t);
  const size_t bytes = sizeof(State) + block * blocks_of(vocabulary) + bin * kBins +
                       (sizeof(uint64_t) + sizeof(double)) * static_cast<size_t>(vocabulary);
  return (bytes + 255) / 256 * 256;
}

__device__ inline Scratch session_scratch(void* scratch, int session, int vocabulary) {
  static_assert(sizeof(State) % 16 == 0 && sizeof(Score) == 16);
  const int blocks = blocks_of(vocabulary);
  Scratch s;
  s.state =
      reinterpret_cast<State*>(static_cast<unsigned char*>(scratch) + session * scratch_bytes(vocabulary));
  s.scores = reinterpret_cast<Score*>(s.state + 1);
  s.masses = reinterpret_cast<uint64_t*>(s.scores + blocks);
  s.counts = reinterpret_cast<uint32_t*>(s.masses + kBins);
  s.keys = reinterpret_cast<uint64_t*>(s.counts + kBins);
  s.draws = reinterpret_cast<double*>(s.keys + vocabulary);
  s.bests = reinterpret_cast<uint64_t*>(s.draws + vocabulary);
  return s;
}

// Four logits [V] from token v on, minus infinity past the end.
__device__ inline float4 load_logits(const float* logits, int v, int vocabulary) {
  if (vocabulary % 4 == 0 && v < vocabulary) return __ldcg(reinterpret_cast<const float4*>(logits + v));
  float4 values;
  float* const value = &values.x;
  for (int i = 0; i < 4; ++i)
    value[i] = v + i < vocabulary ? __ldcg(logits + v + i) : -__uint_as_float(kInfinity);
  return values;
}

struct Penalties {
  float presence, repetition;
  __device__ bool neutral() const { return presence == 0.0F && repetition == 1.0F; }
};

// May be called before wait_for_previous_kernel(), too.
__device__ inline Penalties session_penalties(const SampleArguments& in, int session) {
  return {__ldcg(in.presence_penalty + session), __ldcg(in.repetition_penalty + session)};
}

__device__ inline float penalize(float logit, uint8_t seen, Penalties penalties) {
  if (seen != 0) {
    // No contraction to a fused operation: the reference rounds the product.
    logit = logit > 0 ? logit / penalties.repetition : __fmul_rn(logit, penalties.repetition);
    if ((seen & kGeneratedBit) != 0) logit = __fsub_rn(logit, penalties.presence);
  }
  // Plus zero: of two zeros of either sign the lower id is chosen.
  return logit != logit ? -__uint_as_float(kInfinity) : logit + 0.0F;
}

// Four logits after penalties. seen [V]: the session's, past L1, where a neighbouring block's marks may be
// missing.
__device__ inline float4 penalize(float4 logits, const uint8_t* seen, int v, int vocabulary,
                                  Penalties penalties) {
  uchar4 marks = {0, 0, 0, 0};
  if (!penalties.neutral()) {
    if (vocabulary % 4 == 0) {
      if (v < vocabulary) marks = __ldcg(reinterpret_cast<const uchar4*>(seen + v));
    } else {
      uint8_t* const mark = &marks.x;
      for (int i = 0; i < 4 && v + i < vocabulary; ++i) mark[i] = __ldcg(seen + v + i);
    }
  }
  return {penalize(logits.x, marks.x, penalties), penalize(logits.y, marks.y, penalties),
          penalize(logits.z, marks.z, penalties), penalize(logits.w, marks.w, penalties)};
}

// Four logits of a session after penalties.
__device__ inline float4 load_penalized(const SampleArguments& in, int session, int v) {
  const int64_t vocabulary = in.vocabulary;
  return penalize(load_logits(in.logits + session * vocabulary, v, in.vocabulary),
                  in.seen + in.slot[session] * vocabulary, v, in.vocabulary, session_penalties(in, session));
}

// The bits of the distances of four tokens.
__device__ inline uint4 distances_of(float4 logits, float largest, float temperature) {
  const auto distance = [&](float logit) { return __float_as_uint(fabsf((logit - largest) / temperature)); };
  return {distance(logits.x), distance(logits.y), distance(logits.z), distance(logits.w)};
}

__device__ inline uint32_t bin_of(uint32_t distance) {
  return static_cast<uint32_t>(
      min(max(static_cast<int>(distance >> 16) - static_cast<int>(kFirstBin), 0), kBins - 1));
}
// The first distance of a bin.
__device__ inline uint32_t bin_begin(uint32_t bin) { return bin == 0 ? 0 : (bin + kFirstBin) << 16; }
// The last one.
__device__ inline uint32_t bin_end(uint32_t bin) {
  return bin + 1 >= static_cast<uint32_t>(kBins) ? kInfinity - 1 : bin_begin(bin + 1) - 1;
}

// Orders the tokens of a session.
__device__ inline uint64_t token_key(uint32_t distance, int id) {
  return static_cast<uint64_t>(distance) << 32 | static_cast<uint32_t>(id);
}

// The likelihood of the most likely token. V of them stay below 2^62.
__host__ __device__ inline double mass_unit(int vocabulary) {
  int bits = 0;
  while (vocabulary >> bits != 0) ++bits;
  return static_cast<double>(uint64_t{1} << (62 - bits));
}
__device__ inline uint64_t mass_of(uint32_t distance, double unit) {
  return static_cast<uint64_t>(exp(-static_cast<double>(__uint_as_float(distance))) * unit + 0.5);
}

// Sums are compared with p times a total. No p drops the first token, before which there is nothing.
__device__ inline double mass_target(float p, uint64_t total) {
  return fmax(static_cast<double>(p) * static_cast<double>(total), 0.5);
}

}  // namespace qwen::cuda::sampling
