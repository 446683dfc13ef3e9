// The routed experts of prefill with int8 activations: twice the rate of bfloat16's tensor cores, and weights
// that become operands by two masks.
//
// Activations are quantized once, each token's groups of 128 columns on their own. A weight's code goes to
// the tensor cores as 16 times itself, the high half of a byte. The integer sums of a weight's group are
// exact, and are added to float32 accumulators times both scales.
#include <algorithm>

#include "kernels/linear/gemm_output.cuh"
#include "kernels/linear/gemm_tile.cuh"
#include "kernels/moe/cuda.h"

namespace qwen::cuda {

namespace {

using gemm::kRowBytes;
using gemm::kScaleBytes;
using gemm::kWeightBytes;
using gemm::Output;
using gemm::Rows;

constexpr int kWarps = 8;
constexpr int kThreads = 32 * kWarps;
constexpr int kDepth = 128;  // columns a step: a group of activations, and a row of 128 bytes

// Quantized activations [rows]: codes i8 [pitch], the columns of each 32 in the order of Int8Rows::column,
// and scales [groups]. Columns past K are zero.
struct Int8Rows {
  int8_t* codes;
  float* scales;
  int k;

  __host__ __device__ int groups() const { return (k + kDepth - 1) / kDepth; }
  __host__ __device__ int pitch() const { return groups() * kDepth; }
  // Of 32 columns, the one at place `i`: what the halves of a tile's bytes have there. Lane q's four places
  // 4q.. of the first 16 go with the low halves of its word: columns 2q, 2q + 16, 2q + 1 and 2q + 17; those
  // of the second 16 with the high halves: 8 more.
  static __host__ __device__ int column(int i) {
    return i / 16 * 8 + i % 16 / 4 * 2 + i % 4 / 2 + i % 2 * 16;
  }
};

// A warp a group of 128 columns.
__global__ void __launch_bounds__(kThreads) quantize_rows(const bf16* x, Int8Rows out, int64_t count) {
  wait_for_previous_kernel();
  let_next_kernel_start();
  const int64_t at = static_cast<int64_t>(blockIdx.x) * kWarps + threadIdx.x / 32;
  if (at >= count) return;
  const int lane = threadIdx.x % 32;
  const int64_t row = at / out.groups();
  const int first = static_cast<int>(at % out.groups()) * kDepth + lane / 8 * 32;
  float values[4];
  float largest = 0;
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    const int column = first + Int8Rows::column(lane % 8 * 4 + i);
    values[i] = column < out.k ? __bfloat162float(x[row * out.k + column]) : 0;
    largest = fmaxf(largest, fabsf(values[i]));
  }
  largest = warp_max(largest);
  const float inverse = largest > 0 ? 127.0F / largest : 0;
  uint32_t word = 0;
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    const int code = max(-127, min(127, __float2int_rn(values[i] * inverse)));
    word |= (static_cast<uint32_t>(code) & 0xffU) << (8 * i);
  }
  reinterpret_cast<uint32_t*>(out.codes)[at * 32 + lane] = word;
  if (lane == 0) out.scales[at] = largest / 127.0F;
}

struct Arguments {
  Int8Rows x;
  Int4Experts w;
  bf16* y;
  const int32_t* order;
  const int32_t* offsets;
  int experts;
  int top_k;
  int feature_blocks;
};

template <int kTokens, Output kOutput>
struct Tile : gemm::Tile<kWarps, 1, kTokens, kOutput> {
  static constexpr int kTokenBytes = kTokens * kRowBytes;
  static constexpr int kTokenScaleBytes = kTokens * static_cast<int>(sizeof(float));
  static constexpr int kStageBytes = kTokenBytes + kWarps * 2 * (kWeightBytes + kScaleBytes);
  static constexpr int kStages = 4;
  static constexpr int kStaging = kWarps * gemm::Tile<kWarps, 1, kTokens, kOutput>::kStagingBytes;
  // And the scales of all the tokens' groups.
  static constexpr int shared_bytes(int groups) {
    return kStages * kStageBytes + kStaging + groups * kTokenScaleBytes;
  }
};

