// Prefill, first: all of a chunk that does not depend on the state. See prefill_scan.cuh for the algorithm.
#pragma once

#include <type_traits>

#include "kernels/gated_delta/prefill_convolution.cuh"
#include "kernels/gated_delta/prefill_inverse.cuh"
#include "kernels/gated_delta/prefill_tiles.cuh"

namespace qwen::cuda {

inline constexpr int kPrepareThreads = 512;
// A token that decays the state further wipes it out in float32; a bound keeps differences of sums exact
// enough.
inline constexpr float kLeastLogDecay = -88.0F;

// Shared memory of prepare_chunks: k and q; then, in their place, two value heads' matrices to invert; and
// the gates of the group.
template <int kKeyDim>
__host__ __device__ constexpr int prepare_matrices_bytes() {
  constexpr int kKeys = 2 * kChunk * kKeyDim * static_cast<int>(sizeof(uint16_t));
  constexpr int kInverses = 2 * kChunk * kInverseStride * static_cast<int>(sizeof(float));
  return kKeys > kInverses ? kKeys : kInverses;
}
template <int kKeyDim>
__host__ __device__ int prepare_shared_bytes(const DeltaShape& shape) {
  return prepare_matrices_bytes<kKeyDim>() +
         shape.value_heads / shape.key_heads * 2 * kChunk * static_cast<int>(sizeof(float));
}

// What a warp reads for the gates of 64 tokens of a value head; lane l has tokens 2 l and 2 l + 1.
struct GateInputs {
  float a[2], b[2];
  float a_log, dt_bias;

  __device__ __forceinline__ void load(const float* gates, const bf16* a_logs, const bf16* dt_biases,
                                       int head, int value_heads, int64_t first, int64_t tokens, int lane) {
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const int64_t row = first + 2 * lane + i;
      const float* const from = gates + (row < tokens ? row : tokens - 1) * 2 * value_heads + head;
      a[i] = from[0];
      b[i] = from[value_heads];
    }
    a_log = __bfloat162float(a_logs[head]);
    dt_bias = __bfloat162float(dt_biases[head]);
  }

  // tokens: how many of the chunk there are. decay (its summed logarithm) and beta are the block's own.
  __device__ __forceinline__ void finish(int tokens, int lane, float* decay, float* beta, StateGates& state,
                                         OutputGates& output) const {
    float logs[2] = {};
    float betas[2] = {};
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      if (2 * lane + i >= tokens) continue;
      logs[i] = fmaxf(log_decay(a[i], a_log, dt_bias), kLeastLogDecay);
      betas[i] = fast_sigmoid(b[i]);
    }
    const float pair = logs[0] + logs[1];
    float sum = pair;
#pragma unroll
    for (int offset = 1; offset < 32; offset *= 2) {
      const float before = __shfl_up_sync(~0U, sum, offset);
      if (lane >= offset) sum += before;
    }
    const float last = __shfl_sync(~0U, sum, 31);
    const float2 sums = {sum - logs[1], sum};
    const float2 kept = {fast_exp(sums.x), fast_exp(sums.y)};
    const auto store = [&](float* to, float x, float y) {
      *reinterpret_cast<float2*>(to + 2 * lane) = {x, y};
    };
    store(decay, sums.x, sums.y);
    store(beta, betas[0], betas[1]);
    store(state.beta, betas[0], betas[1]);
    store(state.beta_kept, betas[0] * kept.x, betas[1] * kept.y);
    store(state.left, fast_exp(last - sums.x), fast_exp(last - sums.y));
    if (lane < 4) state.kept_last[lane] = fast_exp(last);
    store(output.kept, kept.x, kept.y);
  }
};

