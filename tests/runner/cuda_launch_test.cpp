// What becomes of a launch that fails, on its way through the C ABI of compiled code.
#ifdef QWEN_CUDA

#include <gtest/gtest.h>

#include <optional>
#include <string>

#include "shims/cuda_arguments.h"
#include "shims/tensor.h"

namespace qwen {
namespace {

std::optional<Error> error_of_launch(cudaError_t code) {
  const AOTITorchError status = guarded("moe_block", [code] { check_launch(code, "moe_sort"); });
  auto error = take_shim_error();
  EXPECT_EQ(status != 0, error.has_value());
  EXPECT_FALSE(take_shim_error().has_value());
  return error;
}

TEST(CudaLaunchTest, OutOfMemoryStaysOutOfMemory) {
  const auto error = error_of_launch(cudaErrorMemoryAllocation);
  ASSERT_TRUE(error.has_value());
  EXPECT_EQ(error->code, ErrorCode::kOutOfMemory);
  EXPECT_NE(error->message.find("qwen::moe_block: moe_sort failed"), std::string::npos) << error->message;
}

TEST(CudaLaunchTest, AnErrorThatStaysSaysToStartAgain) {
  const auto error = error_of_launch(cudaErrorIllegalAddress);
  ASSERT_TRUE(error.has_value());
  EXPECT_EQ(error->code, ErrorCode::kInternal);
  EXPECT_NE(error->message.find("start it again"), std::string::npos) << error->message;
}

TEST(CudaLaunchTest, KernelsOfAnotherArchitectureAreUnsupported) {
  const auto error = error_of_launch(cudaErrorNoKernelImageForDevice);
  ASSERT_TRUE(error.has_value());
  EXPECT_EQ(error->code, ErrorCode::kUnsupported);
}

TEST(CudaLaunchTest, SuccessLeavesNoError) { EXPECT_FALSE(error_of_launch(cudaSuccess).has_value()); }

}  // namespace
}  // namespace qwen

#endif
