// Prefill: one kernel norms and rotates the heads and fills the cache, one attends (prefill_pipeline.cuh on
// Hopper, prefill_attend.cuh elsewhere).
#include "kernels/attention/prefill_attend.cuh"

#ifndef QWEN_CUDA_EMULATION
#include "kernels/attention/prefill_pipeline_launch.cuh"
#endif

namespace qwen::cuda {
namespace {

constexpr int kPrepareWarps = 4;
// Normed by a warp: of 16 query and 2 key heads, four warps have no more each.
constexpr int kHeadsAtOnce = 5;

// One block a token. rotated [T, Hq, Dh]. kInLanes: LaneRotation fits.
template <bool kInLanes>
__global__ void __launch_bounds__(32 * kPrepareWarps, 6)
    prepare_heads(const bf16* qkv, const bf16* q_norm, const bf16* k_norm, bf16* key_cache, bf16* value_cache,
                  const int64_t* position, const int64_t* slot, bf16* rotated, AttentionShape shape,
                  Frequencies frequencies) {
  __shared__ float2 rotation[kMaxRotaryPairs];
  __shared__ __align__(16) bf16 rows[kPrepareWarps][kInLanes ? 8 : kMaxHeadDim];
  const int thread = static_cast<int>(threadIdx.x);
  const int lane = thread % 32;
  const int warp = thread / 32;
  const int dim = shape.head_dim;
  const bool in_row = 8 * lane < dim;
  const int end = shape.query_heads + shape.key_heads;
  const uint4 query_weight = load_head(q_norm, dim, lane);
  const uint4 key_weight = load_head(k_norm, dim, lane);

  wait_for_previous_kernel();
  let_next_kernel_start();
  const auto token = static_cast<int64_t>(blockIdx.x);
  const int64_t place = position[0] + token;
  compute_rotation(rotation, frequencies, shape.rotary_dim, place, thread, 32 * kPrepareWarps);
  const bf16* const from = qkv + token * shape.row_size() + 8 * lane;
  const auto load = [&](uint4(&x)[kHeadsAtOnce], int first) {
#pragma unroll
    for (int h = 0; h < kHeadsAtOnce; ++h) {
      const int head = first + h * kPrepareWarps;
      x[h] = {0, 0, 0, 0};
      if (head < end && in_row) x[h] = load_16(from + (head + min(head, shape.query_heads)) * dim);
    }
  };
  uint4 x[kHeadsAtOnce];
  load(x, warp);
  const int64_t in_cache = (slot[0] * shape.key_heads * shape.cache_length + place) * dim + 8 * lane;
  const int64_t next_head = static_cast<int64_t>(shape.cache_length) * dim;
  // The last warps have fewest heads to norm.
  for (int head = kPrepareWarps - 1 - warp; head < shape.key_heads; head += kPrepareWarps) {
    if (in_row) {
      store_16(value_cache + in_cache + head * next_head,
               load_16(from + (2 * shape.query_heads + shape.key_heads + head) * dim));
    }
  }
  __syncthreads();
  const LaneRotation in_lanes(rotation, shape, kInLanes ? lane : 31);

  for (int first = warp; first < end; first += kHeadsAtOnce * kPrepareWarps) {
    if (first != warp) load(x, first);
#pragma unroll
    for (int h = 0; h < kHeadsAtOnce; ++h) {
      const int head = first + h * kPrepareWarps;
      if (head >= end) continue;
      const bool is_query = head < shape.query_heads;
      uint4 v[1] = {x[h]};
      const uint4 weight[1] = {is_query ? query_weight : key_weight};
      if constexpr (kInLanes) {
        in_lanes.norm_and_rotate<1>(v, weight, shape);
      } else {
        norm_and_rotate(rows[warp], x[h], weight[0], rotation, shape, lane);
        __syncwarp();
        if (in_row) v[0] = load_16(rows[warp] + 8 * lane);
        __syncwarp();
      }
      if (!in_row) continue;
      store_16(is_query ? rotated + (token * shape.query_heads + head) * dim + 8 * lane
                        : key_cache + in_cache + (head - shape.query_heads) * next_head,
               v[0]);
    }
  }
}

using prefill_attention::Arguments;
using prefill_attention::attend;
using prefill_attention::Shape;

template <int kDim, int kWarps>
cudaError_t launch_attend(const Arguments& arguments, int64_t rows, cudaStream_t stream) {
  using S = Shape<kDim, kWarps>;
  constexpr int64_t kMostTiles = 65535;  // of a grid's second dimension
  if (rows > kMostTiles * S::kRows) return cudaErrorInvalidValue;
  const dim3 grid(arguments.shape.key_heads, static_cast<unsigned>((rows + S::kRows - 1) / S::kRows));
  return launch(attend<kDim, kWarps>, {grid, dim3(S::kThreads), S::kSharedBytes}, stream, arguments);
}

// Eight warps a block where that fits, and makes blocks enough for the machine.
template <int kDim>
cudaError_t launch_attend(const Arguments& arguments, cudaStream_t stream) {
#ifndef QWEN_CUDA_EMULATION
  using prefill_attention::Pipeline;
  if (prefill_attention::is_pipelined<Pipeline<kDim>>()) {
    return prefill_attention::launch_pipelined<Pipeline<kDim>>(arguments, stream);
  }
#endif
  using Wide = Shape<kDim, 8>;
  const AttentionShape& shape = arguments.shape;
  const int64_t rows = int64_t{arguments.tokens} * (shape.query_heads / shape.key_heads);
  const int64_t blocks = (rows + Wide::kRows - 1) / Wide::kRows * shape.key_heads;
  if (Wide::kSharedBytes <= max_shared_bytes() && blocks >= multiprocessors()) {
    return launch_attend<kDim, 8>(arguments, rows, stream);
  }
  return launch_attend<kDim, 4>(arguments, rows, stream);
}

}  // namespace

cudaError_t attention_prefill(const bf16* qkv, const bf16* q_norm, const bf16* k_norm, bf16* key_cache,
                              bf16* value_cache, const int64_t* position, const int64_t* slot, void* scratch,
                              bf16* out, AttentionShape shape, int64_t tokens, cudaStream_t stream) {
  if (!is_valid(shape) || tokens < 1) return cudaErrorInvalidValue;
  auto* rotated = static_cast<bf16*>(scratch);
  QWEN_RETURN_IF_CUDA_ERROR(launch(LaneRotation::fits(shape) ? prepare_heads<true> : prepare_heads<false>,
                                   {dim3(static_cast<unsigned>(tokens)), dim3(32 * kPrepareWarps)}, stream,
                                   qkv, q_norm, k_norm, key_cache, value_cache, position, slot, rotated,
                                   shape, rotary_frequencies(shape)));
  const Arguments arguments = {
      qkv, rotated, key_cache, value_cache, position, slot, out, shape, static_cast<int>(tokens)};
  if (shape.head_dim <= 64) return launch_attend<64>(arguments, stream);
  if (shape.head_dim <= 128) return launch_attend<128>(arguments, stream);
  return launch_attend<256>(arguments, stream);
}

size_t attention_prefill_scratch(AttentionShape shape, int64_t tokens) {
  return static_cast<size_t>(tokens) * shape.query_size() * sizeof(bf16);
}

}  // namespace qwen::cuda
