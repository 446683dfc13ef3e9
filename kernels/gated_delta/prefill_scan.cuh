// Prefill, second: the chunked gated delta rule (Yang et al., Gated Delta Networks, 2024), chunk after chunk.
//
// With g the summed logarithms of decay in a chunk, beta_i, rows q_i, k_i, v_i, and S the state before it:
//   A_ij = beta_i (k_i . k_j) exp(g_i - g_j) for j < i;    P_ij = (q_i . k_j) exp(g_i - g_j) for j <= i;
//   N = (I + A)^-1 diag(beta) (v - diag(exp g) k S), what a token adds to the state's value for its key;
//   o = diag(exp g) q S + P N;    S <- exp(g_last) S + k^T diag(exp(g_last - g)) N.
// prepare_chunks computes (I + A)^-1 and P.
//
// The chain from state to state is one warp's for 16 columns of the state, which it holds transposed: then
// each product's result is the next one's left operand as it lies in the registers, and no thread waits for
// another. A second warp computes the outputs, a chunk behind.
#pragma once

#include "kernels/gated_delta/prefill_convolution.cuh"
#include "kernels/gated_delta/prefill_pipeline.cuh"
#include "kernels/gated_delta/prefill_tiles.cuh"

namespace qwen::cuda {

// Where StateColumns of the slot's state, from `column` of `head`, are: the lane's first.
__device__ __forceinline__ float* state_columns(float* recurrent_state, const Convolution& convolution,
                                                const DeltaShape& shape, int head, int column,
                                                unsigned lane) {
  const int64_t matrix = convolution.slot[0] * shape.value_heads + head;
  return recurrent_state + (matrix * shape.key_dim + lane % 4 * 2) * shape.value_dim + column +
         static_cast<int>(lane / 8 * 4 + lane / 4 % 2);
}

// Two tiles of a product's result side by side as the left operand of the next.
__device__ __forceinline__ void pack_operand(uint32_t (&a)[4], const float (&left)[4],
                                             const float (&right)[4]) {
  a[0] = pack_f16(left[0], left[1]);
  a[1] = pack_f16(left[2], left[3]);
  a[2] = pack_f16(right[0], right[1]);
  a[3] = pack_f16(right[2], right[3]);
}

// n: N^T of 16 columns, from c, S^T k^T, and v [64, 16].
__device__ __forceinline__ void add_to_values(float (&n)[kChunk / 8][4], const float (&c)[kChunk / 8][4],
                                              const uint16_t* v, const StateGates& gates, unsigned lane) {
  constexpr int kTokenTiles = kChunk / 16;
  uint32_t residual[kTokenTiles][4];  // (beta (v - exp(g) k S))^T
#pragma unroll
  for (int m = 0; m < kTokenTiles; ++m) {
    uint32_t values[4];
    load_a_transposed<16>(values, v, m * 16, 0, lane);
#pragma unroll
    for (int j = 0; j < 2; ++j) {
      const unsigned token = m * 16 + j * 8 + lane % 4 * 2;
      const auto beta = *reinterpret_cast<const float2*>(gates.beta + token);
      const auto beta_kept = *reinterpret_cast<const float2*>(gates.beta_kept + token);
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const uint32_t pair = values[2 * j + half];
        residual[m][2 * j + half] =
            pack_f16(beta.x * low_bf16(pair) - beta_kept.x * c[2 * m + j][2 * half],
                     beta.y * high_bf16(pair) - beta_kept.y * c[2 * m + j][2 * half + 1]);
      }
    }
  }
#pragma unroll
  for (auto& tile : n) tile[0] = tile[1] = tile[2] = tile[3] = 0;
#pragma unroll
  for (int t = 0; t < kTokenTiles; ++t) {
#pragma unroll
    for (int m = t; m < kTokenTiles; ++m) {
      const uint4 tile = gates.inverse[triangle_tile(m, t)][lane];
      const uint32_t b[2][2] = {{tile.x, tile.y}, {tile.z, tile.w}};
      mma_f16(n[2 * m], residual[t], b[0]);
      mma_f16(n[2 * m + 1], residual[t], b[1]);
    }
  }
}

// exp(g_last - g) N^T of tokens 16 t and on, as the left operand.
__device__ __forceinline__ void scale_operand(uint32_t (&a)[4], const float (&n)[kChunk / 8][4],
                                              const StateGates& gates, int t, unsigned lane) {
#pragma unroll
  for (int j = 0; j < 2; ++j) {
    const auto left = *reinterpret_cast<const float2*>(gates.left + t * 16 + j * 8 + lane % 4 * 2);
    a[2 * j] = pack_f16(left.x * n[2 * t + j][0], left.y * n[2 * t + j][1]);
    a[2 * j + 1] = pack_f16(left.x * n[2 * t + j][2], left.y * n[2 * t + j][3]);
  }
}

