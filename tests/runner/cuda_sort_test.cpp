// The sort of compiled graphs, through its C shim.
#ifdef QWEN_CUDA

#include <gtest/gtest.h>

#include <algorithm>
#include <cstdint>
#include <functional>
#include <memory>
#include <numeric>
#include <string>
#include <vector>

#include "cuda_device.h"
#include "device_arena.h"
#include "shims/cuda_scope.h"
#include "shims/tensor.h"

extern "C" AOTITorchError qwen_aoti_torch_cuda_sort_stable(AtenTensorHandle self, int32_t* stable,
                                                           int64_t dim, int32_t descending,
                                                           AtenTensorHandle* values,
                                                           AtenTensorHandle* indices);

namespace qwen {
namespace {

template <typename T>
struct Sorted {
  std::vector<T> values;
  std::vector<int64_t> indices;
};

class CudaSortTest : public testing::Test {
 protected:
  void SetUp() override {
    auto opened = CudaDevice::open("a test");
    if (!opened.ok()) GTEST_SKIP() << opened.error().message;
    device_ = std::move(opened).value();
    arena_ = std::make_unique<DeviceArena>(*device_, "a test");
  }

  // Sorts `given`, whose memory lies as `strides` say; the results as they lie there.
  template <typename T>
  Sorted<T> sort(const std::vector<T>& given, const std::vector<int64_t>& sizes,
                 const std::vector<int64_t>& strides, ScalarType dtype, int64_t dim, bool descending) {
    const size_t bytes = given.size() * sizeof(T);
    auto memory = DeviceBuffer::make(*device_, std::max<size_t>(bytes, 1), "a test");
    EXPECT_TRUE(memory.ok());
    if (bytes > 0) {
      EXPECT_TRUE(device_->copy_from_host(memory.value().data(), given.data(), bytes).ok());
    }
    auto tensor = Tensor::borrow(memory.value().data(), sizes, dtype);
    std::copy(strides.begin(), strides.end(), tensor->strides.begin());
    arena_->begin_run();
    const ArenaScope memory_scope(arena_.get());
    const CudaScope scope(device_->stream(), device_->counters(), cuda::ExpertActivations::kBfloat16);
    AtenTensorHandle values = nullptr;
    AtenTensorHandle indices = nullptr;
    code_ = qwen_aoti_torch_cuda_sort_stable(tensor->handle(), nullptr, dim, descending, &values, &indices);
    const auto failure = take_shim_error();
    error_ = failure ? failure->message : "";
    Sorted<T> sorted;
    if (code_ != 0) return sorted;
    const std::unique_ptr<Tensor> value_tensor(Tensor::from(values));
    const std::unique_ptr<Tensor> index_tensor(Tensor::from(indices));
    EXPECT_EQ(value_tensor->strides, tensor->strides);
    EXPECT_EQ(index_tensor->strides, tensor->strides);
    sorted.values.resize(given.size());
    sorted.indices.resize(given.size());
    EXPECT_TRUE(device_->synchronize().ok());
    if (bytes > 0) {
      const size_t index_bytes = given.size() * sizeof(int64_t);
      EXPECT_TRUE(device_->copy_to_host(sorted.values.data(), value_tensor->data(), bytes).ok());
      EXPECT_TRUE(device_->copy_to_host(sorted.indices.data(), index_tensor->data(), index_bytes).ok());
    }
    return sorted;
  }

  // Each line along `dim` of the tensor by std::stable_sort.
  template <typename T>
  static Sorted<T> expected(const std::vector<T>& given, const std::vector<int64_t>& sizes,
                            const std::vector<int64_t>& strides, int64_t dim, bool descending) {
    Sorted<T> sorted = {given, std::vector<int64_t>(given.size())};
    const auto length = static_cast<size_t>(sizes[dim]);
    for (size_t first = 0; first < given.size(); ++first) {
      if (static_cast<int64_t>(first) / strides[dim] % sizes[dim] != 0) continue;
      const auto at = [&](int64_t i) { return first + static_cast<size_t>(i * strides[dim]); };
      std::vector<int64_t> order(length);
      std::iota(order.begin(), order.end(), 0);
      std::stable_sort(order.begin(), order.end(), [&](int64_t a, int64_t b) {
        return descending ? given[at(b)] < given[at(a)] : given[at(a)] < given[at(b)];
      });
      for (size_t i = 0; i < length; ++i) {
        sorted.values[at(static_cast<int64_t>(i))] = given[at(order[i])];
        sorted.indices[at(static_cast<int64_t>(i))] = order[i];
      }
    }
    return sorted;
  }

