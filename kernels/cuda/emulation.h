// CUDA kernels on the CPU, for tests on machines without a GPU: with QWEN_CUDA_EMULATION defined, a .cu file
// compiles as C++. Link emulation.cpp, emulated_machine.cpp and emulated_fiber.cpp; emulated_runtime.cpp and
// emulated_graphs.cpp have the functions of CUDA's runtime.
//
// Each thread of a block is a fiber; blocks run one after the other, those of a cluster at once. Threads of a
// warp are not in step: only barriers, warp operations and the end of a thread order them, as on the
// hardware. A launch returns cudaErrorUnknown, with the reason on stderr, when threads wait for what never
// comes, when a thread ends without wait_for_previous_kernel(), and when a warp operation or a cluster's
// barrier is used wrongly. Dynamic shared memory is all ones, NaN in every float type, when a block begins.
// QWEN_EMULATION_ORDER=reverse runs blocks and threads last to first: a result that then differs has a race.
// QWEN_EMULATED_MULTIPROCESSORS is how many the device has, 3 if unset; QWEN_EMULATED_CLUSTER how many blocks
// a cluster of it can have, 8 if unset, 1 for a device without.
//
// Not found: accesses out of range, reads of uninitialized static shared memory (it keeps what the last block
// left, and blocks that run at once have but one), and writes before wait_for_previous_kernel().
#pragma once

#include <cuda_runtime_api.h>
#include <vector_functions.h>

#include <cstddef>
#include <cstdint>
#include <functional>

// CUDA's own headers define most of these empty for a host compiler.
#undef __shared__
#define __shared__ static
#undef __launch_bounds__
#define __launch_bounds__(...)

// The fiber that runs, and its launch.
inline uint3 threadIdx;
inline uint3 blockIdx;
inline dim3 blockDim;
inline dim3 gridDim;
inline constexpr int warpSize = 32;

namespace qwen::cuda::emulated {

inline constexpr unsigned kMaxThreads = 1024;
inline constexpr size_t kMaxSharedBytes = 227 * 1024;

// Runs `kernel` in every thread of every block, or records it where `stream` is being captured. `cluster`
// blocks run at once, neighbours along x.
cudaError_t run_clusters(dim3 grid, dim3 block, size_t shared_bytes, unsigned cluster, cudaStream_t stream,
                         std::function<void()> kernel);

// As launch.h.
int multiprocessors();
int max_cluster_blocks();

// Set by emulated_graphs.cpp: takes an operation that its stream captures, and says whether it has.
using Capture = bool (*)(cudaStream_t stream, const std::function<cudaError_t()>& operation);
inline Capture capture = nullptr;

// The rest is called in kernels.

unsigned char* dynamic_shared();

enum class Vote { kCount, kAnd, kOr };
// __syncthreads, and what the whole block's predicates come to.
int block_barrier(Vote vote, int predicate);

// Suspends the lane until all of `mask` have called the same operation, then has one of them compute it for
// all: combine(each lane's arguments, mask).
using Combine = void (*)(void* const (&arguments)[32], uint32_t mask);
void warp_operation(const char* name, uint32_t mask, Combine combine, void* arguments);

unsigned lane();
// The lanes that exist: a last warp may have fewer than 32.
uint32_t warp_lanes();

// Ends the launch with an error.
[[noreturn]] void fail(const char* reason);

void previous_kernel_waited_for();

// See cluster.cuh. of_block: where `p`, of this block's shared memory, is in that of another.
void cluster_arrive();
void cluster_wait();
void* of_block(void* p, unsigned rank);

// A copy happens as late as its wait allows, and its destination is all ones meanwhile: it finds both a use
// before the wait and a destination that others still read.
void copy_async(void* to, const void* from, bool valid);
void copy_async_commit();
void copy_async_wait(int pending);

}  // namespace qwen::cuda::emulated

// The block's dynamic shared memory, as bytes called `name`.
#define QWEN_DYNAMIC_SHARED(name) unsigned char* const name = ::qwen::cuda::emulated::dynamic_shared()

#include "kernels/cuda/emulated_intrinsics.h"
