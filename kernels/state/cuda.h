// The state of a slot, zeroed or copied by one launch instead of one for each of some hundred pieces of it.
// Conventions: cuda/types.h.
#pragma once

#include <cstddef>

#include "kernels/cuda/types.h"

namespace qwen::cuda {

// Bytes to write: copies of those at `from`, or zeros where that is null. Any alignment.
struct Run {
  std::byte* to;
  const std::byte* from;
  size_t bytes;
};

inline constexpr int kMaxRuns = 128;  // of a launch: they are an argument of the kernel

// Writes them all, in no order: none overlaps another's `to`. At most kMaxRuns.
cudaError_t write_runs(const Run* runs, int count, cudaStream_t stream);

}  // namespace qwen::cuda
