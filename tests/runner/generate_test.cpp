// What needs no program; answers themselves are tested through the command line and Python.
#include "generate.h"

#include <gtest/gtest.h>

#include <cmath>
#include <limits>
#include <vector>

namespace qwen {
namespace {

TEST(LogProbability, IsTheLogarithmOfTheSoftmax) {
  const std::vector<float> logits = {std::log(1.0F), std::log(2.0F), std::log(5.0F)};
  EXPECT_NEAR(log_probability(logits, 0), std::log(1.0 / 8), 1e-6);
  EXPECT_NEAR(log_probability(logits, 1), std::log(2.0 / 8), 1e-6);
  EXPECT_NEAR(log_probability(logits, 2), std::log(5.0 / 8), 1e-6);
}

TEST(LogProbability, DoesNotOverflowOrLoseALargeVocabulary) {
  EXPECT_NEAR(log_probability(std::vector<float>{1e4F, 1e4F}, 0), std::log(0.5), 1e-9);
  EXPECT_NEAR(log_probability(std::vector<float>{-1e30F, 0.0F}, 1), 0, 1e-9);
  const std::vector<float> uniform(250'000, -3.5F);
  EXPECT_NEAR(log_probability(uniform, 249'999), -std::log(250'000.0), 1e-9);
}

TEST(LogProbability, OfAnImpossibleTokenIsMinusInfinity) {
  constexpr float kInfinity = std::numeric_limits<float>::infinity();
  EXPECT_EQ(log_probability(std::vector<float>{-kInfinity, 0.0F}, 0), -kInfinity);
}

TEST(FinishReasonNames, AreThoseOfTheJson) {
  EXPECT_STREQ(to_string(FinishReason::kStop), "stop");
  EXPECT_STREQ(to_string(FinishReason::kLength), "length");
  EXPECT_STREQ(to_string(FinishReason::kCancelled), "cancelled");
}

}  // namespace
}  // namespace qwen