// Each of four sums over groups of kLanes lanes, in all of them: half the shuffles of four butterflies.
template <int kLanes>
__device__ __forceinline__ void sum_rows(float (&x)[4], int lane) {
  // Lane l gets the sum 2 (l / 8 % 2) + l / 4 % 2, then all lanes get all.
  const bool upper = (lane & 8) != 0;
  const bool right = (lane & 4) != 0;
  float first = upper ? x[2] : x[0];
  float second = upper ? x[3] : x[1];
  first += __shfl_xor_sync(~0U, upper ? x[0] : x[2], 8);
  second += __shfl_xor_sync(~0U, upper ? x[1] : x[3], 8);
  float own = right ? second : first;
  own += __shfl_xor_sync(~0U, right ? first : second, 4);
  own += __shfl_xor_sync(~0U, own, 2);
  own += __shfl_xor_sync(~0U, own, 1);
  if (kLanes == 32) own += __shfl_xor_sync(~0U, own, 16);
#pragma unroll
  for (int i = 0; i < 4; ++i) x[i] = __shfl_sync(~0U, own, (lane & 16) + i * 4);
}

// The convolution of the value heads' values, by the block's blockIdx.z - 1 of gridDim.z - 1.
__device__ __forceinline__ void prepare_values(const Convolution& in, const PrefillChunks& out,
                                               const DeltaShape& shape) {
  constexpr int kStrip = 8;  // rows a thread convolves
  constexpr int kStrips = kChunk / kStrip;
  const int64_t chunk = blockIdx.y;
  const int group = shape.value_heads / shape.key_heads;
  const int lanes = group * shape.value_dim / 4;
  const int first_value = static_cast<int>(blockIdx.x) * group * shape.value_dim;
  const int thread = static_cast<int>((blockIdx.z - 1) * kPrepareThreads + threadIdx.x);
  const int threads = static_cast<int>(gridDim.z - 1) * kPrepareThreads;
#pragma unroll 1
  for (int item = thread; item < kStrips * lanes; item += threads) {
    const int strip = item / lanes * kStrip;
    const int value = first_value + item % lanes * 4;
    const int channel = 2 * shape.key_heads * shape.key_dim + value;
    ConvolutionRows<kStrip> rows;
    rows.load(in, shape, channel, chunk * kChunk + strip);
    float4 x[kStrip];
    convolve(rows, ConvolutionWeights(in, shape, channel), in.tokens - chunk * kChunk - strip, x);
    // In StateColumns' order, swizzled.
    uint16_t* const to =
        out.v + (chunk * shape.value_size() + value / 16 * 16) * kChunk + strip * 16 + value % 16 / 2;
    static_assert(kStrip == 8);
#pragma unroll
    for (int i = 0; i < kStrip; ++i) {
      *reinterpret_cast<uint32_t*>(to + i * 16 + i / 4 * 8) = pack_bf16(x[i].x, x[i].y);
      *reinterpret_cast<uint32_t*>(to + i * 16 + (1 - i / 4) * 8) = pack_bf16(x[i].z, x[i].w);
    }
  }
}

