// Stable sort along one dimension, for compiled graphs that sort. Conventions: cuda/types.h.
#pragma once

#include "kernels/cuda/types.h"

namespace qwen::cuda {

enum class SortType { kInt32, kInt64, kFloat32, kBFloat16, kFloat16 };

// Sorts each of the `outer` x `inner` lines of `length` elements of values [outer, length, inner] stably; NaN
// counts as the largest, as in PyTorch. sorted and indices (i64) have the same shape. scratch:
// sort_scratch(...) bytes.
cudaError_t sort_stable(const void* values, void* sorted, int64_t* indices, void* scratch, SortType type,
                        int64_t outer, int64_t length, int64_t inner, bool descending, cudaStream_t stream);
size_t sort_scratch(SortType type, int64_t outer, int64_t length, int64_t inner);

}  // namespace qwen::cuda
