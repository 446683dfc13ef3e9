// Prefill, second: the chunked gated delta rule (Yang et al., Gated Delta Networks, 2024), chunk after chunk.
//
// With g the summed logarithms of decay in a chunk, beta_i, rows q_i, k_i, v_i, and S the state before it:
//   A_ij = beta_i (k_i . k_j) exp(g_i - g_j) for j < i;    P_ij = (q_i . k_j) exp(g_i - g_j) for j <= i;
//   N = (I + A)^-1 diag(beta) (v - diag(exp g) k S)        what each token adds to the state's value for its
//   key o = diag(exp g) q S + P N;    S <- exp(g_last) S + k^T diag(exp(g_last - g)) N.
// prepare_chunks computes (I + A)^-1 and P. Applying the inverse here, rather than to beta v and beta exp(g)
// k there, moves 64 columns a chunk instead of Dk + Dv, and subtracts in float32.
//
// Factors are bfloat16 with float32 sums. Where one rounding would show when keys resemble each other (A near
// all ones: 1 % of the output), a factor is two bfloat16 summands: the inverse, P, N and what the inverse is
// applied to.
#pragma once

#include "kernels/gated_delta/prefill_convolution.cuh"
#include "kernels/gated_delta/prefill_tiles.cuh"

namespace qwen::cuda {

inline constexpr int kScanThreads = 256;

// Shared memory of scan_chunks, in elements of bfloat16: kStages times a chunk's inputs, then the operands
// that it computes.
template <int kKeyDim, int kColumns>
struct ScanLayout {
  static constexpr int kSquare = kChunk * kChunk;
  static constexpr int kK = 0;
  static constexpr int kQ = kK + kChunk * kKeyDim;
  static constexpr int kInverse = kQ + kChunk * kKeyDim;  // both summands
  static constexpr int kMixing = kInverse + 2 * kSquare;  // both summands
  static constexpr int kV = kMixing + 2 * kSquare;
  static constexpr int kDecay = kV + kChunk * kColumns;  // float32
  static constexpr int kBeta = kDecay + 2 * kChunk;      // float32
  static constexpr int kStage = kBeta + 2 * kChunk;

  static constexpr int kOperand = kChunk * kColumns;
  static constexpr int kState = 0;                               // S [Dk, columns]
  static constexpr int kResidual = kState + kKeyDim * kColumns;  // beta (v - exp(g) k S), both summands
  static constexpr int kAdded = kResidual + 2 * kOperand;        // N, both summands
  static constexpr int kDecayed = kAdded + 2 * kOperand;         // exp(g_last - g) N, both summands
  static constexpr int kOperands = kDecayed + 2 * kOperand;

  static constexpr size_t bytes(int stages) { return (stages * kStage + kOperands) * sizeof(bf16); }
};

// A thread's part of copying a chunk's inputs for one block: columns first_column and on of value head
// `head`. Its pieces of a matrix are a multiple of eight rows apart, so that one swizzled offset serves all.
template <int kKeyDim, int kColumns>
class ChunkReader {
 public:
  __device__ __forceinline__ ChunkReader(const PrefillChunks& in, const DeltaShape& shape, int head,
                                         int first_column, unsigned thread) {
    const int key_head = head / (shape.value_heads / shape.key_heads);
    const unsigned value_row = thread / (kColumns / 8);
    const unsigned value_column = thread % (kColumns / 8) * 8;
    const unsigned square_row = thread / (kChunk / 8);
    const unsigned square_column = thread % (kChunk / 8) * 8;
    k_ = in.k + key_head * kChunk * kKeyDim + thread * 8;
    q_ = in.q + key_head * kChunk * kKeyDim + thread * 8;
    inverse_ = in.inverse + head * 2 * L::kSquare + thread * 8;
    mixing_ = in.mixing + head * 2 * L::kSquare + thread * 8;
    v_ = in.v + (head * kChunk + static_cast<int>(value_row)) * shape.value_dim + first_column + value_column;
    gate_ = (thread < kChunk / 4 ? in.decay : in.beta) + head * kChunk + thread % (kChunk / 4) * 4;
    key_stride_ = shape.key_heads * kChunk * kKeyDim;
    square_stride_ = shape.value_heads * 2 * L::kSquare;
    value_stride_ = shape.value_heads * kChunk * shape.value_dim;
    gate_stride_ = shape.value_heads * kChunk;
    to_key_ = swizzled<kKeyDim>(thread / (kKeyDim / 8), thread % (kKeyDim / 8) * 8);
    to_square_ = swizzled<kChunk>(square_row, square_column);
    to_value_ = L::kV + swizzled<kColumns>(value_row, value_column);
    to_gate_ = L::kDecay + thread * 8;
    // Tiles of 16 by 16 above the diagonal are not read.
    in_upper_half_ = square_column / 16 <= square_row / 16;
    in_lower_half_ = square_column / 16 <= square_row / 16 + 2;
    has_value_ = thread < kChunk * kColumns / 8;
    has_gate_ = thread < kChunk / 2;
  }

