// What the launchers of a decode step's experts check.
#pragma once

#include <algorithm>

#include "kernels/moe/cuda.h"

namespace qwen::cuda {

inline bool are_valid(const Int4Matrix& routed, const Int4Matrix& shared, const MoeShape& shape, int rows) {
  return rows >= 1 && rows <= kMaxDecodeRows && routed.is_valid() && shared.is_valid() &&
         routed.group == shared.group && shape.experts <= kMaxExperts && shape.top_k >= 1 &&
         shape.top_k <= std::min(kMaxChoices, shape.experts) && shape.intermediate % 8 == 0 &&
         shape.shared_intermediate % 8 == 0;
}

}  // namespace qwen::cuda
