// One stable radix sort of 64-bit keys serves every type and shape: a line's number stands above the value's
// order in the key, and what moves is the element's index.
#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <algorithm>
#include <bit>

#include "kernels/cuda/primitives.cuh"
#include "kernels/sort/cuda.h"
#ifdef QWEN_CUDA_EMULATION
#include <numeric>
#include <vector>
#else
#include <cub/device/device_radix_sort.cuh>
#endif

namespace qwen::cuda {
namespace {

constexpr int kThreads = 256;
constexpr int64_t kMostElements = int64_t{1} << 31;

struct Lines {
  int64_t outer, length, inner;

  __host__ __device__ int64_t lines() const { return outer * inner; }
  __host__ __device__ int64_t elements() const { return outer * length * inner; }
  // Where element `i` of the lines laid end to end lies.
  __device__ int64_t address(int64_t i) const {
    const int64_t line = i / length;
    return (line / inner * length + i % length) * inner + line % inner;
  }
};

int bits_for(int64_t count) { return count <= 1 ? 0 : std::bit_width(static_cast<uint64_t>(count - 1)); }

// Unsigned integers that order as the values do; those that compare equal have the same.
__device__ uint64_t order_of(int32_t value) { return static_cast<uint32_t>(value) ^ 0x80000000U; }
__device__ uint64_t order_of(int64_t value) {
  return static_cast<uint64_t>(value) ^ uint64_t { 1 } << 63;
}
__device__ uint64_t order_of(float value) {
  if (value != value) return ~0U;
  const uint32_t bits = __float_as_uint(value + 0.0F);  // of both zeros the positive
  return (bits >> 31) != 0 ? ~bits : bits | 0x80000000U;
}
// In 16 bits, for fewer passes: a widened value's upper half still orders.
__device__ uint64_t order_of(__nv_bfloat16 value) { return order_of(__bfloat162float(value)) >> 16; }
__device__ uint64_t order_of(__half value) {
  const float wide = __half2float(value);
  if (wide != wide) return 0xffff;
  const uint32_t bits = wide == 0.0F ? 0 : __half_as_ushort(value);
  return (bits >> 15) != 0 ? ~bits & 0xffff : bits | 0x8000;
}

template <typename T>
constexpr int kKeyBits = 8 * sizeof(T);

// keys, indices [elements]. With `with_line`, the line's number stands above the value's bits.
template <typename T>
__global__ void __launch_bounds__(kThreads) make_keys(const T* values, uint64_t* keys, uint32_t* indices,
                                                      Lines lines, bool descending, bool with_line) {
  wait_for_previous_kernel();
  const int64_t i = blockIdx.x * int64_t{kThreads} + threadIdx.x;
  if (i >= lines.elements()) return;
  constexpr uint64_t kMask = ~uint64_t{0} >> (64 - kKeyBits<T>);
  uint64_t key = order_of(values[lines.address(i)]);
  // Equal values keep their order, so it is the keys that turn around, not the result.
  if (descending) key = ~key & kMask;
  if constexpr (kKeyBits<T> < 64) {
    if (with_line) key |= static_cast<uint64_t>(i / lines.length) << kKeyBits<T>;
  }
  keys[i] = key;
  indices[i] = static_cast<uint32_t>(i);
}

__global__ void __launch_bounds__(kThreads)
    make_line_keys(const uint32_t* order, uint64_t* keys, uint32_t* indices, Lines lines) {
  wait_for_previous_kernel();
  const int64_t i = blockIdx.x * int64_t{kThreads} + threadIdx.x;
  if (i >= lines.elements()) return;
  keys[i] = order[i] / lines.length;
  indices[i] = order[i];
}

template <typename T>
__global__ void __launch_bounds__(kThreads)
    gather(const T* values, const uint32_t* order, T* sorted, int64_t* indices, Lines lines) {
  wait_for_previous_kernel();
  const int64_t i = blockIdx.x * int64_t{kThreads} + threadIdx.x;
  if (i >= lines.elements()) return;
  const int64_t from = order[i], to = lines.address(i);
  sorted[to] = values[lines.address(from)];
  indices[to] = from % lines.length;
}

// Sorts pairs by the low `end_bit` bits of their keys. A null scratch: tells its size in bytes.
#ifdef QWEN_CUDA_EMULATION
__global__ void sort_pairs_alone(const uint64_t* keys, uint64_t* keys_out, const uint32_t* values,
                                 uint32_t* values_out, int count, int end_bit) {
  wait_for_previous_kernel();
  std::vector<int> order(count);
  std::iota(order.begin(), order.end(), 0);
  const auto key = [&](int i) { return keys[i] << (64 - end_bit); };
  std::stable_sort(order.begin(), order.end(), [&](int a, int b) { return key(a) < key(b); });
  for (int i = 0; i < count; ++i) {
    keys_out[i] = keys[order[i]];
    values_out[i] = values[order[i]];
  }
}

cudaError_t sort_pairs(void* scratch, size_t& bytes, const uint64_t* keys, uint64_t* keys_out,
                       const uint32_t* values, uint32_t* values_out, int count, int end_bit,
                       cudaStream_t stream) {
  bytes = 1;
  if (scratch == nullptr) return cudaSuccess;
  return launch(&sort_pairs_alone, {dim3(1), dim3(1)}, stream, keys, keys_out, values, values_out, count,
                end_bit);
}
#else
cudaError_t sort_pairs(void* scratch, size_t& bytes, const uint64_t* keys, uint64_t* keys_out,
                       const uint32_t* values, uint32_t* values_out, int count, int end_bit,
                       cudaStream_t stream) {
  return cub::DeviceRadixSort::SortPairs(scratch, bytes, keys, keys_out, values, values_out, count, 0,
                                         end_bit, stream);
}
#endif

int key_bits(SortType type) {
  switch (type) {
    case SortType::kInt64:
      return 64;
    case SortType::kInt32:
    case SortType::kFloat32:
      return 32;
    default:
      return 16;
  }
}

struct Scratch {
  uint64_t *keys, *sorted_keys;
  uint32_t *indices, *order;
  void* sort;