  template <typename T>
  void check(const std::vector<int64_t>& sizes, const std::vector<int64_t>& strides, ScalarType dtype) {
    std::vector<T> given(
        static_cast<size_t>(std::accumulate(sizes.begin(), sizes.end(), int64_t{1}, std::multiplies<>())));
    for (size_t i = 0; i < given.size(); ++i) given[i] = static_cast<T>(static_cast<int>(i * 37 % 11) - 5);
    const auto dims = static_cast<int64_t>(sizes.size());
    for (int64_t dim = -dims; dim < dims; ++dim) {
      for (const bool descending : {false, true}) {
        const auto actual = sort(given, sizes, strides, dtype, dim, descending);
        EXPECT_EQ(code_, 0) << error_;
        const auto wanted = expected(given, sizes, strides, dim < 0 ? dim + dims : dim, descending);
        EXPECT_EQ(actual.values, wanted.values) << "dimension " << dim;
        EXPECT_EQ(actual.indices, wanted.indices) << "dimension " << dim;
      }
    }
  }

  std::unique_ptr<CudaDevice> device_;
  std::unique_ptr<DeviceArena> arena_;
  AOTITorchError code_ = 0;
  std::string error_;
};

TEST_F(CudaSortTest, AlongEveryDimension) {
  check<int32_t>({3, 20, 5}, {100, 5, 1}, ScalarType::kInt32);
  check<int64_t>({41}, {1}, ScalarType::kInt64);
  check<float>({2, 1, 30}, {30, 30, 1}, ScalarType::kFloat32);
}

TEST_F(CudaSortTest, OfAPermutedTensor) {
  check<float>({4, 6, 5}, {1, 20, 4}, ScalarType::kFloat32);
  check<int64_t>({7, 3}, {1, 7}, ScalarType::kInt64);
}

TEST_F(CudaSortTest, OfSixteenBits) {
  // 1, -2, NaN, 1, 0
  const std::vector<uint16_t> bfloats = {0x3f80, 0xc000, 0x7fc0, 0x3f80, 0x0000};
  const auto up = sort(bfloats, {5}, {1}, ScalarType::kBFloat16, 0, false);
  EXPECT_EQ(up.indices, (std::vector<int64_t>{1, 4, 0, 3, 2}));
  const std::vector<uint16_t> halves = {0x3c00, 0xc000, 0x7e00, 0x3c00, 0x0000};
  const auto down = sort(halves, {5}, {1}, ScalarType::kFloat16, -1, true);
  EXPECT_EQ(down.indices, (std::vector<int64_t>{2, 0, 3, 4, 1}));
}

TEST_F(CudaSortTest, OfAScalarAndOfNothing) {
  EXPECT_EQ(sort<float>({2.5F}, {}, {}, ScalarType::kFloat32, -1, false).indices, std::vector<int64_t>{0});
  EXPECT_EQ(code_, 0) << error_;
  sort<float>({}, {0, 3}, {3, 1}, ScalarType::kFloat32, 1, false);
  EXPECT_EQ(code_, 0) << error_;
}

TEST_F(CudaSortTest, RefusesWhatItCannotSort) {
  sort<uint8_t>({1, 2}, {2}, {1}, ScalarType::kUInt8, 0, false);
  EXPECT_NE(code_, 0);
  EXPECT_NE(error_.find("[2] uint8"), std::string::npos) << error_;
  sort<float>({1, 2}, {2}, {1}, ScalarType::kFloat32, 1, false);
  EXPECT_NE(error_.find("no such dimension"), std::string::npos) << error_;
  sort<float>({1, 2, 3, 4}, {2, 1}, {2, 1}, ScalarType::kFloat32, 0, false);
  EXPECT_NE(error_.find("gaps"), std::string::npos) << error_;
}

}  // namespace
}  // namespace qwen

#endif  // QWEN_CUDA
