// The router of a decode step: norm, logits, and, in the block that finishes last, the best experts.
#include "kernels/cuda/last_block.cuh"
#include "kernels/linear/decode_kernel.cuh"
#include "kernels/moe/choice.cuh"

namespace qwen::cuda {
namespace {

constexpr int kGroup = 32;  // nothing here has groups; the activations' layout wants one

struct Router {
  NormedInput input;
  const bf16* router;       // [E, D]
  const bf16* shared_gate;  // [1, D]
  bf16* normed;             // [B, D]
  int32_t* ids;             // [B, A]
  float* weights;           // [B, A + 1]
  float* logits;            // [B, E + 1], rounded to bfloat16; the last is the shared expert's gate
  uint32_t* counters;
  MoeShape shape;
  int rows;
};

// One row by one warp.
template <int kPerLane>
__device__ void choose(const Router& p, int row) {
  const int lane = static_cast<int>(threadIdx.x) % 32;
  const int experts = p.shape.experts;
  const int top_k = p.shape.top_k;
  const float* logits = p.logits + row * (experts + 1);
  // All on their way before the first is looked at: one after the other they cost 1.2 us.
  float values[kPerLane];
#pragma unroll
  for (int i = 0; i < kPerLane; ++i) values[i] = __ldcg(logits + min(i * 32 + lane, experts));
  const float gate = __ldcg(logits + experts);
  uint32_t keys[kPerLane];
#pragma unroll
  for (int i = 0; i < kPerLane; ++i) {
    const int expert = i * 32 + lane;
    keys[i] = expert < experts ? choice_key(values[i], expert) : 0;
  }
  const uint32_t own = choose_experts(keys, top_k);
  // Of a softmax over all experts, normalized over the chosen, the sum over all cancels.
  const float logit = logit_of(own);
  const float most = __shfl_sync(~0U, logit, 0);
  const float share = lane < top_k ? expf(logit - most) : 0.0F;
  const float total = warp_sum(share);
  float* weights = p.weights + row * (top_k + 1);
  if (lane < top_k) {
    p.ids[row * top_k + lane] = expert_of(own);
    weights[lane] = round_bf16(share / total);
  }
  if (lane == 0) weights[top_k] = shared_weight(gate);
}

__global__ void __launch_bounds__(max_decode_warps(1) * 32, 2) router_kernel(Router p) {
  QWEN_DYNAMIC_SHARED(shared);
  const int k = p.shape.hidden;
  const int column_tiles = (k + 63) / 64;
  const int warps = static_cast<int>(blockDim.x) / 32;
  const int thread = static_cast<int>(threadIdx.x);
  const int lane = thread % 32;
  const DecodeLayout layout(column_tiles, kGroup, p.rows, warps, column_tiles * 128);
  const Activations x = {shared, reinterpret_cast<float4*>(shared + layout.sums), layout.row_bytes};
  unsigned char* own_row = shared + layout.weights + thread / 32 * k * 2;
  const int out = static_cast<int>(blockIdx.x) * warps + thread / 32;

  p.input.copy_weights(shared + layout.input, k);
  if (out <= p.shape.experts) {
    const bf16* from = out < p.shape.experts ? p.router + static_cast<int64_t>(out) * k : p.shared_gate;
#pragma unroll 1
    for (int chunk = lane; chunk < k / 8; chunk += 32) copy_async_16(own_row + chunk * 16, from + chunk * 8);
  }
  copy_async_commit();
  let_next_kernel_start();
  wait_for_previous_kernel();
  p.input.load<kGroup, 1>(x, shared + layout.input, reinterpret_cast<float*>(shared + layout.partial), p.rows,
                          k);

  copy_async_wait<0>();
  if (out <= p.shape.experts) {
    dot_rows(x, own_row, p.rows, k, [&](int row, float sum) {
      if (lane == 0) p.logits[row * (p.shape.experts + 1) + out] = round_bf16(sum);
    });
  }
  if (blockIdx.x == gridDim.x - 1) {  // the block with the fewest rows
    for (int i = thread; i < p.rows * (k / 8); i += static_cast<int>(blockDim.x)) {
      const int row = i / (k / 8);
      const int chunk = i % (k / 8);
      reinterpret_cast<uint4*>(p.normed)[i] = make_uint4(*x.pair(row, chunk, 0), *x.pair(row, chunk, 1),
                                                         *x.pair(row, chunk, 2), *x.pair(row, chunk, 3));
    }
  }
  if (!is_last_block(p.counters, gridDim.x)) return;
  for (int row = thread / 32; row < p.rows; row += warps) {
    if (p.shape.experts <= 256) {
      choose<8>(p, row);
    } else {
      choose<kMaxExperts / 32>(p, row);
    }
  }
}

}  // namespace

size_t router_decode_scratch(MoeShape shape, int rows) {
  return static_cast<size_t>(rows) * (shape.experts + 1) * sizeof(float);
}

cudaError_t router_decode(const bf16* x, RmsNorm norm, const bf16* router, const bf16* shared_gate,
                          bf16* normed, int32_t* ids, float* weights, void* scratch, uint32_t* counters,
                          MoeShape shape, int rows, cudaStream_t stream) {
  if (rows < 1 || rows > kMaxDecodeRows || shape.hidden < 1 || shape.hidden % 32 != 0 ||
      shape.experts > kMaxExperts || shape.top_k < 1 || shape.top_k > std::min(kMaxChoices, shape.experts)) {
    return cudaErrorInvalidValue;
  }
  const int column_tiles = (shape.hidden + 63) / 64;
  const int warps = decode_config(kRouter, shape.experts, shape.hidden, 0).warps;
  const DecodeLayout layout(column_tiles, kGroup, rows, warps, column_tiles * 128);
  const int bytes = layout.weights + warps * shape.hidden * 2;
  if (bytes > max_shared_bytes()) return cudaErrorInvalidValue;
  const Router p = {NormedInput{x, norm},         router,   shared_gate, normed, ids, weights,
                    static_cast<float*>(scratch), counters, shape,       rows};
  return launch(router_kernel,
                {dim3((shape.experts + warps) / warps), dim3(warps * 32), static_cast<size_t>(bytes)}, stream,
                p);
}

}  // namespace qwen::cuda