// A block makes 128 features by kTokens tokens; a warp has 16 features and all tokens.
template <int kTokens, Output kOutput, Rows kRows>
__global__ void __launch_bounds__(kThreads, 2) multiply_int8(Arguments g) {
  using T = Tile<kTokens, kOutput>;
  constexpr int kCopies = (kTokens + 31) / 32;
  QWEN_DYNAMIC_SHARED(tokens_shared);
  const int lane = threadIdx.x % 32;
  const int warp = threadIdx.x / 32;
  unsigned char* const weights_shared = tokens_shared + T::kStages * T::kTokenBytes + warp * 2 * kWeightBytes;
  unsigned char* const scales_shared =
      tokens_shared + T::kStages * (T::kTokenBytes + kWarps * 2 * kWeightBytes) + warp * 2 * kScaleBytes;
  unsigned char* const staging = tokens_shared + T::kStages * T::kStageBytes + warp * T::kStagingBytes;
  float* const token_scales =  // [groups][kTokens]
      reinterpret_cast<float*>(tokens_shared + T::kStages * T::kStageBytes + T::kStaging);
  __shared__ int sources[kTokens];  // rows of x
  __shared__ int targets[kTokens];  // and of y

  wait_for_previous_kernel();
  const Int4Matrix w = g.w;
  const gemm::TokenTile tile = gemm::find_tile<kTokens>(g.offsets, g.experts, blockIdx.x / g.feature_blocks);
  if (tile.count == 0) return;
  for (int t = threadIdx.x; t < kTokens; t += kThreads) {
    const int sorted = tile.begin + min(t, tile.count - 1);
    sources[t] = kRows == Rows::kGathered ? g.order[sorted] / g.top_k : sorted;
    targets[t] = kRows == Rows::kGathered ? sorted : g.order[sorted];
  }
  __syncthreads();

  const int column_tiles = w.column_tiles();
  const int row_tiles = w.row_tiles();
  const int steps = g.x.groups();
  const int row_tile = static_cast<int>(blockIdx.x % g.feature_blocks) * kWarps + warp;
  const size_t weight_row = static_cast<size_t>(tile.expert) * row_tiles + min(row_tile, row_tiles - 1);
  const uint4* const weights_from = w.tiles + weight_row * column_tiles * 32 + lane;
  const uint32_t* const scales_from = w.scales + weight_row * w.groups() * 8;
  const int per_step = kDepth / w.group;  // groups of weights: 1, 2 or 4
  const int8_t* tokens_from[kCopies];
#pragma unroll
  for (int i = 0; i < kCopies; ++i) {
    const int row = sources[min(static_cast<int>(threadIdx.x) / 8 + 32 * i, kTokens - 1)];
    tokens_from[i] = g.x.codes + static_cast<size_t>(row) * g.x.pitch() + threadIdx.x % 8 * 16;
  }
  const int token_row = threadIdx.x / 8;
  unsigned char* const tokens_to =
      tokens_shared + token_row * kRowBytes + (threadIdx.x % 8 ^ token_row % 8) * 16;
  const auto copy = [&](int step) {
    const int slot = step % T::kStages;
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const bool valid = 2 * step + half < column_tiles;
      copy_async_16(weights_shared + slot * kWarps * 2 * kWeightBytes + half * kWeightBytes + lane * 16,
                    valid ? weights_from + (2 * step + half) * 32 : weights_from, valid);
    }
    if (lane < 2 * per_step) {
      const int chunk = 2 * per_step * step + lane;  // of 16 bytes
      const bool valid = chunk < 2 * w.groups();
      copy_async_16(scales_shared + slot * kWarps * 2 * kScaleBytes + lane * 16,
                    valid ? scales_from + chunk * 4 : scales_from, valid);
    }
    if (kTokens < 32 && token_row >= kTokens) return;
#pragma unroll
    for (int i = 0; i < kCopies; ++i) {
      copy_async_16(tokens_to + slot * T::kTokenBytes + i * 32 * kRowBytes, tokens_from[i] + step * kDepth);
    }
  };
  for (int s = 0; s < T::kStages - 1; ++s) {
    if (s < steps) copy(s);
    copy_async_commit();
  }
  for (int i = threadIdx.x; i < steps * kTokens; i += kThreads) {
    token_scales[i] = g.x.scales[static_cast<size_t>(sources[i % kTokens]) * steps + i / kTokens] * 0.0625F;
  }
  let_next_kernel_start();

  float acc[1][kTokens / 8][4] = {};
  int32_t sums[kTokens / 8][4] = {};
  for (int s = 0; s < steps; ++s) {
    copy_async_wait<T::kStages - 2>();
    __syncthreads();
    if (s + T::kStages - 1 < steps) copy(s + T::kStages - 1);
    copy_async_commit();
    const int slot = s % T::kStages;
    const uint4* const weights =
        reinterpret_cast<const uint4*>(weights_shared + slot * kWarps * 2 * kWeightBytes) + lane;
    const uint32_t* const scales =
        reinterpret_cast<const uint32_t*>(scales_shared + slot * kWarps * 2 * kScaleBytes) + lane / 4;
    const unsigned char* const tokens = tokens_shared + slot * T::kTokenBytes;
#pragma unroll
    for (int quarter = 0; quarter < 4; ++quarter) {
      const uint4 words = weights[quarter / 2 * 32];
      const uint32_t first = quarter % 2 == 0 ? words.x : words.y;
      const uint32_t eighth = quarter % 2 == 0 ? words.z : words.w;
      constexpr uint32_t kHigh = 0xf0f0f0f0U;
      const uint32_t a[4] = {first << 4 & kHigh, eighth << 4 & kHigh, first & kHigh, eighth & kHigh};
      const int chunk = (2 * quarter + lane / 8 % 2) ^ (lane % 8);
#pragma unroll
      for (int j = 0; j < kTokens / 16; ++j) {
        uint32_t b[4];
        load_matrix_x4(b, tokens + (16 * j + lane % 8 + lane / 16 * 8) * kRowBytes + chunk * 16);
        const uint32_t even[2] = {b[0], b[1]};
        const uint32_t odd[2] = {b[2], b[3]};
        mma_s8(sums[2 * j], a, even);
        mma_s8(sums[2 * j + 1], a, odd);
      }
      if ((quarter + 1) * per_step % 4 != 0) continue;  // the group goes on
      const uint32_t pair = scales[quarter * per_step / 4 * 8];
      const float low = low_bf16(pair);
      const float high = high_bf16(pair);
#pragma unroll
      for (int j = 0; j < kTokens / 8; ++j) {
        const float2 scale =
            *reinterpret_cast<const float2*>(token_scales + s * kTokens + 8 * j + lane % 4 * 2);
        acc[0][j][0] += static_cast<float>(sums[j][0]) * (low * scale.x);
        acc[0][j][1] += static_cast<float>(sums[j][1]) * (low * scale.y);
        acc[0][j][2] += static_cast<float>(sums[j][2]) * (high * scale.x);
        acc[0][j][3] += static_cast<float>(sums[j][3]) * (high * scale.y);
#pragma unroll
        for (int e = 0; e < 4; ++e) sums[j][e] = 0;
      }
    }
  }
  const int feature = row_tile * T::kFeatures;
  const int features = kOutput == Output::kSwiglu ? w.n / 2 : w.n;
  gemm::write_tile<T, 1, kTokens, kOutput, false>(acc, staging, nullptr, g.y, feature, features, tile.count,
                                                  [&](int token) { return targets[token]; });
}

