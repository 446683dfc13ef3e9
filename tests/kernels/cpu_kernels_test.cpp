// The CPU kernels from C++: against loops that spell out each operator, at sizes that leave every tail. Built
// with the sanitizers, this is where a read past an array shows.
#include <gtest/gtest.h>

#include <algorithm>
#include <array>
#include <cmath>
#include <cstdint>
#include <limits>
#include <numeric>
#include <random>
#include <vector>

#include "kernels/attention/cpu.h"
#include "kernels/gated_delta/cpu.h"
#include "kernels/linear/cpu.h"
#include "kernels/moe/cpu.h"
#include "kernels/sample/cpu.h"
#include "kernels/sample/philox.h"
#include "kernels/vector.h"

namespace qwen::cpu {
namespace {

using Floats = std::vector<float>;
using Halves = std::vector<uint16_t>;

constexpr float kNan = std::numeric_limits<float>::quiet_NaN();

std::mt19937& engine() {
  static std::mt19937 instance(7);
  return instance;
}

Floats normal(int64_t n, float scale = 1.0f) {
  std::normal_distribution<float> distribution(0.0f, scale);
  Floats values(static_cast<size_t>(n));
  std::generate(values.begin(), values.end(), [&] { return distribution(engine()); });
  return values;
}

template <typename T>
std::vector<T> integers(int64_t n, int low, int high) {
  std::uniform_int_distribution<int> distribution(low, high);
  std::vector<T> values(static_cast<size_t>(n));
  std::generate(values.begin(), values.end(), [&] { return static_cast<T>(distribution(engine())); });
  return values;
}

Halves rounded(const Floats& values) {
  Halves result(values.size());
  std::transform(values.begin(), values.end(), result.begin(), float_to_bf16);
  return result;
}

Floats widened(const Halves& values) {
  Floats result(values.size());
  std::transform(values.begin(), values.end(), result.begin(), bf16_to_float);
  return result;
}

Array array(const Floats& values) { return {values.data(), DType::kFloat32}; }
Array array(const Halves& values) { return {values.data(), DType::kBFloat16}; }

void expect_near(const Floats& actual, const Floats& expected, double tolerance = 1e-5) {
  ASSERT_EQ(actual.size(), expected.size());
  double square = 0;
  for (const float e : expected) {
    square += static_cast<double>(e) * e;
  }
  const double rms = std::sqrt(square / static_cast<double>(expected.size()));
  for (size_t i = 0; i < actual.size(); ++i) {
    ASSERT_NEAR(actual[i], expected[i], tolerance * (std::abs(expected[i]) + rms)) << "element " << i;
  }
}

// x [tokens, k] times w [n, k] transposed.
Floats product(const Floats& x, const Floats& w, int64_t tokens, int64_t k, int64_t n) {
  Floats out(static_cast<size_t>(tokens * n));
  for (int64_t t = 0; t < tokens; ++t) {
    for (int64_t r = 0; r < n; ++r) {
      double sum = 0;
      for (int64_t i = 0; i < k; ++i) {
        sum += static_cast<double>(x[t * k + i]) * w[r * k + i];
      }
      out[t * n + r] = static_cast<float>(sum);
    }
  }
  return out;
}

// The weights [n, k] of random int4 codes and scales.
struct Int4 {
  std::vector<uint8_t> codes;
  Halves scales;
  Floats values;

