// Prefill's products with small bfloat16 matrices: the router and the shared expert's gate, the gates of the
// delta rule.
#include "kernels/linear/cuda.h"
#include "kernels/linear/float_few.cuh"
#include "kernels/linear/float_wide.cuh"

namespace qwen::cuda {

namespace {

using small::Arguments;

template <typename T>
int64_t tiles(const Arguments& g) {
  const int64_t of_tokens = (int64_t{g.tokens} + T::kTokens - 1) / T::kTokens;
  return of_tokens * ((g.rows() + T::kFeatures - 1) / T::kFeatures);
}

template <int kWarps, int kM, int kN, int kAhead>
struct Few {
  using T = small::FewTile<kWarps, kM, kN, kAhead>;

  static int64_t blocks(const Arguments& g) { return tiles<T>(g); }
  static cudaError_t launch(const Arguments& g, cudaStream_t stream) {
    return cuda::launch(small::multiply_float_few<kWarps, kM, kN, kAhead>,
                        {dim3(static_cast<unsigned>(blocks(g))), dim3(T::kThreads), T::kSharedBytes}, stream,
                        g);
  }
};

template <int kGroups, int kN, int kStages, int kSplit = 1>
struct Wide {
  using T = small::WideTile<kGroups, kN, kStages, kSplit>;

  static bool fits() { return T::kSharedBytes <= max_shared_bytes() && kSplit <= max_cluster_blocks(); }
  static int64_t blocks(const Arguments& g) { return tiles<T>(g) * kSplit; }
  static cudaError_t launch(const Arguments& g, cudaStream_t stream) {
    return cuda::launch(
        small::multiply_float_wide<kGroups, kN, kStages, kSplit>,
        {dim3(static_cast<unsigned>(blocks(g))), dim3(T::kThreads), T::kSharedBytes, unsigned{kSplit}},
        stream, g);
  }
};

// The smallest tile of which the multiprocessors have all blocks at once, else the largest.
cudaError_t float_linear(const Arguments& g, int64_t tokens, cudaStream_t stream) {
  if (tokens == 0) return cudaSuccess;
  if (tokens < 0 || tokens >= int64_t{1} << 31 || g.k < 1 || g.k % 8 != 0 || g.n < 1) {
    return cudaErrorInvalidValue;
  }
  const int64_t most = multiprocessors();
  using Few8 = Few<16, 1, 1, 4>;   // 16 tokens by 8 features
  using Few16 = Few<16, 1, 2, 4>;  // 16 by 16
  using Tall = Few<16, 2, 1, 4>;   // 32 by 8
  using Pair = Few<8, 1, 2, 4>;    // 16 by 16, two blocks a multiprocessor
  using Split = Wide<1, 9, 9, 2>;  // 64 by 72, of which each of two blocks has half of the columns
  using Narrow = Wide<1, 9, 10>;   // 64 by 72
  using Middle = Wide<1, 17, 8>;   // 64 by 136
  using Large = Wide<2, 17, 6>;    // 128 by 136
  using Shallow = Wide<1, 9, 5>;   // 64 by 72, for GPUs with less shared memory
  if (Few8::blocks(g) <= most) return Few8::launch(g, stream);
  if (Few16::blocks(g) <= most) return Few16::launch(g, stream);
  if (Tall::blocks(g) <= most) return Tall::launch(g, stream);
  if (Pair::blocks(g) <= 2 * most) return Pair::launch(g, stream);
  if (!Large::fits()) return Shallow::launch(g, stream);
  if (Split::fits() && Split::blocks(g) <= most) return Split::launch(g, stream);
  if (Narrow::blocks(g) <= most) return Narrow::launch(g, stream);
  if (Middle::blocks(g) <= most) return Middle::launch(g, stream);
  return Large::launch(g, stream);
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