// 16 columns of a head's state, transposed: lane 4 r + q holds columns 4 (r / 2) + r % 2 and the second after
// it, at 8 n + 2 q and 8 n + 2 q + 1 of the key's dimension. So a lane of the outputs' has four consecutive
// columns.
template <int kKeyDim>
class StateColumns {
 public:
  // from: see state_columns; of rows of `stride`.
  __device__ __forceinline__ void load(const float* from, int stride) {
#pragma unroll
    for (int n = 0; n < kKeyDim / 8; ++n) {
#pragma unroll
      for (int i = 0; i < 4; ++i) s_[n][i] = from[(8 * n + i % 2) * stride + i / 2 * 2];
    }
  }
  __device__ __forceinline__ void store(float* to, int stride) const {
#pragma unroll
    for (int n = 0; n < kKeyDim / 8; ++n) {
#pragma unroll
      for (int i = 0; i < 4; ++i) to[(8 * n + i % 2) * stride + i / 2 * 2] = s_[n][i];
    }
  }

  // At 16 d of the key's dimension and on, as the left operand.
  __device__ __forceinline__ void operand(uint32_t (&a)[4], int d) const {
    pack_operand(a, s_[2 * d], s_[2 * d + 1]);
  }
  __device__ __forceinline__ float (&sums()) [kKeyDim / 8][4] { return s_; }

  // To the end of a chunk, but for what that adds.
  __device__ __forceinline__ void decay(const StateGates& gates) {
    const float kept = gates.kept_last[0];
#pragma unroll
    for (auto& tile : s_) {
#pragma unroll
      for (float& x : tile) x *= kept;
    }
  }

  // Through a chunk. k [64, Dk], v [64, 16]; leaves the state before it and N for the outputs, as b of two
  // products a tile.
  __device__ __forceinline__ void advance(const uint16_t* k, const uint16_t* v, const StateGates& gates,
                                          uint4* state_before, uint4* added, unsigned lane) {
    constexpr int kTokenTiles = kChunk / 16;
    float c[kChunk / 8][4] = {};  // S^T k^T
#pragma unroll
    for (int d = 0; d < kKeyDim / 16; ++d) {
      uint32_t a[4];
      operand(a, d);
      state_before[d * 32 + lane] = {a[0], a[2], a[1], a[3]};
#pragma unroll
      for (int m = 0; m < kTokenTiles; ++m) {
        uint32_t b[2][2];
        load_b_of_rows<kKeyDim>(b, k, m * 16, d * 16, lane);
        mma_f16(c[2 * m], a, b[0]);
        mma_f16(c[2 * m + 1], a, b[1]);
      }
    }
    float n[kChunk / 8][4];  // N^T
    add_to_values(n, c, v, gates, lane);
    decay(gates);
#pragma unroll
    for (int t = 0; t < kTokenTiles; ++t) {
      uint32_t a[4];
      pack_operand(a, n[2 * t], n[2 * t + 1]);
      added[t * 32 + lane] = {a[0], a[2], a[1], a[3]};
      scale_operand(a, n, gates, t, lane);
#pragma unroll
      for (int e = 0; e < kKeyDim / 16; ++e) {
        uint32_t b[2][2];
        load_b<kKeyDim>(b, k, t * 16, e * 16, lane);
        mma_f16(s_[2 * e], a, b[0]);
        mma_f16(s_[2 * e + 1], a, b[1]);
      }
    }
  }

 private:
  float s_[kKeyDim / 8][4];
};

// 16 columns of a chunk's outputs: lane 4 r + q holds columns 4 q to 4 q + 3 of tokens 16 m + 8 half + r.
template <int kKeyDim>
class OutputColumns {
 public:
  // From what StateColumns left.
  __device__ __forceinline__ void multiply(const uint16_t* queries, const OutputGates& gates,
                                           const uint4* state_before, const uint4* added, unsigned lane) {
#pragma unroll
    for (int m = 0; m < kTokenTiles; ++m) {
#pragma unroll
      for (int i = 0; i < 4; ++i) o_[m][0][i] = o_[m][1][i] = 0;
    }
#pragma unroll
    for (int d = 0; d < kKeyDim / 16; ++d) {
      const uint4 s = state_before[d * 32 + lane];
      const uint32_t b[2][2] = {{s.x, s.y}, {s.z, s.w}};
#pragma unroll
      for (int m = 0; m < kTokenTiles; ++m) {
        uint32_t a[4];
        load_a<kKeyDim>(a, queries, m * 16, d * 16, lane);
        mma_f16(o_[m][0], a, b[0]);
        mma_f16(o_[m][1], a, b[1]);
      }
    }
#pragma unroll
    for (int m = 0; m < kTokenTiles; ++m) {
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const float kept = gates.kept[m * 16 + half * 8 + lane / 4];
#pragma unroll
        for (int j = 0; j < 2; ++j) {
          o_[m][j][2 * half] *= kept;
          o_[m][j][2 * half + 1] *= kept;
        }
      }
    }
#pragma unroll
    for (int t = 0; t < kTokenTiles; ++t) {
      const uint4 n = added[t * 32 + lane];
      const uint32_t b[2][2] = {{n.x, n.y}, {n.z, n.w}};
#pragma unroll
      for (int m = t; m < kTokenTiles; ++m) {
        const uint4 tile = gates.mixing[triangle_tile(m, t)][lane];
        const uint32_t a[4] = {tile.x, tile.y, tile.z, tile.w};
        mma_f16(o_[m][0], a, b[0]);
        mma_f16(o_[m][1], a, b[1]);
      }
    }
  }

  // to: the lane's first column of the first token; of `tokens` tokens.
  __device__ __forceinline__ void store(float* to, int stride, int64_t tokens, unsigned lane) const {
#pragma unroll
    for (int m = 0; m < kTokenTiles; ++m) {
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const unsigned token = m * 16 + half * 8 + lane / 4;
        if (token >= tokens) continue;
        *reinterpret_cast<float4*>(to + token * static_cast<int64_t>(stride)) = {
            o_[m][0][2 * half], o_[m][0][2 * half + 1], o_[m][1][2 * half], o_[m][1][2 * half + 1]};
      }
    }
  }

 private:
  static constexpr int kTokenTiles = kChunk / 16;
  float o_[kTokenTiles][2][4];
};