  // Starts the copies of the next chunk, as one group.
  __device__ __forceinline__ void copy_next(bf16* stage) {
    constexpr int kKeyRows = kScanThreads / (kKeyDim / 8);
#pragma unroll
    for (int i = 0; i < kChunk / kKeyRows; ++i) {
      copy_async_16(stage + L::kK + to_key_ + i * kKeyRows * kKeyDim, k_ + i * kScanThreads * 8);
      copy_async_16(stage + L::kQ + to_key_ + i * kKeyRows * kKeyDim, q_ + i * kScanThreads * 8);
    }
    static_assert(kScanThreads * 8 == L::kSquare / 2);
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      if (i % 2 == 0 ? in_upper_half_ : in_lower_half_) {
        copy_async_16(stage + L::kInverse + to_square_ + i * (L::kSquare / 2),
                      inverse_ + i * (L::kSquare / 2));
        copy_async_16(stage + L::kMixing + to_square_ + i * (L::kSquare / 2), mixing_ + i * (L::kSquare / 2));
      }
    }
    if (has_value_) copy_async_16(stage + to_value_, v_);
    if (has_gate_) copy_async_16(stage + to_gate_, gate_);
    copy_async_commit();
    k_ += key_stride_;
    q_ += key_stride_;
    inverse_ += square_stride_;
    mixing_ += square_stride_;
    v_ += value_stride_;
    gate_ += gate_stride_;
  }

 private:
  using L = ScanLayout<kKeyDim, kColumns>;
  static_assert(L::kBeta == L::kDecay + 2 * kChunk && kChunk * kColumns / 8 <= kScanThreads);

  const bf16 *k_, *q_, *inverse_, *mixing_, *v_;
  const float* gate_;
  int key_stride_, square_stride_, value_stride_, gate_stride_;
  unsigned to_key_, to_square_, to_value_, to_gate_;
  bool in_upper_half_, in_lower_half_, has_value_, has_gate_;
};

// c += T m, for rows 16 tile to 16 tile + 15 of a lower triangular T [64, 64] and m [64, columns], each as
// two summands, less the product of the small ones.
template <int kColumns>
__device__ __forceinline__ void multiply_triangular(float (&c)[kColumns / 8][4], const bf16* triangle,
                                                    const bf16* m, unsigned tile, unsigned lane) {
  // Apart from c, for shorter chains of dependent products.
  float small[kColumns / 8][4] = {};
  for (unsigned k = 0; k <= tile; ++k) {
    uint32_t a[4];
    uint32_t a_low[4];
    load_a<kChunk>(a, triangle, tile * 16, k * 16, lane);
    load_a<kChunk>(a_low, triangle, kChunk + tile * 16, k * 16, lane);
#pragma unroll
    for (int n = 0; n < kColumns / 16; ++n) {
      uint32_t b[2][2];
      uint32_t b_low[2][2];
      load_b<kColumns>(b, m, k * 16, n * 16, lane);
      load_b<kColumns>(b_low, m, kChunk + k * 16, n * 16, lane);
#pragma unroll
      for (int j = 0; j < 2; ++j) {
        mma_bf16(c[2 * n + j], a, b[j]);
        mma_bf16(small[2 * n + j], a, b_low[j]);
        mma_bf16(small[2 * n + j], a_low, b[j]);
      }
    }
  }
#pragma unroll
  for (int n = 0; n < kColumns / 8; ++n) {
#pragma unroll
    for (int i = 0; i < 4; ++i) c[n][i] += small[n][i];
  }
}

// Stores a pair of columns as two summands in a matrix [2, 64, columns].
template <int kColumns>
__device__ __forceinline__ void store_split(bf16* m, unsigned row, unsigned column, float x, float y) {
  uint32_t high;
  uint32_t low;
  split_bf16(x, y, high, low);
  *reinterpret_cast<uint32_t*>(m + swizzled<kColumns>(row, column)) = high;
  *reinterpret_cast<uint32_t*>(m + swizzled<kColumns>(kChunk + row, column)) = low;
}