  Int4(int64_t n, int64_t k, int64_t group)
      : codes(integers<uint8_t>(n * k / 2, 0, 255)),
        scales(rounded(normal(n * k / group, 0.1f))),
        values(n * k) {
    for (int64_t i = 0; i < n * k; ++i) {
      const int code = i % 2 == 0 ? codes[i / 2] & 15 : codes[i / 2] >> 4;
      values[i] = static_cast<float>(code - 8) * bf16_to_float(scales[i / group]);
    }
  }
};

TEST(CpuTypes, Bfloat16RoundsToNearestEvenAndKeepsNan) {
  EXPECT_EQ(float_to_bf16(1.0f), 0x3F80);
  EXPECT_EQ(float_to_bf16(1.0f + 0x1p-8f), 0x3F80);      // a tie goes to the even neighbour below
  EXPECT_EQ(float_to_bf16(1.0f + 3 * 0x1p-8f), 0x3F82);  // and to the even one above
  EXPECT_EQ(float_to_bf16(1.0f + 0x1p-8f + 0x1p-20f), 0x3F81);
  EXPECT_EQ(float_to_bf16(std::numeric_limits<float>::max()), 0x7F80);
  EXPECT_TRUE(std::isnan(bf16_to_float(float_to_bf16(kNan))));
  Floats values = normal(37, 1e3f);
  values[3] = kNan;
  values[36] = -std::numeric_limits<float>::infinity();
  Halves converted(values.size());
  vector_ops().float_to_bf16(values.data(), 37, converted.data());
  EXPECT_EQ(converted, rounded(values));
}

TEST(VectorOps, ExponentialIsRightFromUnderflowToOverflow) {
  for (const float x : {-200.0f, -87.0f, -20.0f, -1.0f, -1e-8f, 0.0f, 1.0f, 20.0f, 88.0f, 88.7f}) {
    const float zero = 0.0f, one = 1.0f;
    float silu = kNan;
    vector_ops().swiglu(&x, &one, 1, &silu);
    const double exact = static_cast<double>(x) / (1.0 + std::exp(-static_cast<double>(x)));
    EXPECT_NEAR(silu, exact, 1e-6 * std::abs(exact) + 1e-37) << x;
    float pair[2] = {zero, -std::abs(x)};
    const float sum = vector_ops().exp_shifted(pair, 2);
    EXPECT_NEAR(pair[1], std::exp(-std::abs(static_cast<double>(x))), 3e-7 * pair[1] + 2e-38);
    EXPECT_EQ(sum, pair[0] + pair[1]);
  }
}

TEST(Linear, MatchesPlainLoopsAtEveryTail) {
  for (const auto& [tokens, k, n] :
       std::vector<std::array<int64_t, 3>>{{1, 1, 1}, {1, 32, 5}, {3, 33, 4}, {6, 64, 18}}) {
    const Floats x = normal(tokens * k), w = normal(n * k);
    Floats out(tokens * n, kNan);
    ASSERT_EQ(float_linear(array(x), array(w), out.data(), {tokens, k, n}), kOk);
    expect_near(out, product(x, w, tokens, k, n));
    const Halves narrow = rounded(w);
    ASSERT_EQ(float_linear(array(x), array(narrow), out.data(), {tokens, k, n}), kOk);
    expect_near(out, product(x, widened(narrow), tokens, k, n));
  }
  for (const auto& [tokens, k, group, n] :
       std::vector<std::array<int64_t, 4>>{{1, 64, 32, 3}, {5, 128, 64, 17}, {1, 6, 2, 5}, {4, 34, 34, 1}}) {
    const Floats x = normal(tokens * k);
    const Int4 w(n, k, group);
    Floats out(tokens * n, kNan);
    ASSERT_EQ(int4_linear(array(x), w.codes.data(), w.scales.data(), k / group, out.data(), {tokens, k, n}),
              kOk);
    expect_near(out, product(x, w.values, tokens, k, n));
    const auto codes = integers<int8_t>(n * k, -128, 127);
    Floats values(codes.begin(), codes.end());
    for (int64_t i = 0; i < n * k; ++i) {
      values[i] *= bf16_to_float(w.scales[i / group]);
    }
    ASSERT_EQ(int8_linear(array(x), codes.data(), w.scales.data(), k / group, out.data(), {tokens, k, n}),
              kOk);
    expect_near(out, product(x, values, tokens, k, n));
  }
}

TEST(Linear, RefusesShapesThatDoNotDivide) {
  const Int4 w(2, 64, 32);
  const Floats x(64);
  Floats out(2, kNan);
  EXPECT_EQ(int4_linear(array(x), w.codes.data(), w.scales.data(), 3, out.data(), {1, 64, 2}), kBadShape);
  EXPECT_EQ(int4_linear(array(x), w.codes.data(), w.scales.data(), 1, out.data(), {1, 63, 2}), kBadShape);
  EXPECT_EQ(int8_linear(array(x), nullptr, w.scales.data(), 0, out.data(), {1, 64, 2}), kBadShape);
  EXPECT_TRUE(std::isnan(out[0]));
}

TEST(Embedding, RefusesAnIdOutsideTheVocabularyBeforeWriting) {
  const auto codes = integers<int8_t>(4 * 6, -128, 127);
  const Halves scales = rounded(normal(4 * 2));
  Floats out(12, kNan);
  for (const int64_t bad : {int64_t{-1}, int64_t{4}, std::numeric_limits<int64_t>::max()}) {
    const int64_t ids[] = {0, bad};
    EXPECT_EQ(int8_embedding(ids, codes.data(), scales.data(), 2, out.data(), {2, 4, 6}), kOutOfRange);
    EXPECT_TRUE(std::isnan(out[0]));
  }
  const int64_t ids[] = {3, 0};
  ASSERT_EQ(int8_embedding(ids, codes.data(), scales.data(), 2, out.data(), {2, 4, 6}), kOk);
  EXPECT_EQ(out[5], static_cast<float>(codes[23]) * bf16_to_float(scales[7]));
  EXPECT_EQ(out[6], static_cast<float>(codes[0]) * bf16_to_float(scales[0]));
}

TEST(Moe, MatchesPlainLoopsAndRefusesExpertsThatDoNotExist) {
  const MoeShape shape = {5, 34, 4, 18, 2};  // tokens, hidden, experts, intermediate, top_k
  const Floats x = normal(5 * 34), weights = normal(10);
  const Int4 gate_up(4 * 36, 34, 2), down(4 * 34, 18, 6);
  std::vector<int64_t> ids = {1, 3, 3, 1, 1, 0, 3, 0, 1, 3};
  Floats expected(5 * 34);
  for (int64_t c = 0; c < 10; ++c) {
    const int64_t e = ids[c], t = c / 2;
    const Floats token(x.begin() + t * 34, x.begin() + (t + 1) * 34);
    const Floats up_rows(gate_up.values.begin() + e * 36 * 34, gate_up.values.begin() + (e + 1) * 36 * 34);
    const Floats both = product(token, up_rows, 1, 34, 36);
    Floats inner(18);
    for (int64_t i = 0; i < 18; ++i) {
      inner[i] = both[i] / (1.0f + std::exp(-both[i])) * both[18 + i];
    }
    const Floats down_rows(down.values.begin() + e * 34 * 18, down.values.begin() + (e + 1) * 34 * 18);
    const Floats y = product(inner, down_rows, 1, 18, 34);
    for (int64_t i = 0; i < 34; ++i) {
      expected[t * 34 + i] += weights[c] * y[i];
    }
  }
  const Int4Experts experts = {
      gate_up.codes.data(), gate_up.scales.data(), down.codes.data(), down.scales.data(), 17, 3};
  Floats out(5 * 34, kNan);
  ASSERT_EQ(int4_moe(array(x), ids.data(), weights.data(), experts, out.data(), shape), kOk);
  expect_near(out, expected);
  ASSERT_EQ(float_moe(array(x), ids.data(), weights.data(), array(gate_up.values), array(down.values),
                      out.data(), shape),
            kOk);
  expect_near(out, expected);
  ids[9] = 4;
  EXPECT_EQ(int4_moe(array(x), ids.data(), weights.data(), experts, out.data(), shape), kOutOfRange);
}

TEST(Router, TakesTheLargestLogitsLowestExpertFirst) {
  const Floats x = {1.0f, 0.0f};
  const Floats weight = {0.5f, 0, 2.0f, 0, 0.5f, 0, 2.0f, 0, -1.0f, 0};  // five experts
  std::array<int64_t, 3> ids;
  Floats weights(3, kNan);
  ASSERT_EQ(router(array(x), array(weight), ids.data(), weights.data(), {1, 2, 5, 3}), kOk);
  EXPECT_EQ(ids, (std::array<int64_t, 3>{1, 3, 0}));
  EXPECT_FLOAT_EQ(std::accumulate(weights.begin(), weights.end(), 0.0f), 1.0f);
  EXPECT_FLOAT_EQ(weights[2] / weights[0], std::exp(-1.5f));
  EXPECT_EQ(router(array(x), array(weight), ids.data(), weights.data(), {1, 2, 5, 6}), kBadShape);
}

TEST(Attention, MatchesPlainLoopsAndRefusesWhatIsNotInTheCache) {
  const AttentionShape shape = {5, 1, 2, 9,
                                6, 2, 10};  // rows, slot ids, slots, length, heads, key heads, dim
  const Floats q = normal(5 * 6 * 10), k = normal(5 * 2 * 10), v = normal(5 * 2 * 10);
  Floats keys = normal(2 * 2 * 9 * 10), values = normal(2 * 2 * 9 * 10), out(q.size(), kNan);
  int64_t position = 4, slot = 1;
  const AttentionInputs inputs = {q.data(), k.data(), v.data(), DType::kFloat32, &position, &slot};
  ASSERT_EQ(attention(inputs, keys.data(), values.data(), out.data(), shape), kOk);
  Floats expected(q.size());
  for (int64_t row = 0; row < 5; ++row) {
    for (int64_t head = 0; head < 6; ++head) {
      const int64_t cache = (2 + head / 3) * 9 * 10;
      const float* query = q.data() + (row * 6 + head) * 10;
      std::vector<double> weights;
      for (int64_t j = 0; j <= 4 + row; ++j) {
        weights.push_back(std::exp(std::inner_product(query, query + 10, keys.data() + cache + j * 10, 0.0) /
                                   std::sqrt(10.0)));
      }
      const double total = std::accumulate(weights.begin(), weights.end(), 0.0);
      for (int64_t i = 0; i < 10; ++i) {
        double sum = 0;
        for (size_t j = 0; j < weights.size(); ++j) {
          sum += weights[j] / total * values[cache + static_cast<int64_t>(j) * 10 + i];
        }
        expected[(row * 6 + head) * 10 + i] = static_cast<float>(sum);
      }
    }
  }
  expect_near(out, expected);
  EXPECT_TRUE(std::equal(k.end() - 10, k.end(), keys.end() - 10));
  for (const auto& [bad_position, bad_slot] : std::vector<std::array<int64_t, 2>>{
           {5, 1}, {-1, 1}, {std::numeric_limits<int64_t>::max(), 1}, {0, 2}, {0, -1}}) {
    position = bad_position;
    slot = bad_slot;
    const Floats before = keys;
    EXPECT_EQ(attention(inputs, keys.data(), values.data(), out.data(), shape), kOutOfRange);
    EXPECT_EQ(keys, before);
  }
}

TEST(GatedDelta, MatchesPlainLoopsAndRefusesSlotsThatDoNotExist) {
  const int64_t rows = 4, key_heads = 2, heads = 4, dk = 5, dv = 7, taps = 3,
                channels = 2 * key_heads * dk + heads * dv;
  const GatedDeltaShape shape = {rows, 1, 2, key_heads, heads, dk, dv, taps};
  const Floats mixed = normal(rows * channels), a = normal(rows * heads), b = normal(rows * heads);
  const Floats filter = normal(channels * taps), a_log = normal(heads), dt_bias = normal(heads);
  Floats conv_state = normal(2 * channels * (taps - 1)), state = normal(2 * heads * dk * dv),
         out(rows * heads * dv, kNan);
  Floats expected_state(state.begin() + heads * dk * dv, state.end()), expected(out.size());
  for (int64_t t = 0; t < rows; ++t) {
    Floats x(channels);
    for (int64_t c = 0; c < channels; ++c) {
      float sum = 0;
      for (int64_t w = 0; w < taps; ++w) {
        const int64_t source = t + w - (taps - 1);
        sum += filter[c * taps + w] *
               (source >= 0 ? mixed[source * channels + c] : conv_state[(channels + c) * (taps - 1) + t + w]);
      }
      x[c] = sum / (1.0f + std::exp(-sum));
    }
    const auto unit = [&](int64_t first) {
      double square = 1e-6;
      for (int64_t i = 0; i < dk; ++i) {
        square += x[first + i] * x[first + i];
      }
      return static_cast<float>(1.0 / std::sqrt(square));
    };
    for (int64_t h = 0; h < heads; ++h) {
      const int64_t q = h / 2 * dk, k = (key_heads + h / 2) * dk, v = 2 * key_heads * dk + h * dv;
      const float decay = std::exp(-std::exp(a_log[h]) * std::log1p(std::exp(a[t * heads + h] + dt_bias[h])));
      const float beta = 1.0f / (1.0f + std::exp(-b[t * heads + h]));
      for (int64_t j = 0; j < dv; ++j) {
        float predicted = 0, sum = 0;
        for (int64_t i = 0; i < dk; ++i) {
          float& s = expected_state[(h * dk + i) * dv + j];
          s *= decay;
          predicted += s * x[k + i] * unit(k);
        }
        for (int64_t i = 0; i < dk; ++i) {
          float& s = expected_state[(h * dk + i) * dv + j];
          s += x[k + i] * unit(k) * (x[v + j] - predicted) * beta;
          sum += s * x[q + i] * unit(q) / std::sqrt(static_cast<float>(dk));
        }
        expected[(t * heads + h) * dv + j] = sum;
      }
    }
  }
  int64_t slot = 1;
  GatedDeltaInputs inputs;
  inputs.mixed_qkv = mixed.data();
  inputs.a = a.data();
  inputs.b = b.data();
  inputs.conv_weight = array(filter);
  inputs.a_log = array(a_log);
  inputs.dt_bias = array(dt_bias);
  inputs.slot = &slot;
  ASSERT_EQ(gated_delta(inputs, conv_state.data(), state.data(), out.data(), shape), kOk);
  expect_near(out, expected);
  expect_near(Floats(state.begin() + heads * dk * dv, state.end()), expected_state);
  for (int64_t c = 0; c < channels; ++c) {
    EXPECT_EQ(conv_state[(channels + c) * 2], mixed[(rows - 2) * channels + c]);
    EXPECT_EQ(conv_state[(channels + c) * 2 + 1], mixed[(rows - 1) * channels + c]);
  }
  for (const int64_t bad : {-1, 2}) {
    slot = bad;
    EXPECT_EQ(gated_delta(inputs, conv_state.data(), state.data(), out.data(), shape), kOutOfRange);
  }
}

TEST(Philox, GivesTheKnownAnswers) {
  using Words = std::array<uint32_t, 4>;
  EXPECT_EQ(philox({0, 0, 0, 0}, {0, 0}), (Words{0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8}));
  EXPECT_EQ(philox({0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344}, {0xA4093822, 0x299F31D0}),
            (Words{0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1}));
}

TEST(Sample, EverySettingChoosesATokenItKeeps) {
  const int64_t vocabulary = 23;
  std::vector<uint8_t> seen(vocabulary);
  const int64_t tokens[] = {3, 22}, slot = 0, generated_from = 1;
  for (const int64_t top_k : {0, 1, 5, 23, 99}) {
    for (const float p : {0.0f, 0.3f, 1.0f}) {
      Floats logits = normal(vocabulary, 3.0f);
      logits[0] = kNan;
      const auto best = std::max_element(logits.begin() + 1, logits.end()) - logits.begin();
      const float temperature = 0.9f, presence = 0.0f, repetition = 1.0f;
      for (int64_t position = 0; position < 50; ++position) {
        const int64_t seed = position * 7919;
        int64_t next = -1;
        const SampleInputs inputs = {logits.data(), tokens,      &position, &slot,
                                     &temperature,  &top_k,      &p,        &p,
                                     &presence,     &repetition, &seed,     &generated_from};
        ASSERT_EQ(sample(inputs, seen.data(), &next, {1, 2, 1, vocabulary}), kOk);
        ASSERT_GT(next, 0);
        ASSERT_LT(next, vocabulary);
        const auto larger =
            std::count_if(logits.begin(), logits.end(), [&](float l) { return l > logits[next]; });
        EXPECT_LT(larger, top_k == 0 ? vocabulary : top_k);
        if (p == 0.0f || p == 1.0f) {  // top_p = 0, or min_p = 1
          EXPECT_EQ(next, best);
        }
      }
    }
  }
  EXPECT_EQ(seen[3], 3);
  EXPECT_EQ(seen[22], 2);
}

}  // namespace
}  // namespace qwen::cpu
