// Weights on their way to L2 before the kernel that multiplies by them begins.
//
// That kernel can copy them to shared memory only when there is room for its blocks beside its predecessor's,
// and what is in flight then delays the predecessor's end. A prefetch holds nothing: kernels that leave the
// memory idle ask for the weights of a later one.
#pragma once

#include <algorithm>

#include "kernels/cuda/primitives.cuh"

namespace qwen::cuda {

class WeightPrefetch {
 public:
  // Of w, all of it or the first 16 MB, shared out to `blocks` blocks; a w without tiles: of nothing.
  static WeightPrefetch of(const Int4Matrix& w, int blocks) {
    constexpr int64_t kMost = 16 << 20;
    WeightPrefetch prefetch = {};
    if (w.tiles == nullptr) return prefetch;
    const int64_t rows =
        std::min<int64_t>(w.row_tiles(), std::max<int64_t>(kMost / (w.column_tiles() * 512), 1));
    prefetch.tiles_ = {reinterpret_cast<const unsigned char*>(w.tiles), rows * w.column_tiles() * 512,
                       blocks};
    prefetch.scales_ = {reinterpret_cast<const unsigned char*>(w.scales), rows * w.groups() * 32, blocks};
    return prefetch;
  }

  // Called by one thread of block `block`.
  __device__ __forceinline__ void begin(int block) const {
    tiles_.begin(block);
    scales_.begin(block);
  }

 private:
  struct Range {
    const unsigned char* from = nullptr;
    uint32_t bytes = 0;
    uint32_t each = 0;  // of a block, a multiple of 16

    Range() = default;
    Range(const unsigned char* from, int64_t bytes, int blocks)
        : from(from), bytes(static_cast<uint32_t>(bytes)), each(0) {
      each = static_cast<uint32_t>((bytes / 16 + blocks - 1) / blocks * 16);
    }
    __device__ __forceinline__ void begin(int block) const {
      const uint32_t first = static_cast<uint32_t>(block) * each;
      if (first < bytes) prefetch_to_l2(from + first, min(each, bytes - first));
    }
  };

  Range tiles_;
  Range scales_;
};

}  // namespace qwen::cuda