  Scratch(void* scratch, int64_t elements) {
    const int64_t padded = (elements + 3) / 4 * 4;
    keys = static_cast<uint64_t*>(scratch);
    sorted_keys = keys + padded;
    indices = reinterpret_cast<uint32_t*>(sorted_keys + padded);
    order = indices + padded;
    sort = order + padded;
  }
  static size_t bytes(int64_t elements) { return static_cast<size_t>(elements + 3) / 4 * 4 * 24; }
};

LaunchShape shape_of(const Lines& lines) {
  return {dim3(static_cast<unsigned>((lines.elements() + kThreads - 1) / kThreads)), dim3(kThreads)};
}

template <typename T>
cudaError_t sort_lines(const T* values, T* sorted, int64_t* indices, void* scratch_bytes, Lines lines,
                       bool descending, size_t sort_bytes, cudaStream_t stream) {
  const Scratch scratch(scratch_bytes, lines.elements());
  const int line_bits = bits_for(lines.lines());
  const bool with_line = kKeyBits<T> + line_bits <= 64;
  QWEN_RETURN_IF_CUDA_ERROR(launch(&make_keys<T>, shape_of(lines), stream, values, scratch.keys,
                                   scratch.indices, lines, descending, with_line));
  QWEN_RETURN_IF_CUDA_ERROR(sort_pairs(scratch.sort, sort_bytes, scratch.keys, scratch.sorted_keys,
                                       scratch.indices, scratch.order, static_cast<int>(lines.elements()),
                                       kKeyBits<T> + (with_line ? line_bits : 0), stream));
  if (!with_line) {
    QWEN_RETURN_IF_CUDA_ERROR(launch(&make_line_keys, shape_of(lines), stream, scratch.order, scratch.keys,
                                     scratch.indices, lines));
    QWEN_RETURN_IF_CUDA_ERROR(sort_pairs(scratch.sort, sort_bytes, scratch.keys, scratch.sorted_keys,
                                         scratch.indices, scratch.order, static_cast<int>(lines.elements()),
                                         line_bits, stream));
  }
  return launch(&gather<T>, shape_of(lines), stream, values, scratch.order, sorted, indices, lines);
}

// The scratch that sorting itself takes.
size_t sort_pairs_bytes(int64_t elements, int end_bit) {
  size_t bytes = 0;
  sort_pairs(nullptr, bytes, nullptr, nullptr, nullptr, nullptr, static_cast<int>(elements), end_bit,
             nullptr);
  return bytes;
}

}  // namespace

size_t sort_scratch(SortType type, int64_t outer, int64_t length, int64_t inner) {
  const Lines lines = {outer, length, inner};
  const int bits = bits_for(lines.lines()), value_bits = key_bits(type);
  const size_t sorting = value_bits + bits <= 64 ? sort_pairs_bytes(lines.elements(), value_bits + bits)
                                                 : std::max(sort_pairs_bytes(lines.elements(), value_bits),
                                                            sort_pairs_bytes(lines.elements(), bits));
  return Scratch::bytes(lines.elements()) + sorting;
}

cudaError_t sort_stable(const void* values, void* sorted, int64_t* indices, void* scratch, SortType type,
                        int64_t outer, int64_t length, int64_t inner, bool descending, cudaStream_t stream) {
  const Lines lines = {outer, length, inner};
  if (outer < 0 || length < 0 || inner < 0 || lines.elements() >= kMostElements) return cudaErrorInvalidValue;
  if (lines.elements() == 0) return cudaSuccess;
  const size_t bytes = sort_scratch(type, outer, length, inner) - Scratch::bytes(lines.elements());
  const auto sort = [&]<typename T>(T* to) {
    return sort_lines(static_cast<const T*>(values), to, indices, scratch, lines, descending, bytes, stream);
  };
  switch (type) {
    case SortType::kInt32:
      return sort(static_cast<int32_t*>(sorted));
    case SortType::kInt64:
      return sort(static_cast<int64_t*>(sorted));
    case SortType::kFloat32:
      return sort(static_cast<float*>(sorted));
    case SortType::kBFloat16:
      return sort(static_cast<bf16*>(sorted));
    case SortType::kFloat16:
      return sort(static_cast<__half*>(sorted));
  }
  return cudaErrorInvalidValue;
}

}  // namespace qwen::cuda
