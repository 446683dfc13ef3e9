#include <algorithm>

#include "kernels/cuda/primitives.cuh"
#include "kernels/state/cuda.h"

namespace qwen::cuda {
namespace {

constexpr int kThreads = 256;
constexpr int kBlocks = 64;  // of a run, at most

struct Runs {
  Run of[kMaxRuns];
};

template <typename Word>
__device__ __forceinline__ void write(const Run& run) {
  Word* const to = reinterpret_cast<Word*>(run.to);
  const Word* const from = reinterpret_cast<const Word*>(run.from);
  const size_t count = run.bytes / sizeof(Word);
  const size_t stride = static_cast<size_t>(gridDim.x) * kThreads;
  for (size_t i = static_cast<size_t>(blockIdx.x) * kThreads + threadIdx.x; i < count; i += stride) {
    to[i] = from != nullptr ? from[i] : Word{};
  }
}

__global__ void __launch_bounds__(kThreads) write_all(const __grid_constant__ Runs runs) {
  wait_for_previous_kernel();
  const Run& run = runs.of[blockIdx.y];
  const uintptr_t places =
      reinterpret_cast<uintptr_t>(run.to) | reinterpret_cast<uintptr_t>(run.from) | run.bytes;
  if (places % sizeof(uint4) == 0) {
    write<uint4>(run);
  } else {
    write<uint8_t>(run);
  }
  // Not before: a step's kernels read state before they wait; see cuda/launch.h.
  __threadfence();
  let_next_kernel_start();
}

}  // namespace

cudaError_t write_runs(const Run* runs, int count, cudaStream_t stream) {
  if (count < 0 || count > kMaxRuns) return cudaErrorInvalidValue;
  if (count == 0) return cudaSuccess;
  Runs argument = {};
  std::copy_n(runs, count, argument.of);
  size_t longest = 0;
  for (int i = 0; i < count; ++i) longest = std::max(longest, runs[i].bytes);
  const size_t blocks = (longest / sizeof(uint4) + kThreads - 1) / kThreads;
  const dim3 grid(static_cast<unsigned>(std::clamp<size_t>(blocks, 1, kBlocks)),
                  static_cast<unsigned>(count));
  return launch(write_all, {grid, dim3(kThreads)}, stream, argument);
}

}  // namespace qwen::cuda
