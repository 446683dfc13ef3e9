// Prefill, first: all of a chunk that does not depend on the state. See prefill_scan.cuh for the algorithm.
#pragma once

#include "kernels/gated_delta/prefill_convolution.cuh"
#include "kernels/gated_delta/prefill_tiles.cuh"

namespace qwen::cuda {

inline constexpr int kPrepareThreads = 256;
// Row strides in floats of the matrix to invert and of a product on the way: a column of four rows by eight,
// and a row of eight by four, are then in different banks (the product's as the right factor, the matrix's as
// the left).
inline constexpr int kInverseStride = 68;
inline constexpr int kProductStride = 40;
// A token that decays the state further wipes it out in float32; a bound keeps differences of sums exact
// enough.
inline constexpr float kLeastLogDecay = -88.0F;

// Shared memory of prepare_chunks: q and k; then, in their place, q k^T, later the matrix to invert, k k^T
// and a product; and the gates of the group.
template <int kKeyDim>
__host__ __device__ constexpr int prepare_matrices_bytes() {
  constexpr int kKeys = 2 * kChunk * kKeyDim * static_cast<int>(sizeof(bf16));
  constexpr int kInverse =
      (2 * kChunk * kInverseStride + kChunk / 2 * kProductStride) * static_cast<int>(sizeof(float));
  return kKeys > kInverse ? kKeys : kInverse;
}
template <int kKeyDim>
__host__ __device__ int prepare_shared_bytes(const DeltaShape& shape) {
  return prepare_matrices_bytes<kKeyDim>() +
         shape.value_heads / shape.key_heads * 2 * kChunk * static_cast<int>(sizeof(float));
}

// Decay (summed logarithm) and beta of 64 tokens of a value head, by a warp; lane l computes tokens 2 l and 2
// l + 1.
__device__ __forceinline__ void prepare_gates(const float* gates, float a_log, float dt_bias, int head,
                                              int value_heads, int64_t first, int64_t tokens, int lane,
                                              float* decay, float* beta) {
  float logs[2] = {};
  float betas[2] = {};
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    const int64_t row = first + 2 * lane + i;
    if (row < tokens) {
      logs[i] = fmaxf(log_decay(gates[row * 2 * value_heads + head], a_log, dt_bias), kLeastLogDecay);
      betas[i] = fast_sigmoid(gates[row * 2 * value_heads + value_heads + head]);
    }
  }
  const float pair = logs[0] + logs[1];
  float sum = pair;
#pragma unroll
  for (int offset = 1; offset < 32; offset *= 2) {
    const float before = __shfl_up_sync(~0U, sum, offset);
    if (lane >= offset) sum += before;
  }
  decay[2 * lane] = sum - logs[1];
  decay[2 * lane + 1] = sum;
  beta[2 * lane] = betas[0];
  beta[2 * lane + 1] = betas[1];
}

// c [16, 8] of float32 a [16, k_begin..k_end] b [k_begin..k_end, 8] by a warp. Factors are rounded to tf32:
// the inverse is stored less exactly.
template <int kStrideB>
__device__ __forceinline__ void multiply_tile(float (&c)[4], const float* a, const float* b, int k_begin,
                                              int k_end, int lane) {
  const auto tf32 = [](float x) { return __float_as_uint(x) + 0x1000U; };
  const int r = lane / 4;
  const int q = lane % 4;
#pragma unroll 2
  for (int k = k_begin; k < k_end; k += 8) {
    const float* left = a + r * kInverseStride + k + q;
    const float* right = b + (k + q) * kStrideB + r;
    const uint32_t left_operand[4] = {tf32(left[0]), tf32(left[8 * kInverseStride]), tf32(left[4]),
                                      tf32(left[8 * kInverseStride + 4])};
    const uint32_t right_operand[2] = {tf32(right[0]), tf32(right[4 * kStrideB])};
    mma_tf32(c, left_operand, right_operand);
  }
}