// Block (key head, chunk, 0) for the key head and its value heads but for their values, which the blocks
// (key head, chunk, 1 and on) have. Dv a multiple of 32.
template <int kKeyDim>
__global__ __launch_bounds__(kPrepareThreads, 2) void prepare_chunks(Convolution in, const float* gates,
                                                                     const bf16* a_log, const bf16* dt_bias,
                                                                     PrefillChunks out, DeltaShape shape) {
  constexpr int kStrip = 4;            // rows a thread convolves
  constexpr int kLanes = kKeyDim / 4;  // that share a row of q or k
  constexpr int kHalf = kPrepareThreads / 2;
  QWEN_DYNAMIC_SHARED(shared);
  auto* const keys = reinterpret_cast<uint16_t*>(shared);  // k, then q
  auto* const inverses = reinterpret_cast<float*>(shared);
  const int group = shape.value_heads / shape.key_heads;
  auto* const decays = reinterpret_cast<float*>(shared + prepare_matrices_bytes<kKeyDim>());
  float* const betas = decays + group * kChunk;

  const int key_head = static_cast<int>(blockIdx.x);
  const int64_t chunk = blockIdx.y;
  const int64_t first = chunk * kChunk;
  const int thread = static_cast<int>(threadIdx.x);
  const int warp = thread / 32;
  const int lane = thread % 32;
  wait_for_previous_kernel();
  if (blockIdx.z > 0) {
    let_next_kernel_start();
    prepare_values(in, out, shape);
    return;
  }

  const int64_t tokens_left = in.tokens - first;
  const int tokens = tokens_left < kChunk ? static_cast<int>(tokens_left) : kChunk;
  const int64_t first_value_head = chunk * shape.value_heads + key_head * group;
  GateInputs gate_inputs;
  if (warp < group) {
    gate_inputs.load(gates, a_log, dt_bias, key_head * group + warp, shape.value_heads, first, in.tokens,
                     lane);
  }

  // k by the first half of the warps, q by the other.
  const bool is_q = thread >= kHalf;
  {
    const int column = thread % kLanes * 4;
    const int channel = (is_q ? 0 : shape.key_heads * kKeyDim) + key_head * kKeyDim + column;
    uint16_t* const to = keys + (is_q ? kChunk * kKeyDim : 0);
    const float scale = is_q ? rsqrtf(static_cast<float>(kKeyDim)) : 1.0F;
    const ConvolutionWeights weights(in, shape, channel);
#pragma unroll 1
    for (int strip = thread % kHalf / kLanes * kStrip; strip < kChunk; strip += kHalf / kLanes * kStrip) {
      ConvolutionRows<kStrip> rows;
      rows.load(in, shape, channel, first + strip);
      float4 x[kStrip];
      convolve(rows, weights, tokens - strip, x);
      float squares[kStrip];
#pragma unroll
      for (int i = 0; i < kStrip; ++i) {
        squares[i] = x[i].x * x[i].x + x[i].y * x[i].y + x[i].z * x[i].z + x[i].w * x[i].w;
      }
      sum_rows<kLanes>(squares, lane);
#pragma unroll
      for (int i = 0; i < kStrip; ++i) {
        const float norm = fast_rsqrt(squares[i] + kL2Epsilon) * scale;
        store4(to + swizzled<kKeyDim>(strip + i, column), pack_f16(x[i].x * norm, x[i].y * norm),
               pack_f16(x[i].z * norm, x[i].w * norm));
      }
    }
  }
#pragma unroll 1
  for (int h = warp; h < group; h += kPrepareThreads / 32) {
    if (h != warp) {
      gate_inputs.load(gates, a_log, dt_bias, key_head * group + h, shape.value_heads, first, in.tokens,
                       lane);
    }
    gate_inputs.finish(tokens, lane, decays + h * kChunk, betas + h * kChunk, out.state[first_value_head + h],
                       out.output[first_value_head + h]);
  }
  __syncthreads();

  // k k^T by the first half of the warps, q k^T by the other, a warp 16 rows, of every second 16 tokens as
  // far as the diagonal.
  const int row_tile = warp % 4;
  const int odd = warp / 4 % 2;
  float products[kChunk / 32][2][4] = {};
  const auto multiply = [&](auto tiles) {
    const uint16_t* const rows = keys + (is_q ? kChunk * kKeyDim : 0);
#pragma unroll
    for (int k = 0; k < kKeyDim; k += 16) {
      uint32_t a[4];
      load_a<kKeyDim>(a, rows, row_tile * 16, k, lane);
#pragma unroll
      for (int j = 0; j < tiles(); ++j) {
        uint32_t b[2][2];
        load_b_of_rows<kKeyDim>(b, keys, (2 * j + odd) * 16, k, lane);
        mma_f16(products[j][0], a, b[0]);
        mma_f16(products[j][1], a, b[1]);
      }
    }
  };
  if (row_tile >= odd + 2) {
    multiply(std::integral_constant<int, 2>());
  } else if (row_tile >= odd) {
    multiply(std::integral_constant<int, 1>());
  }
  // Both matrices as they lie.
#pragma unroll
  for (int i = 0; i < 2 * kChunk * kKeyDim; i += kPrepareThreads * 8) {
    const int at = i + thread * 8;
    uint16_t* const to = at < kChunk * kKeyDim ? out.k + at : out.q + (at - kChunk * kKeyDim);
    *reinterpret_cast<uint4*>(to + (chunk * shape.key_heads + key_head) * kChunk * kKeyDim) =
        *reinterpret_cast<const uint4*>(keys + at);
  }
  __syncthreads();
  let_next_kernel_start();

  const int row = row_tile * 16 + lane / 4;  // and the row 8 below
  // x exp(g_row - g_column) of a lane's elements of a tile, zero above the diagonal, where the difference is
  // positive and may overflow.
  const auto decayed = [&](float (&x)[2][4], int j, const float* decay) {
    const float own[2] = {decay[row], decay[row + 8]};
#pragma unroll
    for (int n = 0; n < 2; ++n) {
      const int column = (2 * j + odd) * 16 + n * 8 + lane % 4 * 2;
      const auto others = *reinterpret_cast<const float2*>(decay + column);
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const float kept[2] = {fast_exp(fminf(own[half] - others.x, 0.0F)),
                               fast_exp(fminf(own[half] - others.y, 0.0F))};
        x[n][2 * half] = column <= row + 8 * half ? products[j][n][2 * half] * kept[0] : 0.0F;
        x[n][2 * half + 1] = column < row + 8 * half ? products[j][n][2 * half + 1] * kept[1] : 0.0F;
      }
    }
  };
  const int team = warp / 8;  // of a value head
