#include <cmath>

#include "kernels/cuda/cluster.cuh"
#include "kernels/cuda/primitives.cuh"
#include "tests/kernels/cuda_primitives.h"

namespace qwen::cuda {
namespace {

// The 32-bit word of a [rows, K] matrix of T at (row, k).
template <typename T>
__device__ uint32_t word(const T* matrix, int depth, int row, int k) {
  return *reinterpret_cast<const uint32_t*>(matrix + row * depth + k);
}

__device__ void multiply(float (&c)[4], const uint32_t (&a)[4], const uint32_t (&b)[2], const bf16*) {
  mma_bf16(c, a, b);
}
__device__ void multiply(float (&c)[4], const uint32_t (&a)[4], const uint32_t (&b)[2], const float*) {
  mma_tf32(c, a, b);
}
__device__ void multiply(int32_t (&c)[4], const uint32_t (&a)[4], const uint32_t (&b)[2], const int8_t*) {
  mma_s8(c, a, b);
}

template <typename T, typename C>
__global__ void mma_kernel(const T* a, const T* b, const C* c, C* d) {
  wait_for_previous_kernel();
  constexpr int kPacked = 4 / sizeof(T);
  constexpr int kDepth = 8 * kPacked;
  const int r = threadIdx.x / 4;
  const int q = threadIdx.x % 4;
  const int k = kPacked * q;
  const int half = kDepth / 2;
  const uint32_t a_words[4] = {word(a, kDepth, r, k), word(a, kDepth, r + 8, k), word(a, kDepth, r, k + half),
                               word(a, kDepth, r + 8, k + half)};
  const uint32_t b_words[2] = {word(b, kDepth, r, k), word(b, kDepth, r, k + half)};
  C sums[4];
  for (int i = 0; i < 4; ++i) sums[i] = c[(r + i / 2 * 8) * 8 + 2 * q + i % 2];
  multiply(sums, a_words, b_words, a);
  for (int i = 0; i < 4; ++i) d[(r + i / 2 * 8) * 8 + 2 * q + i % 2] = sums[i];
}

__global__ void load_matrix_kernel(const uint16_t* matrices, uint32_t* out, bool transposed) {
  __shared__ __align__(16) uint16_t tile[4 * 8 * 8];
  wait_for_previous_kernel();
  for (int i = threadIdx.x; i < 4 * 8 * 8; i += 32) tile[i] = matrices[i];
  __syncwarp();
  uint32_t r[4];
  const uint16_t* const row = tile + 8 * threadIdx.x;
  if (transposed) {
    load_matrix_x4_transposed(r, row);
  } else {
    load_matrix_x4(r, row);
  }
  for (int i = 0; i < 4; ++i) out[4 * threadIdx.x + i] = r[i];
}

__global__ void shuffle_kernel(const int32_t* values, int32_t* out) {
  wait_for_previous_kernel();
  const int lane = threadIdx.x;
  const int32_t v = values[lane];
  const auto put = [&](int row, int32_t value) { out[32 * row + lane] = value; };
  put(0, __shfl_sync(~0U, v, 5));
  put(1, __shfl_up_sync(~0U, v, 3));
  put(2, __shfl_down_sync(~0U, v, 3));
  put(3, __shfl_xor_sync(~0U, v, 4));
  put(4, __shfl_sync(~0U, v, 5, 8));
  put(5, __shfl_up_sync(~0U, v, 3, 8));
  put(6, __shfl_down_sync(~0U, v, 3, 8));
  put(7, __shfl_xor_sync(~0U, v, 4, 8));
  put(8, static_cast<int32_t>(__ballot_sync(~0U, v & 1)));
  int32_t sum = v;
  if (lane % 2 == 0) {
    for (int offset = 16; offset >= 2; offset /= 2) sum += __shfl_xor_sync(0x55555555U, sum, offset);
  } else {
    for (int offset = 16; offset >= 2; offset /= 2) sum += __shfl_xor_sync(0xaaaaaaaaU, sum, offset);
  }
  put(9, sum);
}

__global__ void copy_async_kernel(const float* in, float* out, int n, int valid, bool wait) {
  QWEN_DYNAMIC_SHARED(bytes);
  float* const tile = reinterpret_cast<float*>(bytes);
  wait_for_previous_kernel();
  const int fours = n / 4;
  const int middle = fours / 2;
  const auto copy = [&](int begin, int end) {
    for (int i = begin + threadIdx.x; i < end; i += blockDim.x) {
      const bool is_valid = 4 * i < valid;
      copy_async_16(tile + 4 * i, is_valid ? in + 4 * i : in, is_valid);
    }
    copy_async_commit();
  };
  copy(0, middle);
  copy(middle, fours);
  const auto store = [&](int begin, int end) {
    __syncthreads();
    for (int i = 4 * begin + threadIdx.x; i < 4 * end; i += blockDim.x) out[i] = tile[i];
  };
  if (wait) copy_async_wait<1>();
  store(0, middle);
  if (wait) copy_async_wait<0>();
  store(middle, fours);
}

__global__ void last_block_sum_kernel(const float* in, float* partial, uint32_t* counter, float* out, int n) {
  __shared__ float warps[8];
  __shared__ bool is_last;
  wait_for_previous_kernel();
  const auto block_sum = [&](float v) {
    v = warp_sum(v);
    __syncthreads();
    if (threadIdx.x % 32 == 0) warps[threadIdx.x / 32] = v;
    __syncthreads();
    float sum = 0;
    for (int i = 0; i < 8; ++i) sum += warps[i];
    return sum;
  };
  const int i = blockIdx.x * blockDim.x + threadIdx.x;
  const float sum = block_sum(i < n ? in[i] : 0);
  if (threadIdx.x == 0) {
    partial[blockIdx.x] = sum;
    __threadfence();
    is_last = atomicInc(counter, gridDim.x - 1) == gridDim.x - 1;
  }
  __syncthreads();
  if (!is_last) return;
  __threadfence();
  float rest = 0;
  for (unsigned b = threadIdx.x; b < gridDim.x; b += blockDim.x) rest += __ldcg(partial + b);
  rest = block_sum(rest);
  if (threadIdx.x == 0) *out = rest;
}

__global__ void bits_kernel(const uint32_t* a, const uint32_t* b, uint32_t* out, int n) {
  wait_for_previous_kernel();
  const int i = blockIdx.x * blockDim.x + threadIdx.x;
  if (i >= n) return;
  const uint32_t x = a[i];
  const uint32_t y = b[i];
  const uint32_t rows[9] = {and_xor(x, y, 0x43084308U),
                            __byte_perm(x, y, 0x5140),
                            __funnelshift_l(x, y, 7),
                            __umulhi(x, y),
                            static_cast<uint32_t>(__popc(x)),
                            static_cast<uint32_t>(__clz(static_cast<int>(x))),
                            static_cast<uint32_t>(__ffs(static_cast<int>(x))),
                            __brev(x),
                            static_cast<uint32_t>(__dp4a(static_cast<int>(x), static_cast<int>(y), 1))};
  for (int row = 0; row < 9; ++row) out[row * n + i] = rows[row];
}

__global__ void fault_kernel(Fault fault, int32_t* out) {
  QWEN_DYNAMIC_SHARED(bytes);
  const unsigned t = threadIdx.x;
  if (fault != Fault::kNoWait || t != 40) wait_for_previous_kernel();
  if (fault == Fault::kEarlyEnd && t == 7) return;
  __syncthreads();
  int v = static_cast<int>(t);
  if (fault == Fault::kHalfWarp) {
    if (t % 32 < 16) v = __shfl_xor_sync(~0U, v, 1);
  } else if (fault == Fault::kMixedOperations && t % 2 == 0) {
    __syncwarp();
  } else {
    v = __shfl_xor_sync(~0U, v, 1);
  }
  bytes[t] = static_cast<unsigned char>(v);
  if (fault == Fault::kWritePastShared && t == 0) bytes[blockDim.x] = 0;
  __syncthreads();
  out[t] = bytes[t];
}

__global__ void cluster_kernel(const float* in, float* out, int blocks, ClusterFault fault) {
  QWEN_DYNAMIC_SHARED(bytes);
  const int threads = static_cast<int>(blockDim.x);
  const int rank = static_cast<int>(blockIdx.x) % blocks;
  const int thread = static_cast<int>(threadIdx.x);
  const bool is_faulty = rank == blocks - 1 && thread == 1;
  cluster_begin();
  wait_for_previous_kernel();
  const float own = in[blockIdx.x * blockDim.x + threadIdx.x];
  if (is_faulty && fault == ClusterFault::kArriveTwice) cluster_arrive();
  cluster_wait();
  if (is_faulty && fault == ClusterFault::kEarlyEnd) return;
  if (is_faulty && fault == ClusterFault::kNoSuchBlock) BlockMemory(bytes, blocks).store(0, own);
  for (int to = 0; to < blocks; ++to) {
    const int row = rank * threads * static_cast<int>(sizeof(float2));
    const BlockMemory there(bytes + row, to);
    there.store(8 * thread, own);
    there.store(8 * thread + 4, static_cast<float>(to));
    if (thread % 2 == 1) there.store(8 * thread, make_float2(own, static_cast<float>(to)));
  }
  cluster_arrive();
  cluster_wait();
  float sum = 0;
  for (int from = 0; from < blocks; ++from) {
    const float2 got = reinterpret_cast<const float2*>(bytes)[from * threads + threads - 1 - thread];
    sum += got.y == static_cast<float>(rank) ? got.x * static_cast<float>(1 + (from + rank) % blocks) : NAN;
  }
  out[blockIdx.x * blockDim.x + threadIdx.x] = sum;
}

}  // namespace

cudaError_t test_mma_bf16(const bf16* a, const bf16* b, const float* c, float* d, cudaStream_t stream) {
  return launch(mma_kernel<bf16, float>, {1, 32}, stream, a, b, c, d);
}
cudaError_t test_mma_tf32(const float* a, const float* b, const float* c, float* d, cudaStream_t stream) {
  return launch(mma_kernel<float, float>, {1, 32}, stream, a, b, c, d);
}
cudaError_t test_mma_s8(const int8_t* a, const int8_t* b, const int32_t* c, int32_t* d, cudaStream_t stream) {
  return launch(mma_kernel<int8_t, int32_t>, {1, 32}, stream, a, b, c, d);
}
cudaError_t test_load_matrix(const uint16_t* matrices, uint32_t* out, bool transposed, cudaStream_t stream) {
  return launch(load_matrix_kernel, {1, 32}, stream, matrices, out, transposed);
}
cudaError_t test_shuffles(const int32_t* values, int32_t* out, cudaStream_t stream) {
  return launch(shuffle_kernel, {1, 32}, stream, values, out);
}
cudaError_t test_copy_async(const float* in, float* out, int n, int valid, bool wait, cudaStream_t stream) {
  return launch(copy_async_kernel, {1, 128, n * sizeof(float)}, stream, in, out, n, valid, wait);
}
cudaError_t test_last_block_sum(const float* in, float* partial, uint32_t* counter, float* out, int n,
                                cudaStream_t stream) {
  const unsigned blocks = (n + 255) / 256;
  return launch(last_block_sum_kernel, {blocks, 256}, stream, in, partial, counter, out, n);
}
cudaError_t test_bits(const uint32_t* a, const uint32_t* b, uint32_t* out, int n, cudaStream_t stream) {
  const unsigned blocks = (n + 127) / 128;
  return launch(bits_kernel, {blocks, 128}, stream, a, b, out, n);
}
cudaError_t test_fault(int fault, int32_t* out, cudaStream_t stream) {
  return launch(fault_kernel, {1, 64, 64}, stream, static_cast<Fault>(fault), out);
}

cudaError_t test_cluster(const float* in, float* out, int clusters, int blocks, int threads, int fault,
                         cudaStream_t stream) {
  const LaunchShape shape = {static_cast<unsigned>(clusters * blocks), static_cast<unsigned>(threads),
                             blocks * threads * sizeof(float2), static_cast<unsigned>(blocks)};
  return launch(cluster_kernel, shape, stream, in, out, blocks, static_cast<ClusterFault>(fault));
}

}  // namespace qwen::cuda
