// Kernels of one operation each, by which test_cuda_primitives.py holds the emulation to the hardware.
// Conventions: kernels/cuda/types.h.
#pragma once

#include "kernels/cuda/types.h"

namespace qwen::cuda {

// d [16, 8] = c + a b, for a [16, K] row-major and b [8, K]: its columns one after the other.
//   bf16: K = 16; tf32 (float32 operands): K = 8; s8: K = 32.
cudaError_t test_mma_bf16(const bf16* a, const bf16* b, const float* c, float* d, cudaStream_t stream);
cudaError_t test_mma_tf32(const float* a, const float* b, const float* c, float* d, cudaStream_t stream);
cudaError_t test_mma_s8(const int8_t* a, const int8_t* b, const int32_t* c, int32_t* d, cudaStream_t stream);

// out u32 [32, 4]: the registers of load_matrix_x4 for matrices u16 [4, 8, 8].
cudaError_t test_load_matrix(const uint16_t* matrices, uint32_t* out, bool transposed, cudaStream_t stream);

// Rows of out i32 [10, 32], for values i32 [32]: __shfl_sync from lane 5, up 3, down 3, xor 4; the same four
// within groups of 8; __ballot_sync of odd values; and the sum of the lanes of the same parity, by two masks
// at once.
cudaError_t test_shuffles(const int32_t* values, int32_t* out, cudaStream_t stream);

// out [n] = in [n], n a multiple of 4 up to 4096, through shared memory by two groups of asynchronous copies;
// elements from `valid` on (a multiple of 4) are zeros. Without `wait` what it gives is undefined.
cudaError_t test_copy_async(const float* in, float* out, int n, int valid, bool wait, cudaStream_t stream);

// out [1] = sum of in [n] over blocks of 256 threads, the last block to finish adding up what the others left
// in partial [blocks]. counter: zero, and zero again after it.
cudaError_t test_last_block_sum(const float* in, float* partial, uint32_t* counter, float* out, int n,
                                cudaStream_t stream);

// Rows of out u32 [9, n] for a, b u32 [n]: and_xor with 0x43084308, __byte_perm by 0x5140, __funnelshift_l by
// 7, __umulhi, __popc(a), __clz(a), __ffs(a), __brev(a), __dp4a(a, b, 1).
cudaError_t test_bits(const uint32_t* a, const uint32_t* b, uint32_t* out, int n, cudaStream_t stream);

// What each kind of fault gives: undefined on a GPU.
enum class Fault { kNone, kNoWait, kEarlyEnd, kHalfWarp, kMixedOperations, kWritePastShared };
cudaError_t test_fault(int fault, int32_t* out, cudaStream_t stream);

// out [clusters, blocks, threads]: each block's thread t has the sum over its cluster's blocks b of
// in[b, threads - 1 - t], which they store in its shared memory, times 1 + (b + own rank) % blocks.
enum class ClusterFault { kNone, kArriveTwice, kEarlyEnd, kNoSuchBlock };
cudaError_t test_cluster(const float* in, float* out, int clusters, int blocks, int threads, int fault,
                         cudaStream_t stream);

}  // namespace qwen::cuda
