// What the warps of a block do in decode with a chunk of keys against up to 8 query heads, all of it in
// shared memory:
//   scores^T [16 keys, 8 heads] = K [16, Dh] q^T,   result^T [16 elements, 8 heads] += V^T [16, keys]
//   weights^T
// kDim is Dh padded to a multiple of 64; r = lane / 4 and q = lane % 4.
#pragma once

#include "kernels/attention/decode_cut.cuh"
#include "kernels/attention/heads.cuh"

namespace qwen::cuda {

// Out of L2, in the order of the calls; zeros where `valid` is false: one predicated load, where a branch
// each would keep loads from being issued together.
#ifdef QWEN_CUDA_EMULATION
inline int64_t load_past_l1(const int64_t* p) { return *p; }
inline uint4 load_past_l1(const bf16* p, bool valid) { return valid ? load_16(p) : uint4{0, 0, 0, 0}; }
#else
__device__ __forceinline__ int64_t load_past_l1(const int64_t* p) {
  int64_t v;
  asm volatile("ld.global.cg.s64 %0, [%1];" : "=l"(v) : "l"(p));
  return v;
}
__device__ __forceinline__ uint4 load_past_l1(const bf16* p, bool valid) {
  uint4 v;
  asm volatile(
      "{\n\t.reg .pred valid;\n\tsetp.ne.s32 valid, %5, 0;\n\t"
      "mov.b32 %0, 0;\n\tmov.b32 %1, 0;\n\tmov.b32 %2, 0;\n\tmov.b32 %3, 0;\n\t"
      "@valid ld.global.cg.v4.u32 {%0, %1, %2, %3}, [%4];\n\t}"
      : "=&r"(v.x), "=&r"(v.y), "=&r"(v.z), "=&r"(v.w)
      : "l"(p), "r"(static_cast<int>(valid)));
  return v;
}
#endif

// Makes the compiler have computed v here, not earlier and not later: what is known before the wait for the
// previous kernel costs nothing there and a good part of the kernel's time after it.
#ifdef QWEN_CUDA_EMULATION
template <typename T>
void compute_now(T& /*v*/) {}
#else
__device__ __forceinline__ void compute_now(int& v) { asm volatile("" : "+r"(v)); }
__device__ __forceinline__ void compute_now(uint32_t& v) { asm volatile("" : "+r"(v)); }
__device__ __forceinline__ void compute_now(float& v) { asm volatile("" : "+f"(v)); }
template <typename T>
__device__ __forceinline__ void compute_now(T*& v) {
  asm volatile("" : "+l"(v));
}
#endif

// Rows of keys or values, their 16-byte pieces permuted by the row so that eight rows' pieces of one column,
// which a matrix load takes at once, lie in different banks.
template <int kDim, int kKeys>
struct Rows {
  static constexpr int kPieces = kDim / 8;
  static constexpr int kRowBytes = kDim * 2;
  static constexpr int kBytes = kKeys * kRowBytes;

  // In bytes.
  __device__ __forceinline__ static int piece(int row, int column) {
    return row * kRowBytes + (column ^ (row & 7)) * 16;
  }
};

// How a thread copies its pieces, which are all of one column.
template <int kDim, int kKeys, int kThreads>
struct RowsCopy {
  using R = Rows<kDim, kKeys>;
  static constexpr int kStep = kThreads / R::kPieces;
  static_assert(kStep % 8 == 0);  // so the permutation stays

  int row;
  int column;

  __device__ __forceinline__ explicit RowsCopy(int thread)
      : row(thread / R::kPieces), column(thread % R::kPieces) {}

  // Rows `first` to `end` - 1 of a cache, as far as they lie before `position`, whose own row is left to
  // others, and zeros up to a whole tile.
  __device__ __forceinline__ void copy(unsigned char* to, const bf16* cache, int first, int end, int position,
                                       int head_dim) const {
    int row_now = row;
    compute_now(row_now);
    to += R::piece(row_now, column);
    const bool in_head = 8 * column < head_dim;
    const bf16* const from = cache + (in_head ? 8 * column : 0);
    const int last = first + (end - first + kTileKeys - 1) / kTileKeys * kTileKeys;
#pragma unroll 2
    for (int key = first + row_now; key < last; key += kStep, to += kStep * R::kRowBytes) {
      const bf16* const from_key = from + static_cast<int64_t>(min(key, position)) * head_dim;
      if (key != position) copy_async_16(to, from_key, key < position && in_head);
    }
  }
};

// How the warps share a chunk: for the scores a tile of keys and a part of Dh each, for the weights a head,
// for the result 16 or 32 elements of Dh each and all keys.
template <int kDim, int kKeys>
struct Chunk {
  using R = Rows<kDim, kKeys>;
  static constexpr int kTiles = kKeys / kTileKeys;
  static constexpr int kParts = kHeads / kTiles;  // of Dh
  static constexpr int kSteps = kDim / 16 / kParts;
  static constexpr int kOfLane = kKeys / 32;
  static constexpr int kOutputs = kDim >= 128 ? kDim / 128 : 1;  // tiles of Dh of a warp
  static constexpr int kOutputWarps = kDim / 16 / kOutputs;