size_t aligned(size_t bytes) { return (bytes + 15) / 16 * 16; }

Int8Rows int8_rows(void* scratch, int64_t rows, int k) {
  Int8Rows result = {static_cast<int8_t*>(scratch), nullptr, k};
  result.scales = reinterpret_cast<float*>(result.codes + rows * result.pitch());
  return result;
}

size_t int8_rows_bytes(int64_t rows, int k) {
  const Int8Rows layout = {nullptr, nullptr, k};
  const size_t row =
      static_cast<size_t>(layout.pitch()) + static_cast<size_t>(layout.groups()) * sizeof(float);
  return aligned(static_cast<size_t>(rows) * row);
}

template <int kTokens, Output kOutput, Rows kRows>
cudaError_t multiply_experts(Arguments arguments, int64_t choices, cudaStream_t stream) {
  arguments.feature_blocks = (arguments.w.row_tiles() + kWarps - 1) / kWarps;
  const int64_t tiles = choices / kTokens + std::min<int64_t>(arguments.experts, choices);
  const dim3 grid(static_cast<unsigned>(arguments.feature_blocks * tiles));
  const auto shared_bytes = static_cast<size_t>(Tile<kTokens, kOutput>::shared_bytes(arguments.x.groups()));
  return launch(multiply_int8<kTokens, kOutput, kRows>, {grid, dim3(kThreads), shared_bytes}, stream,
                arguments);
}