#pragma unroll 1
  for (int pair = 0; pair < group; pair += 2) {
#pragma unroll 1
    for (int h = pair; h < pair + 2 && h < group; ++h) {
      const float* const decay = decays + h * kChunk;
      const float* const beta = betas + h * kChunk;
      float* const inverse = inverses + (h - pair) * kChunk * kInverseStride;
#pragma unroll
      for (int j = 0; j < kChunk / 32; ++j) {
        const int t = 2 * j + odd;
        if (t > row_tile) continue;
        float x[2][4];
        decayed(x, j, decay);
        if (is_q) {
          out.output[first_value_head + h].mixing[triangle_tile(row_tile, t)][lane] = {
              pack_f16(x[0][0], x[0][1]), pack_f16(x[0][2], x[0][3]), pack_f16(x[1][0], x[1][1]),
              pack_f16(x[1][2], x[1][3])};
          continue;
        }
#pragma unroll
        for (int n = 0; n < 2; ++n) {
#pragma unroll
          for (int half = 0; half < 2; ++half) {
            const float own = beta[row + 8 * half];
            *reinterpret_cast<float2*>(inverse + (row + 8 * half) * kInverseStride + t * 16 + n * 8 +
                                       lane % 4 * 2) = {own * x[n][2 * half], own * x[n][2 * half + 1]};
          }
        }
      }
    }
    __syncthreads();
    float* const inverse = inverses + team * kChunk * kInverseStride;
    const bool has_head = pair + team < group;
    invert(inverse, has_head, warp % 8, lane);
#pragma unroll 1
    for (int tile = warp % 8; has_head && tile < kTriangleTiles; tile += 8) {
      const int m = tile < 1 ? 0 : tile < 3 ? 1 : tile < 6 ? 2 : 3;
      const int t = tile - triangle_tile(m, 0);
      const float* const from = inverse + (m * 16 + lane / 4) * kInverseStride + t * 16 + lane % 4 * 2;
      const auto two = [&](int offset) {
        const auto x = *reinterpret_cast<const float2*>(from + offset);
        return pack_f16(x.x, x.y);
      };
      out.state[first_value_head + pair + team].inverse[tile][lane] = {
          two(0), two(8), two(8 * kInverseStride), two(8 * kInverseStride + 8)};
    }
    if (pair + 2 < group) __syncthreads();
  }
}

}  // namespace qwen::cuda