// Replaces the 64 by 64 matrix A, of which only what is strictly below the diagonal counts, by the inverse of
// I + A on and below the diagonal's tiles of 16 by 16. Those are inverted by substitution; then, twice, pairs
// of neighbours
// [[X, 0], [A, Y]] are joined: the corner becomes -Y A X. Ends with a barrier.
__device__ __forceinline__ void invert(float* m, float* product, int warp, int lane) {
  if (warp < 2) {
    const int tile = (warp * 32 + lane) / 16 * 16;
    const int column = lane % 16;
    const float* rows = m + tile * kInverseStride + tile;
    float x[16];
#pragma unroll
    for (int i = 0; i < 16; ++i) {
      float sum = 0;
#pragma unroll
      for (int k = 0; k < i; k += 4) {
        const float4 a = *reinterpret_cast<const float4*>(rows + i * kInverseStride + k);
        sum += a.x * x[k];
        if (k + 1 < i) sum += a.y * x[k + 1];
        if (k + 2 < i) sum += a.z * x[k + 2];
        if (k + 3 < i) sum += a.w * x[k + 3];
      }
      x[i] = (i == column ? 1.0F : 0.0F) - sum;
    }
    __syncwarp();
#pragma unroll
    for (int i = 0; i < 16; ++i) m[(tile + i) * kInverseStride + tile + column] = x[i];
  }
  __syncthreads();
  const int r = lane / 4;
  const int q = lane % 4;
#pragma unroll
  for (int size = 16; size < kChunk; size *= 2) {
    // Tiles of 16 by 8 of all corners of this size, one a warp.
    const int columns = size / 8;
    const int tiles = kChunk / (2 * size) * (size / 16) * columns;
    const int corner = warp / (size / 16 * columns) * 2 * size;
    const int row = warp / columns % (size / 16) * 16;
    const int column = warp % columns * 8;
    const float* above = m + corner * kInverseStride + corner;
    float* own = m + (corner + size) * kInverseStride + corner;
    const float* beside = own + size;
    float* own_product = product + (corner / 2 + row) * kProductStride + column;
    if (warp < tiles) {
      // X and Y are zero above the diagonal: from tile (column / 16, column / 16), to tile (row / 16, row /
      // 16).
      float c[4] = {};
      multiply_tile<kInverseStride>(c, own + row * kInverseStride, above + column, column / 16 * 16, size,
                                    lane);
      own_product[r * kProductStride + 2 * q] = c[0];
      own_product[r * kProductStride + 2 * q + 1] = c[1];
      own_product[(r + 8) * kProductStride + 2 * q] = c[2];
      own_product[(r + 8) * kProductStride + 2 * q + 1] = c[3];
    }
    __syncthreads();
    if (warp < tiles) {
      float c[4] = {};
      multiply_tile<kProductStride>(c, beside + row * kInverseStride,
                                    product + corner / 2 * kProductStride + column, 0, row + 16, lane);
      float* to = own + row * kInverseStride + column;
      to[r * kInverseStride + 2 * q] = -c[0];
      to[r * kInverseStride + 2 * q + 1] = -c[1];
      to[(r + 8) * kInverseStride + 2 * q] = -c[2];
      to[(r + 8) * kInverseStride + 2 * q + 1] = -c[3];
    }
    __syncthreads();
  }
}

