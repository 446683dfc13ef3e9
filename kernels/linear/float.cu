// Prefill's products with small bfloat16 matrices: the router and the shared expert's gate, the gates of the
// delta rule.
//
// Few features make few tiles, so the warps of a block share out the columns of one tile, and add up at the
// end. Short prompts have narrow tiles, for more blocks and shorter ones; long prompts wide ones, since what
// binds there is what L2 delivers.
#include "kernels/cuda/primitives.cuh"
#include "kernels/linear/cuda.h"

namespace qwen::cuda {

namespace {

constexpr int kWarps = 8;
constexpr int kThreads = 32 * kWarps;

struct Arguments {
  const bf16* x;       // [T, K]
  const bf16* w;       // [N, K]
  const bf16* last_w;  // [K], row N, or null
  float* y;            // [T, N]
  float* last_y;       // [T], of row N
  int tokens;
  int k;
  int n;
};

// A block makes kTokens by kFeatures. kTokenWarps warps have kM tiles of 16 tokens each and all kN tiles of 8
// features; as often as there are warps for it, of other columns.
template <int kTokenWarps, int kM, int kN, int kStages>
struct FloatTile {
  static constexpr int kColumnWarps = kWarps / kTokenWarps;
  static constexpr int kTokens = 16 * kM * kTokenWarps;
  static constexpr int kFeatures = 8 * kN;
  static constexpr int kDepth = 16 * kColumnWarps;  // columns a step
  static constexpr int kRowBytes = 2 * kDepth;
  static constexpr int kStageBytes = (kTokens + kFeatures) * kRowBytes;
  static constexpr int kWarpSums = kM * kN;  // float4 a lane
  static constexpr int kSumBytes = kWarps / 2 * kWarpSums * 32 * 16;
  static constexpr int kSharedBytes = kStages * kStageBytes > kSumBytes ? kStages * kStageBytes : kSumBytes;
};

template <int kTokenWarps, int kM, int kN, int kStages>
__global__ void __launch_bounds__(kThreads) multiply_float(Arguments g) {
  using T = FloatTile<kTokenWarps, kM, kN, kStages>;
  static_assert(kN % 2 == 0);
  constexpr int kChunks = T::kDepth / 8;  // of 16 bytes, a row's a step
  constexpr int kRowsAtOnce = kThreads / kChunks;
  QWEN_DYNAMIC_SHARED(shared);
  const int token_tiles = (g.tokens - 1) / T::kTokens + 1;  // next to each other: they share weights
  const int first_token = static_cast<int>(blockIdx.x % token_tiles) * T::kTokens;
  const int first_feature = static_cast<int>(blockIdx.x / token_tiles) * T::kFeatures;
  const int lane = threadIdx.x % 32;
  const int warp = threadIdx.x / 32;
  const int token_warp = warp % kTokenWarps;
  const int column_warp = warp / kTokenWarps;
  const int steps = (g.k + T::kDepth - 1) / T::kDepth;

  // A stage is rows of kDepth columns, weights then tokens, whose 16-byte chunk i lies at i ^ (row % 8).
  const int chunk = threadIdx.x % kChunks;
  const int own_row = threadIdx.x / kChunks;
  const auto stage = [&](int step) { return shared + step % kStages * T::kStageBytes; };
  const auto copy_row = [&](unsigned char* rows, int row, const bf16* from, int step) {
    const int column = step * T::kDepth + chunk * 8;
    const bool valid = from != nullptr && column < g.k;
    copy_async_16(rows + row * T::kRowBytes + (chunk ^ (row % 8)) * 16, valid ? from + column : g.x, valid);
  };
  const auto copy_weights = [&](int step) {
#pragma unroll
    for (int row = own_row; row < T::kFeatures; row += kRowsAtOnce) {
      const int feature = first_feature + row;
      const bf16* from = feature < g.n ? g.w + static_cast<size_t>(feature) * g.k : nullptr;
      copy_row(stage(step), row, feature == g.n ? g.last_w : from, step);
    }
  };
  const auto copy_tokens = [&](int step) {
#pragma unroll
    for (int row = own_row; row < T::kTokens; row += kRowsAtOnce) {
      const int token = first_token + row;
      const bf16* from = token < g.tokens ? g.x + static_cast<size_t>(token) * g.k : nullptr;
      copy_row(stage(step) + T::kFeatures * T::kRowBytes, row, from, step);
    }
  };
  for (int s = 0; s < min(kStages - 1, steps); ++s) copy_weights(s);
  wait_for_previous_kernel();
  for (int s = 0; s < kStages - 1; ++s) {
    if (s < steps) copy_tokens(s);
    copy_async_commit();
  }
  let_next_kernel_start();

  float acc[kM][kN][4] = {};
#pragma unroll 1
  for (int s = 0; s < steps; ++s) {
    copy_async_wait<kStages - 2>();
    __syncthreads();
    if (s + kStages - 1 < steps) {
      copy_weights(s + kStages - 1);
      copy_tokens(s + kStages - 1);
    }
    copy_async_commit();
    const unsigned char* const weights = stage(s);
    const unsigned char* const tokens = stage(s) + (T::kFeatures + token_warp * 16 * kM) * T::kRowBytes;
    uint32_t a[kM][4];
#pragma unroll
    for (int i = 0; i < kM; ++i) {
      const int at = (2 * column_warp + lane / 16) ^ (lane % 8);
      load_matrix_x4(a[i], tokens + (16 * i + lane % 16) * T::kRowBytes + at * 16);
    }
#pragma unroll
    for (int j = 0; j < kN / 2; ++j) {
      uint32_t b[4];
      const int at = (2 * column_warp + lane / 8 % 2) ^ (lane % 8);
      load_matrix_x4(b, weights + (16 * j + lane % 8 + lane / 16 * 8) * T::kRowBytes + at * 16);
      const uint32_t first[2] = {b[0], b[1]};
      const uint32_t second[2] = {b[2], b[3]};
#pragma unroll
      for (int i = 0; i < kM; ++i) {
        mma_bf16(acc[i][2 * j], a[i], first);
        mma_bf16(acc[i][2 * j + 1], a[i], second);
      }
    }
  }

  // The upper half of the warps hands its sums to the lower, until those of one share of the columns are
  // left.
#pragma unroll
  for (int half = T::kColumnWarps / 2; half > 0; half /= 2) {
    __syncthreads();  // the stages, or the sums before, are read
    float4* const sums =
        reinterpret_cast<float4*>(shared) + (warp % (half * kTokenWarps)) * T::kWarpSums * 32 + lane;
    if (column_warp >= half && column_warp < 2 * half) {
#pragma unroll
      for (int i = 0; i < T::kWarpSums; ++i) {
        const float (&c)[4] = acc[i / kN][i % kN];
        sums[i * 32] = {c[0], c[1], c[2], c[3]};
      }
    }
    __syncthreads();
    if (column_warp < half) {
#pragma unroll
      for (int i = 0; i < T::kWarpSums; ++i) {
        const float4 other = sums[i * 32];
        float (&c)[4] = acc[i / kN][i % kN];
        c[0] += other.x, c[1] += other.y, c[2] += other.z, c[3] += other.w;
      }
    }
  }
  if (column_warp != 0) return;
#pragma unroll
  for (int i = 0; i < kM; ++i) {
#pragma unroll
    for (int j = 0; j < kN; ++j) {
#pragma unroll
      for (int e = 0; e < 4; ++e) {
        const int token = first_token + (token_warp * kM + i) * 16 + lane / 4 + e / 2 * 8;
        const int feature = first_feature + 8 * j + lane % 4 * 2 + e % 2;
        if (token >= g.tokens || feature > g.n) continue;
        const float value = round_bf16(acc[i][j][e]);
        if (feature < g.n) {
          g.y[static_cast<size_t>(token) * g.n + feature] = value;
        } else if (g.last_w != nullptr) {
          g.last_y[token] = value;
        }
      }
    }
  }
}

template <int kTokenWarps, int kM, int kN, int kStages>
struct Launcher {
  using T = FloatTile<kTokenWarps, kM, kN, kStages>;

