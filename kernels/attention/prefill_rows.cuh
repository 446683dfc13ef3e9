// The rows of prefill's attention: pairs (token, query head of one key head), token by token. The heads of a
// key head so share what is read of the cache, and few tokens still fill a tile.
#pragma once

#include "kernels/attention/heads.cuh"

namespace qwen::cuda::prefill_attention {

// A tile [kRows, kDim] in shared memory as warpgroup products take it: [kDim / 64][kRows][64], a row's
// 16-byte chunks permuted so that eight rows of one column lie in different banks.
template <int kDim, int kRows>
struct Tile {
  static constexpr int kChunks = kDim / 8;
  static constexpr int kSize = kRows * kDim;
  static constexpr int kBlock = kRows * 64;  // of 64 columns
  __device__ __forceinline__ static int offset(int row, int chunk) {
    return chunk / 8 * kBlock + row * 64 + (chunk % 8 ^ (row & 7)) * 8;
  }
  // Of 2 i chunks after the offset of chunk 0 or 1.
  __device__ __forceinline__ static int advance(int offset, int i) {
    return (offset ^ 16 * (i % 4)) + kBlock * (i / 4);
  }
};

struct Arguments {
  const bf16* qkv;      // for the gates
  const bf16* rotated;  // [T, Hq, Dh]
  const bf16* key_cache;
  const bf16* value_cache;
  const int64_t* position;
  const int64_t* slot;
  bf16* out;
  AttentionShape shape;
  int tokens;
};

// Walks over rows, pairs (token, query head of the key head), without a division a step.
class RowWalk {
 public:
  __device__ __forceinline__ RowWalk(int row, int step, int heads)
      : token(row / heads),
        head(row % heads),
        heads_(heads),
        token_step_(step / heads),
        head_step_(step % heads) {}
  __device__ __forceinline__ void next() {
    token += token_step_;
    head += head_step_;
    if (head >= heads_) {
      head -= heads_;
      ++token;
    }
  }

  int token;
  int head;

 private:
  int heads_;
  int token_step_;
  int head_step_;
};

// Copies a warp's 16 rows of queries, those from end_row on as zeros.
template <int kRows, int kDim>
__device__ __forceinline__ void copy_queries(bf16* to, const Arguments& a, int first_row, int warp_row,
                                             int end_row, int key_head, int heads, int lane) {
  using Rows = Tile<kDim, kRows>;
  constexpr int kStep = 32 / Rows::kChunks;
  const int chunk = lane % Rows::kChunks;
  const int dim = a.shape.head_dim;
  int row = warp_row + lane / Rows::kChunks;
  RowWalk walk(first_row + row, kStep, heads);
#pragma unroll 4
  for (int i = 0; i < 16 / kStep; ++i) {
    const bool valid = first_row + row < end_row && 8 * chunk < dim;
    const bf16* from = a.rotated;
    if (valid) {
      from += (static_cast<int64_t>(walk.token) * a.shape.query_heads + key_head * heads + walk.head) * dim +
              8 * chunk;
    }
    copy_async_16(to + Rows::offset(row, chunk), from, valid);
    row += kStep;
    walk.next();
  }
}

// gated() of heads.cuh, the same but for numbers too small for float32's normal ones.
__device__ __forceinline__ float sigmoid(float v) {
#ifdef QWEN_CUDA_EMULATION
  return gate_factor(v);
#else
  float power;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(power) : "f"(v * -kLog2E));
  float factor;
  asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(factor) : "f"(1.0F + power));
  return factor;
#endif
}
__device__ __forceinline__ uint4 gate_all(float (&v)[8], const uint4& gates) {
  float factor[8];
  unpack_bf16(factor, gates);
#pragma unroll
  for (float& f : factor) f = sigmoid(f);
  round_all(factor);
  round_all(v);
#pragma unroll
  for (int i = 0; i < 8; ++i) v[i] *= factor[i];
  return pack_bf16(v);
}

// A warp's 16 rows from shared memory to `out`, gated; kAtOnce gates of a lane are under way at once.
template <int kRows, int kDim, int kMostAtOnce = 8>
__device__ __forceinline__ void write_rows(const Arguments& a, const bf16* rows, int first_row, int warp_row,
                                           int end_row, int key_head, int heads, int lane) {
  using Rows = Tile<kDim, kRows>;
  constexpr int kStep = 32 / Rows::kChunks;
  constexpr int kSteps = 16 / kStep;
  constexpr int kAtOnce = kSteps < kMostAtOnce ? kSteps : kMostAtOnce;
  const int chunk = lane % Rows::kChunks;
  const int dim = a.shape.head_dim;
  if (8 * chunk >= dim) return;
  int row = warp_row + lane / Rows::kChunks;
  RowWalk walk(first_row + row, kStep, heads);
#pragma unroll 1
  for (int i = 0; i < kSteps; i += kAtOnce) {
    uint4 gates[kAtOnce];
    int64_t to[kAtOnce];
#pragma unroll
    for (int j = 0; j < kAtOnce; ++j) {
      const int head = key_head * heads + walk.head;
      to[j] = (static_cast<int64_t>(walk.token) * a.shape.query_heads + head) * dim + 8 * chunk;
      if (first_row + row + j * kStep < end_row) {
        gates[j] = load_16(a.qkv + static_cast<int64_t>(walk.token) * a.shape.row_size() +
                           (2 * head + 1) * dim + 8 * chunk);
      }
      walk.next();
    }
#pragma unroll
    for (int j = 0; j < kAtOnce; ++j) {
      if (first_row + row < end_row) {
        float v[8];
        unpack_bf16(v, load_16(rows + Rows::offset(row, chunk)));
        store_16(a.out + to[j], gate_all(v, gates[j]));
      }
      row += kStep;
    }
  }
}

}  // namespace qwen::cuda::prefill_attention