// Block (key head, chunk, z), for the value heads of the key head; of short prompts, whose blocks are few,
// one for each value head, and the first leaves q and k. Dv a multiple of 32.
template <int kKeyDim>
__global__ __launch_bounds__(kPrepareThreads, 4) void prepare_chunks(Convolution in, const float* gates,
                                                                     const bf16* a_log, const bf16* dt_bias,
                                                                     PrefillChunks out, DeltaShape shape) {
  constexpr int kStrip = 4;  // rows a thread convolves
  constexpr int kStrips = kChunk / kStrip;
  constexpr int kLanes = kKeyDim / 4;  // that share a row of q or k
  QWEN_DYNAMIC_SHARED(shared);
  auto* const keys = reinterpret_cast<bf16*>(shared);  // k, then q
  auto* const inverse = reinterpret_cast<float*>(shared);
  float* const gram = inverse + kChunk * kInverseStride;
  float* const product = gram + kChunk * kInverseStride;
  const int group = shape.value_heads / shape.key_heads;
  // Of the group, the block's heads: all, or the one of its z.
  const auto first_head = [] { return static_cast<int>(blockIdx.z); };
  const auto end_head = [&] { return gridDim.z == 1 ? group : static_cast<int>(blockIdx.z) + 1; };
  auto* const decays = reinterpret_cast<float*>(shared + prepare_matrices_bytes<kKeyDim>());
  float* const betas = decays + group * kChunk;

  const int key_head = static_cast<int>(blockIdx.x);
  const int64_t chunk = blockIdx.y;
  const int64_t first = chunk * kChunk;
  const int thread = static_cast<int>(threadIdx.x);
  const int warp = thread / 32;
  const int lane = thread % 32;
  wait_for_previous_kernel();

#pragma unroll 1
  for (int h = first_head() + warp; h < end_head(); h += kPrepareThreads / 32) {
    const int head = key_head * group + h;
    float* const decay = decays + h * kChunk;
    float* const beta = betas + h * kChunk;
    prepare_gates(gates, __bfloat162float(a_log[head]), __bfloat162float(dt_bias[head]), head,
                  shape.value_heads, first, in.tokens, lane, decay, beta);
    const int64_t to = (chunk * shape.value_heads + head) * kChunk;
    *reinterpret_cast<float2*>(out.decay + to + 2 * lane) =
        *reinterpret_cast<const float2*>(decay + 2 * lane);
    *reinterpret_cast<float2*>(out.beta + to + 2 * lane) = *reinterpret_cast<const float2*>(beta + 2 * lane);
  }

  const int64_t key_chunk = (chunk * shape.key_heads + key_head) * kChunk * kKeyDim;
#pragma unroll 1
  for (int item = thread; item < 2 * kStrips * kLanes; item += kPrepareThreads) {
    const bool is_q = item >= kStrips * kLanes;
    const int strip = item / kLanes % kStrips * kStrip;
    const int column = item % kLanes * 4;
    const int channel = (is_q ? 0 : shape.key_heads * kKeyDim) + key_head * kKeyDim + column;
    bf16* const to_shared = keys + (is_q ? kChunk * kKeyDim : 0);
    bf16* const to = (is_q ? out.q : out.k) + key_chunk;
    const float scale = is_q ? rsqrtf(static_cast<float>(kKeyDim)) : 1.0F;
    convolve<kStrip>(in, shape, channel, first + strip, [&](int i, const float4& x) {
      const float squares = warp_sum(x.x * x.x + x.y * x.y + x.z * x.z + x.w * x.w, kLanes);
      const float norm = rsqrtf(squares + kL2Epsilon) * scale;
      const uint32_t first_pair = pack_bf16(x.x * norm, x.y * norm);
      const uint32_t second_pair = pack_bf16(x.z * norm, x.w * norm);
      const int row = strip + i;
      store4(to_shared + swizzled<kKeyDim>(row, column), first_pair, second_pair);
      if (blockIdx.z == 0) store4(to + row * kKeyDim + column, first_pair, second_pair);
    });
  }
  const int value_lanes = shape.value_dim / 4;
#pragma unroll 1
  for (int item = thread; item < (end_head() - first_head()) * kStrips * value_lanes;
       item += kPrepareThreads) {
    const int head = key_head * group + first_head() + item / (kStrips * value_lanes);
    const int strip = item / value_lanes % kStrips * kStrip;
    const int column = item % value_lanes * 4;
    const int channel = 2 * shape.key_heads * kKeyDim + head * shape.value_dim + column;
    bf16* const to = out.v + ((chunk * shape.value_heads + head) * kChunk + strip) * shape.value_dim + column;
    convolve<kStrip>(in, shape, channel, first + strip, [&](int i, const float4& x) {
      store4(to + i * shape.value_dim, pack_bf16(x.x, x.y), pack_bf16(x.z, x.w));
    });
  }
  __syncthreads();

  // k k^T by the first four warps, q k^T by the others, 16 rows each, as far as the diagonal. Lane 4 r + q
  // holds rows r and r + 8, and of each 16 tokens 4 q to 4 q + 3.
  const bool is_q = warp >= 4;
  const int row_tile = warp % 4;
  float products[kChunk / 16][2][4] = {};
#pragma unroll
  for (int k = 0; k < kKeyDim; k += 16) {
    uint32_t a[4];
    load_a<kKeyDim>(a, keys + (is_q ? kChunk * kKeyDim : 0), row_tile * 16, k, lane);
#pragma unroll
    for (int t = 0; t < kChunk / 16; ++t) {
      if (t > row_tile) continue;
      uint32_t b[2][2];
      load_b_of_rows<kKeyDim>(b, keys, t * 16, k, lane);
      mma_bf16(products[t][0], a, b[0]);
      mma_bf16(products[t][1], a, b[1]);
    }
  }
  __syncthreads();
  let_next_kernel_start();

#pragma unroll
  for (int t = 0; t < kChunk / 16; ++t) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      if (t > row_tile) continue;
      const int row = row_tile * 16 + lane / 4 + half * 8;
      *reinterpret_cast<float4*>((is_q ? inverse : gram) + row * kInverseStride + t * 16 + lane % 4 * 4) = {
          products[t][0][2 * half], products[t][0][2 * half + 1], products[t][1][2 * half],
          products[t][1][2 * half + 1]};
    }
  }
  __syncthreads();

  // Four columns a thread, of rows row, row + 16, ...
  const int first_row = thread / (kChunk / 4);
  const int column = thread % (kChunk / 4) * 4;
  const auto decayed = [&](const float* matrix, const float* decay, int row) {
    const float4 x = *reinterpret_cast<const float4*>(matrix + row * kInverseStride + column);
    const float4 others = *reinterpret_cast<const float4*>(decay + column);
    const float own = decay[row];
    // Past tokens only: towards later ones the difference is positive and may overflow.
    return float4{column <= row ? x.x * fast_exp(own - others.x) : 0.0F,
                  column + 1 <= row ? x.y * fast_exp(own - others.y) : 0.0F,
                  column + 2 <= row ? x.z * fast_exp(own - others.z) : 0.0F,
                  column + 3 <= row ? x.w * fast_exp(own - others.w) : 0.0F};
  };
