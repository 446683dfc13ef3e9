#include "device_arena.h"

#include <gtest/gtest.h>

#include <cstdint>
#include <vector>

namespace qwen {
namespace {

class DeviceArenaTest : public testing::Test {
 protected:
  // A run that has all of `sizes` in use at once; the addresses it gets.
  std::vector<void*> run(const std::vector<size_t>& sizes) {
    arena_.begin_run();
    std::vector<void*> blocks;
    for (const size_t size : sizes) blocks.push_back(arena_.allocate(size));
    for (size_t i = 0; i < sizes.size(); ++i) arena_.release(blocks[i], sizes[i]);
    return blocks;
  }

  std::unique_ptr<Device> device_ = std::move(open_device("cpu", "a test")).value();
  DeviceArena arena_{*device_, "a test"};
};

constexpr size_t kMebibyte = size_t{1} << 20;

TEST_F(DeviceArenaTest, BlocksAreAlignedAndApart) {
  const std::vector<size_t> sizes = {1, 255, 256, 257, 0, 3 * kMebibyte};
  const auto blocks = run(sizes);
  for (size_t i = 0; i < sizes.size(); ++i) {
    const auto begin = reinterpret_cast<uintptr_t>(blocks[i]);
    EXPECT_EQ(begin % 256, 0U);
    for (size_t j = 0; j < i; ++j) {
      const auto other = reinterpret_cast<uintptr_t>(blocks[j]);
      EXPECT_TRUE(begin + sizes[i] <= other || other + sizes[j] <= begin);
      EXPECT_NE(begin, other);
    }
  }
}

TEST_F(DeviceArenaTest, TheSameRunSettlesOnTheSameAddresses) {
  const std::vector<size_t> sizes = {5 * kMebibyte, 100, 7 * kMebibyte, 300, 11 * kMebibyte};
  run(sizes);
  run(sizes);
  const auto settled = run(sizes);
  const uint64_t changes = arena_.changes();
  EXPECT_EQ(run(sizes), settled);
  EXPECT_EQ(arena_.changes(), changes);
}

TEST_F(DeviceArenaTest, HoldsLittleMoreThanTheLargestRun) {
  for (size_t scale = 1; scale <= 40; ++scale) run({scale * kMebibyte, scale * kMebibyte / 3, 4096});
  const size_t most = 40 * kMebibyte + 40 * kMebibyte / 3 + 4096;
  run({kMebibyte});
  EXPECT_LE(arena_.capacity(), most + most / 4 + 2 * kMebibyte);
  EXPECT_EQ(device_->memory().allocated_bytes, arena_.capacity());
}

TEST_F(DeviceArenaTest, GivesMemoryBackWhenAskedToUnlessAddressesAreKept) {
  run({kMebibyte});
  arena_.trim();
  EXPECT_EQ(arena_.capacity(), 0U);
  const auto kept = run({kMebibyte});
  arena_.keep_addresses();
  arena_.trim();
  EXPECT_GT(arena_.capacity(), 0U);
  EXPECT_EQ(run({kMebibyte}), kept);
}

TEST_F(DeviceArenaTest, SaysWhyThereIsNoMemory) {
  EXPECT_EQ(arena_.allocate(size_t{1} << 50), nullptr);
  const auto error = arena_.take_error();
  ASSERT_TRUE(error.has_value());
  EXPECT_EQ(error->code, ErrorCode::kOutOfMemory);
  EXPECT_FALSE(arena_.take_error().has_value());
}

}  // namespace
}  // namespace qwen