// Block (column slice, value head): kColumns columns of the head's state, through all chunks. Eight warps:
// the state update is 16 rows of Dk each, in registers; of the products with the state, the first four have
// k's rows, the others q's.
template <int kKeyDim, int kColumns, int kStages>
__global__ __launch_bounds__(kScanThreads) void scan_chunks(PrefillChunks in, Convolution convolution,
                                                            float* recurrent_state, float* core,
                                                            DeltaShape shape) {
  using L = ScanLayout<kKeyDim, kColumns>;
  constexpr int kTiles = kColumns / 8;
  static_assert(kStages == 1 || kStages == 2);
  QWEN_DYNAMIC_SHARED(shared);
  auto* const stages = reinterpret_cast<bf16*>(shared);
  bf16* const operands = stages + kStages * L::kStage;
  bf16* const state_operand = operands + L::kState;
  bf16* const residual = operands + L::kResidual;
  bf16* const added = operands + L::kAdded;
  bf16* const decayed = operands + L::kDecayed;

  const int head = static_cast<int>(blockIdx.y);
  const int first_column = static_cast<int>(blockIdx.x) * kColumns;
  const unsigned thread = threadIdx.x;
  const unsigned warp = thread / 32;
  const unsigned lane = thread % 32;
  const unsigned r = lane / 4;
  const unsigned q = lane % 4;
  const int64_t tokens = convolution.tokens;
  const int chunks = static_cast<int>((tokens + kChunk - 1) / kChunk);
  wait_for_previous_kernel();
  let_next_kernel_start();

  ChunkReader<kKeyDim, kColumns> reader(in, shape, head, first_column, thread);
  if constexpr (kStages == 2) reader.copy_next(stages);

  // The convolution's state was last read by the kernel before.
  const unsigned channels = shape.channels();
  for (unsigned channel = (blockIdx.y * gridDim.x + blockIdx.x) * kScanThreads + thread; channel < channels;
       channel += gridDim.x * gridDim.y * kScanThreads) {
    advance_convolution(convolution, shape, static_cast<int>(channel));
  }

  const bool holds_state = warp < kKeyDim / 16;
  const unsigned state_row = warp * 16 + r;  // and the row 8 below
  float* const own_state =
      recurrent_state +
      ((convolution.slot[0] * shape.value_heads + head) * kKeyDim + state_row) * shape.value_dim +
      first_column + 2 * q;
  const int below = 8 * shape.value_dim;
  float state[kTiles][4] = {};
  const auto store_state_operand = [&] {
#pragma unroll
    for (int n = 0; n < kTiles; ++n) {
      const unsigned column = n * 8 + 2 * q;
      *reinterpret_cast<uint32_t*>(state_operand + swizzled<kColumns>(state_row, column)) =
          pack_bf16(state[n][0], state[n][1]);
      *reinterpret_cast<uint32_t*>(state_operand + swizzled<kColumns>(state_row + 8, column)) =
          pack_bf16(state[n][2], state[n][3]);
    }
  };
  if (holds_state) {
#pragma unroll
    for (int n = 0; n < kTiles; ++n) {
      const auto above = *reinterpret_cast<const float2*>(own_state + n * 8);
      const auto under = *reinterpret_cast<const float2*>(own_state + below + n * 8);
      state[n][0] = above.x;
      state[n][1] = above.y;
      state[n][2] = under.x;
      state[n][3] = under.y;
    }
    store_state_operand();
  }

  const bool has_keys = warp < 4;
  const unsigned tile = warp % 4;
  const unsigned row = tile * 16 + r;  // of the chunk; and the row 8 below
  for (int chunk = 0; chunk < chunks; ++chunk) {
    if constexpr (kStages == 1) {
      __syncthreads();  // no one reads the chunk before any more
      reader.copy_next(stages);
    }
    copy_async_wait<0>();
    __syncthreads();  // the chunk and the state operand are there, the chunk before is done with
    const bf16* const stage = stages + chunk % kStages * L::kStage;
    if (kStages == 2 && chunk + 1 < chunks) reader.copy_next(stages + (chunk + 1) % kStages * L::kStage);
    const bf16* const k = stage + L::kK;
    const auto* const decay = reinterpret_cast<const float*>(stage + L::kDecay);
    const auto* const beta = reinterpret_cast<const float*>(stage + L::kBeta);

    // k S or q S.
    float c[kTiles][4] = {};
    const bf16* const rows = has_keys ? k : stage + L::kQ;
#pragma unroll
    for (int d = 0; d < kKeyDim; d += 16) {
      uint32_t a[4];
      load_a<kKeyDim>(a, rows, tile * 16, d, lane);
#pragma unroll
      for (int n = 0; n < kColumns / 16; ++n) {
        uint32_t b[2][2];
        load_b<kColumns>(b, state_operand, d, n * 16, lane);
        mma_bf16(c[2 * n], a, b[0]);
        mma_bf16(c[2 * n + 1], a, b[1]);
      }
    }
    const float kept[2] = {fast_exp(decay[row]), fast_exp(decay[row + 8])};  // of the state before the chunk
#pragma unroll
    for (int n = 0; n < kTiles; ++n) {
#pragma unroll
      for (int i = 0; i < 4; ++i) c[n][i] *= kept[i / 2];
    }
    if (has_keys) {
#pragma unroll
      for (int n = 0; n < kTiles; ++n) {
#pragma unroll
        for (int half = 0; half < 2; ++half) {
          const unsigned own_row = row + 8 * half;
          const unsigned column = n * 8 + 2 * q;
          const uint32_t v =
              *reinterpret_cast<const uint32_t*>(stage + L::kV + swizzled<kColumns>(own_row, column));
          store_split<kColumns>(residual, own_row, column, beta[own_row] * (low_bf16(v) - c[n][2 * half]),
                                beta[own_row] * (high_bf16(v) - c[n][2 * half + 1]));
        }
      }
    }
    __syncthreads();

    const float last = decay[kChunk - 1];
    if (has_keys) {
      float n_rows[kTiles][4] = {};
      multiply_triangular<kColumns>(n_rows, stage + L::kInverse, residual, tile, lane);
      const float left[2] = {fast_exp(last - decay[row]), fast_exp(last - decay[row + 8])};
#pragma unroll
      for (int n = 0; n < kTiles; ++n) {
#pragma unroll
        for (int half = 0; half < 2; ++half) {
          const float x = n_rows[n][2 * half];
          const float y = n_rows[n][2 * half + 1];
          store_split<kColumns>(added, row + 8 * half, n * 8 + 2 * q, x, y);
          store_split<kColumns>(decayed, row + 8 * half, n * 8 + 2 * q, x * left[half], y * left[half]);
        }
      }
    }
    __syncthreads();

    if (holds_state) {
      const float state_kept = fast_exp(last);
#pragma unroll
      for (int n = 0; n < kTiles; ++n) {
#pragma unroll
        for (int i = 0; i < 4; ++i) state[n][i] *= state_kept;
      }
#pragma unroll
      for (int t = 0; t < kChunk; t += 16) {
        uint32_t a[4];
        load_a_transposed<kKeyDim>(a, k, t, warp * 16, lane);
#pragma unroll
        for (int n = 0; n < kColumns / 16; ++n) {
          uint32_t b[2][2];
          uint32_t b_low[2][2];
          load_b<kColumns>(b, decayed, t, n * 16, lane);
          load_b<kColumns>(b_low, decayed, kChunk + t, n * 16, lane);
#pragma unroll
          for (int j = 0; j < 2; ++j) {
            mma_bf16(state[2 * n + j], a, b[j]);
            mma_bf16(state[2 * n + j], a, b_low[j]);
          }
        }
      }
      store_state_operand();
    }
    if (!has_keys) {
      multiply_triangular<kColumns>(c, stage + L::kMixing, added, tile, lane);
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const int64_t token = static_cast<int64_t>(chunk) * kChunk + row + 8 * half;
        if (token >= tokens) continue;
        float* const to = core + token * shape.value_size() + head * shape.value_dim + first_column + 2 * q;
#pragma unroll
        for (int n = 0; n < kTiles; ++n) {
          *reinterpret_cast<float2*>(to + n * 8) = {c[n][2 * half], c[n][2 * half + 1]};
        }
      }
    }
  }
  if (holds_state) {
#pragma unroll
    for (int n = 0; n < kTiles; ++n) {
      *reinterpret_cast<float2*>(own_state + n * 8) = {state[n][0], state[n][1]};
      *reinterpret_cast<float2*>(own_state + below + n * 8) = {state[n][2], state[n][3]};
    }
  }
}

}  // namespace qwen::cuda