#pragma unroll 1
  for (int h = first_head(); h < end_head(); ++h) {
    bf16* const to =
        out.mixing + (chunk * shape.value_heads + key_head * group + h) * 2 * kChunk * kChunk + column;
#pragma unroll
    for (int row = first_row; row < kChunk; row += kPrepareThreads / (kChunk / 4)) {
      if (column / 16 > row / 16) continue;
      const float4 x = decayed(inverse, decays + h * kChunk, row);
      uint2 high;
      uint2 low;
      split_bf16(x.x, x.y, high.x, low.x);
      split_bf16(x.z, x.w, high.y, low.y);
      store4(to + row * kChunk, high.x, high.y);
      store4(to + (kChunk + row) * kChunk, low.x, low.y);
    }
  }
  __syncthreads();

#pragma unroll 1
  for (int h = first_head(); h < end_head(); ++h) {
    const float* const beta = betas + h * kChunk;
#pragma unroll
    for (int row = first_row; row < kChunk; row += kPrepareThreads / (kChunk / 4)) {
      if (column > row) continue;
      const float4 x = decayed(gram, decays + h * kChunk, row);
      *reinterpret_cast<float4*>(inverse + row * kInverseStride + column) = {
          beta[row] * x.x, beta[row] * x.y, beta[row] * x.z, beta[row] * x.w};
    }
    __syncthreads();
    invert(inverse, product, warp, lane);
    bf16* const to = out.inverse + (chunk * shape.value_heads + key_head * group + h) * 2 * kChunk * kChunk;
    for (int piece = thread; piece < kChunk * kChunk / 8; piece += kPrepareThreads) {
      const int row = piece / (kChunk / 8);
      const int eighth = piece % (kChunk / 8);
      if (eighth / 2 > row / 16) continue;
      const float* from = inverse + row * kInverseStride + eighth * 8;
      uint4 high;
      uint4 low;
      split_bf16(from[0], from[1], high.x, low.x);
      split_bf16(from[2], from[3], high.y, low.y);
      split_bf16(from[4], from[5], high.z, low.z);
      split_bf16(from[6], from[7], high.w, low.w);
      *reinterpret_cast<uint4*>(to + row * kChunk + eighth * 8) = high;
      *reinterpret_cast<uint4*>(to + (kChunk + row) * kChunk + eighth * 8) = low;
    }
    __syncthreads();
  }
}

}  // namespace qwen::cuda