template <Output kOutput, Rows kRows>
cudaError_t experts(const bf16* x, int64_t rows, const int32_t* order, const int32_t* offsets, Int4Experts w,
                    bf16* y, void* scratch, const MoeShape& shape, int64_t tokens, cudaStream_t stream) {
  const int64_t choices = tokens * shape.top_k;
  if (choices == 0) return cudaSuccess;
  if (!w.is_valid() || shape.experts < 1 || choices >= int64_t{1} << 31) return cudaErrorInvalidValue;
  const Int8Rows quantized = int8_rows(scratch, rows, w.k);
  const int64_t groups = rows * quantized.groups();
  const dim3 grid(static_cast<unsigned>((groups + kWarps - 1) / kWarps));
  QWEN_RETURN_IF_CUDA_ERROR(launch(quantize_rows, {grid, dim3(kThreads)}, stream, x, quantized, groups));
  const Arguments arguments = {quantized, w, y, order, offsets, shape.experts, shape.top_k, 0};
  if (choices / shape.experts > 10) return multiply_experts<64, kOutput, kRows>(arguments, choices, stream);
  return multiply_experts<16, kOutput, kRows>(arguments, choices, stream);
}

}  // namespace

cudaError_t moe_gate_up_prefill_8bit(ExpertActivations kind, const bf16* x, const int32_t* order,
                                     const int32_t* offsets, Int4Experts gate_up, bf16* act, void* scratch,
                                     MoeShape shape, int64_t tokens, cudaStream_t stream) {
  if (kind != ExpertActivations::kInt8) return cudaErrorNotSupported;
  return experts<Output::kSwiglu, Rows::kGathered>(x, tokens, order, offsets, gate_up, act, scratch, shape,
                                                   tokens, stream);
}

cudaError_t moe_down_prefill_8bit(ExpertActivations kind, const bf16* act, const int32_t* order,
                                  const int32_t* offsets, Int4Experts down, bf16* choices, void* scratch,
                                  MoeShape shape, int64_t tokens, cudaStream_t stream) {
  if (kind != ExpertActivations::kInt8) return cudaErrorNotSupported;
  return experts<Output::kPlain, Rows::kScattered>(act, tokens * shape.top_k, order, offsets, down, choices,
                                                   scratch, shape, tokens, stream);
}

size_t moe_8bit_scratch(MoeShape shape, int64_t tokens) {
  return std::max(int8_rows_bytes(tokens, shape.hidden),
                  int8_rows_bytes(tokens * shape.top_k, shape.intermediate));
}

}  // namespace qwen::cuda
