#include "gpu_options.h"

#include <gtest/gtest.h>

namespace qwen {
namespace {

TEST(GpuOptions, NamesOfActivationsAreTheirTypes) {
  EXPECT_EQ(*parse_expert_activations("bfloat16"), ExpertActivations::kBfloat16);
  EXPECT_EQ(*parse_expert_activations("int8"), ExpertActivations::kInt8);
  EXPECT_EQ(*parse_expert_activations("float8"), ExpertActivations::kFloat8);
  const auto unknown = parse_expert_activations("Int8");
  ASSERT_FALSE(unknown.ok());
  EXPECT_EQ(unknown.error().code, ErrorCode::kInvalidArgument);
}

TEST(GpuOptions, Float8IsRefusedWhereTensorCoresLackIt) {
  const GpuOptions options = {.expert_activations = ExpertActivations::kFloat8};
  EXPECT_TRUE(check_supported(options, 90, "one").ok());
  EXPECT_TRUE(check_supported(options, 89, "one").ok());
  const Status refused = check_supported(options, 86, "Some GPU");
  ASSERT_FALSE(refused.ok());
  EXPECT_EQ(refused.error().code, ErrorCode::kUnsupported);
  EXPECT_NE(refused.error().message.find("Some GPU"), std::string::npos);
  EXPECT_NE(refused.error().message.find("use int8"), std::string::npos);
  EXPECT_TRUE(check_supported({.expert_activations = ExpertActivations::kInt8}, 80, "one").ok());
}

}  // namespace
}  // namespace qwen