  // Strides that keep what the warps read and write free of bank conflicts.
  static constexpr int kQueryStride = kDim + 8;
  static constexpr int kScoreStride = kKeys + 4;
  static constexpr int kWeightStride = kKeys + 8;

  using Queries = bf16[kHeads][kQueryStride];
  using Scores = float[kParts][kHeads][kScoreStride];
  using Weights = bf16[kHeads][kWeightStride];

  // Offsets in bytes of what this lane reads and writes in a chunk.
  int queries;
  int keys;
  int values;
  int scores;
  int head_scores;
  int head_weights;
  int weights;

  __device__ __forceinline__ Chunk(int warp, int lane) {
    const int first_step = warp / kTiles * kSteps;
    const int row = warp % kTiles * kTileKeys;
    const int r = lane / 4;
    const int q = lane % 4;
    queries = (lane % 8 * kQueryStride + 8 * (2 * first_step + lane / 8)) * 2;
    keys = R::piece(row + lane % 16, 2 * first_step + lane / 16);
    values = R::piece(lane / 16 * 8 + lane % 8, 2 * warp * kOutputs + lane / 8 % 2);
    scores = ((warp / kTiles * kHeads + 2 * q) * kScoreStride + row + r) * 4;
    head_scores = (warp * kScoreStride + kOfLane * lane) * 4;
    head_weights = (warp * kWeightStride + kOfLane * lane) * 2;
    weights = (r * kWeightStride + 2 * q) * 2;
    for (int* const v : {&queries, &keys, &values, &scores, &head_scores, &head_weights, &weights})
      compute_now(*v);
  }

  // The warp's part of the queries, as the second operand of its products.
  __device__ __forceinline__ void load_queries(uint32_t (&to)[kSteps][2], const Queries& from) const {
    static_assert(kSteps % 2 == 0);
    const auto* const at = reinterpret_cast<const unsigned char*>(&from) + queries;
#pragma unroll
    for (int s = 0; s < kSteps; s += 2) {
      uint32_t v[4];
      load_matrix_x4(v, at + 32 * s);
      to[s][0] = v[0], to[s][1] = v[1], to[s + 1][0] = v[2], to[s + 1][1] = v[3];
    }
  }

  // The warp's part of the scores of its tile.
  __device__ __forceinline__ void multiply_keys(Scores& to, const unsigned char* unit,
                                                const uint32_t (&from)[kSteps][2]) const {
    float sums[2][4] = {};
#pragma unroll
    for (int s = 0; s < kSteps; ++s) {
      uint32_t v[4];
      load_matrix_x4(v, unit + (keys ^ (32 * s)));
      mma_bf16(sums[s % 2], v, from[s]);
    }
    auto* const at = reinterpret_cast<float*>(reinterpret_cast<unsigned char*>(&to) + scores);
#pragma unroll
    for (int i = 0; i < 4; ++i) at[i % 2 * kScoreStride + i / 2 * 8] = sums[0][i] + sums[1][i];
  }

  // The warp's head's scores of keys kOfLane * lane and on.
  __device__ __forceinline__ void load_scores(float (&v)[kOfLane], const Scores& from) const {
    const auto* const at =
        reinterpret_cast<const float*>(reinterpret_cast<const unsigned char*>(&from) + head_scores);
#pragma unroll
    for (int i = 0; i < kOfLane; ++i) v[i] = at[i];
#pragma unroll
    for (int p = 1; p < kParts; ++p) {
#pragma unroll
      for (int i = 0; i < kOfLane; ++i) v[i] += at[p * kHeads * kScoreStride + i];
    }
  }
  __device__ __forceinline__ void store_weights(Weights& to, const float (&v)[kOfLane]) const {
    auto* const at = reinterpret_cast<unsigned char*>(&to) + head_weights;
    static_assert(kOfLane <= 2);
    if constexpr (kOfLane == 2) {
      *reinterpret_cast<uint32_t*>(at) = pack_bf16(v[0], v[1]);
    } else {
      *reinterpret_cast<bf16*>(at) = __float2bfloat16(v[0]);
    }
  }

  // result[j]: elements r and r + 8 of the warp's tile j, each of heads 2 q and 2 q + 1.
  __device__ __forceinline__ void multiply_values(float (&result)[kOutputs][4], const unsigned char* unit,
                                                  const Weights& from, int rows) const {
    const auto* const at =
        reinterpret_cast<const uint32_t*>(reinterpret_cast<const unsigned char*>(&from) + weights);
    float odd[kOutputs][4] = {};
#pragma unroll
    for (int s = 0; s < kTiles; ++s) {
      if (s * kTileKeys >= rows) break;
      const uint32_t b[2] = {at[8 * s], at[8 * s + 4]};
#pragma unroll
      for (int j = 0; j < kOutputs; ++j) {
        uint32_t v[4];
        load_matrix_x4_transposed(v, unit + (values ^ (32 * j)) + s * kTileKeys * R::kRowBytes);
        mma_bf16(s % 2 == 0 ? result[j] : odd[j], v, b);
      }
    }
#pragma unroll
    for (int j = 0; j < kOutputs; ++j) {
#pragma unroll
      for (int i = 0; i < 4; ++i) result[j][i] += odd[j][i];
    }
  }
};

}  // namespace qwen::cuda