// Block (column slice, value head): kColumns columns of the head's state, through all chunks. Warps: the
// state's, the outputs', and one that copies.
template <int kKeyDim, int kColumns, int kStages>
__global__ __launch_bounds__(kColumns * 4 + 32) void scan_chunks(PrefillChunks in, Convolution convolution,
                                                                 float* recurrent_state, float* core,
                                                                 DeltaShape shape) {
  using L = ScanLayout<kKeyDim, kColumns>;
  QWEN_DYNAMIC_SHARED(shared);
  const int head = static_cast<int>(blockIdx.y);
  const int first_column = static_cast<int>(blockIdx.x) * kColumns;
  const unsigned thread = threadIdx.x;
  const unsigned panel = thread / 32 % L::kPanels;
  const unsigned role = thread / 32 / L::kPanels;
  const unsigned lane = thread % 32;
  const int64_t tokens = convolution.tokens;
  const int chunks = static_cast<int>((tokens + kChunk - 1) / kChunk);
  const ScanPipeline<kKeyDim, kColumns, kStages> pipeline(
      ScanInputs<kKeyDim>(in, shape, head, first_column, chunks), shared, lane);
  const auto handover = [&](int chunk) {
    return reinterpret_cast<uint4*>(shared + L::handovers(kStages) +
                                    (chunk % 2 * L::kPanels + static_cast<int>(panel)) * L::kHandover);
  };

  if (role == 0) {
    float* const own_state = state_columns(recurrent_state, convolution, shape, head,
                                           first_column + static_cast<int>(panel) * 16, lane);
    StateColumns<kKeyDim> state;
    state.load(own_state, shape.value_dim);  // before the wait: see cuda/launch.h
    wait_for_previous_kernel();
    let_next_kernel_start();
    for (int chunk = 0; chunk < chunks; ++chunk) {
      pipeline.wait_for_state(chunk, panel);
      const unsigned char* const stage = shared + chunk % kStages * L::kStateStage;
      state.advance(reinterpret_cast<const uint16_t*>(stage),
                    reinterpret_cast<const uint16_t*>(stage + L::kV + panel * L::kPanel),
                    *reinterpret_cast<const StateGates*>(stage + L::kStateGates), handover(chunk),
                    handover(chunk) + L::kStateTiles * 32, lane);
      pipeline.state_is_done(chunk, panel);
    }
    state.store(own_state, shape.value_dim);
    return;
  }
  wait_for_previous_kernel();
  let_next_kernel_start();
  if (role == 2) {
    pipeline.copy_all();
    return;
  }
  // The convolution's state was last read by the kernel before.
  constexpr unsigned kThreads = L::kPanels * 32;
  for (unsigned channel = (blockIdx.y * gridDim.x + blockIdx.x) * kThreads + thread % kThreads;
       channel < static_cast<unsigned>(shape.channels()); channel += gridDim.x * gridDim.y * kThreads) {
    advance_convolution(convolution, shape, static_cast<int>(channel));
  }
  float* const own_core =
      core + head * shape.value_dim + first_column + static_cast<int>(panel * 16 + lane % 4 * 4);
  for (int chunk = 0; chunk < chunks; ++chunk) {
    pipeline.wait_for_outputs(chunk, panel);
    const unsigned char* const stage = shared + L::output_stages(kStages) + chunk % kStages * L::kOutputStage;
    OutputColumns<kKeyDim> outputs;
    outputs.multiply(reinterpret_cast<const uint16_t*>(stage),
                     *reinterpret_cast<const OutputGates*>(stage + L::kOutputGates), handover(chunk),
                     handover(chunk) + L::kStateTiles * 32, lane);
    pipeline.outputs_are_done(chunk, panel);
    const int64_t first = static_cast<int64_t>(chunk) * kChunk;
    outputs.store(own_core + first * shape.value_size(), shape.value_size(), tokens - first, lane);
  }
}

}  // namespace qwen::cuda