  static int64_t blocks(const Arguments& g) {
    const int rows = g.n + (g.last_w != nullptr ? 1 : 0);
    return (int64_t{g.tokens} + T::kTokens - 1) / T::kTokens * ((rows + T::kFeatures - 1) / T::kFeatures);
  }
  static cudaError_t launch(const Arguments& g, cudaStream_t stream) {
    return cuda::launch(multiply_float<kTokenWarps, kM, kN, kStages>,
                        {dim3(static_cast<unsigned>(blocks(g))), dim3(kThreads), T::kSharedBytes}, stream, g);
  }
};

cudaError_t float_linear(const Arguments& g, int64_t tokens, cudaStream_t stream) {
  if (tokens == 0) return cudaSuccess;
  if (tokens < 0 || tokens >= int64_t{1} << 31 || g.k < 1 || g.k % 8 != 0 || g.n < 1) {
    return cudaErrorInvalidValue;
  }
  using Narrow = Launcher<1, 1, 2, 12>;  // 16 tokens by 16 features
  using Middle = Launcher<1, 1, 8, 4>;   // 16 by 64
  using Wide = Launcher<2, 2, 12, 4>;    // 64 by 96
  if (tokens <= 192) return Narrow::launch(g, stream);
  return Wide::blocks(g) < 40 ? Middle::launch(g, stream) : Wide::launch(g, stream);
}

}  // namespace

cudaError_t float_linear_prefill(const bf16* x, const bf16* w, float* y, int64_t tokens, int k, int n,
                                 cudaStream_t stream) {
  return float_linear({x, w, nullptr, y, nullptr, static_cast<int>(tokens), k, n}, tokens, stream);
}

cudaError_t router_logits_prefill(const bf16* x, const bf16* router, const bf16* shared_gate, float* logits,
                                  float* shared_logit, int64_t tokens, int k, int experts,
                                  cudaStream_t stream) {
  if (shared_gate == nullptr) return cudaErrorInvalidValue;
  return float_linear({x, router, shared_gate, logits, shared_logit, static_cast<int>(tokens), k, experts},
                      tokens, stream);
}

}  // namespace qwen::cuda
