// Which token tiles a block of multiply_few has (gemm_few.cuh).
#pragma once

#include "kernels/linear/gemm_tile.cuh"

namespace qwen::cuda::gemm {

// Where a block's work begins, and how much there is.
struct FewShare {
  int items;   // of all blocks
  int expert;  // of the first token tile
  int begin;   // its first row
  int end;     // and that past its expert's last
};

// The token tiles one after the other: every expert's rows, cut into tiles of kTokens.
template <int kTokens>
class TokenTiles {
 public:
  __device__ __forceinline__ TokenTiles(const int32_t* offsets, int experts, const FewShare& share)
      : offsets_(offsets), experts_(experts), expert_(share.expert), begin_(share.begin), end_(share.end) {}

  // Past the last, it is none that may be used.
  __device__ __forceinline__ void advance() {
    begin_ += kTokens;
    if (begin_ < end_) return;
    begin_ = end_;
    const int lane = threadIdx.x % 32;
    for (int from = expert_ + 1;; from += 32) {
      const int end = from + lane < experts_ ? offsets_[from + lane + 1] : end_ + 1;
      const unsigned past = __ballot_sync(~0U, end > end_);
      if (past == 0) continue;
      const int owner = __ffs(past) - 1;
      expert_ = from + owner;
      end_ = __shfl_sync(~0U, end, owner);
      return;
    }
  }

  __device__ __forceinline__ int expert() const { return expert_; }
  __device__ __forceinline__ int begin() const { return begin_; }
  __device__ __forceinline__ int rows() const { return min(kTokens, end_ - begin_); }

 private:
  const int32_t* offsets_;
  int experts_;
  int expert_;
  int begin_;
  int end_;  // of the expert's rows
};

// Block b's first item, and past b - 1's last: b / blocks of them. `part` is 2^32 / blocks.
__device__ __forceinline__ int first_item(int items, int b, uint32_t part) {
  return b == static_cast<int>(gridDim.x)
             ? items
             : static_cast<int>(__umulhi(static_cast<uint32_t>(items), static_cast<uint32_t>(b) * part));
}

// The whole block's.
template <int kTokens>
__device__ __forceinline__ FewShare find_share(const int32_t* offsets, int experts, int row_tiles,
                                               uint32_t part) {
  __shared__ int of_warps[32];
  __shared__ FewShare share;
  const int lane = threadIdx.x % 32;
  const int warp = threadIdx.x / 32;
  const int each = (experts + static_cast<int>(blockDim.x) - 1) / static_cast<int>(blockDim.x);
  const int first = static_cast<int>(threadIdx.x) * each;  // expert of this thread
  const auto tiles = [&](int expert) {
    return expert < experts ? (offsets[expert + 1] - offsets[expert] + kTokens - 1) / kTokens : 0;
  };
  int count = 0;
  for (int i = 0; i < each; ++i) count += tiles(first + i);
  int sum = count;
#pragma unroll
  for (int offset = 1; offset < 32; offset *= 2) {
    const int other = __shfl_up_sync(~0U, sum, offset);
    if (lane >= offset) sum += other;
  }
  if (lane == 31) of_warps[warp] = sum;
  __syncthreads();
  const int of_warp = lane < static_cast<int>(blockDim.x) / 32 ? of_warps[lane] : 0;
  const int before = __reduce_add_sync(~0U, lane < warp ? of_warp : 0) + sum - count;
  const int items = __reduce_add_sync(~0U, of_warp) * row_tiles;
  int index = first_item(items, static_cast<int>(blockIdx.x), part) / row_tiles - before;
  if (index >= 0 && index < count) {
    int expert = first;
    for (; index >= tiles(expert); ++expert) index -= tiles(expert);
    share = {0, expert, offsets[expert] + index * kTokens, offsets[expert + 1]};
  }
  __syncthreads();
  return {items, share.expert, share.begin, share.end};
}

}  // namespace qwen::cuda::gemm
