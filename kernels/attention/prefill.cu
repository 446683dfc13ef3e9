// Prefill: one kernel norms and rotates the heads and fills the cache, one attends (prefill_attend.cuh).
#include "kernels/attention/prefill_attend.cuh"

namespace qwen::cuda {
namespace {

constexpr int kPrepareThreads = 256;

// One block a token. rotated [T, Hq, Dh].
__global__ void __launch_bounds__(kPrepareThreads)
    prepare_heads(const bf16* qkv, const bf16* q_norm, const bf16* k_norm, bf16* key_cache, bf16* value_cache,
                  const int64_t* position, const int64_t* slot, bf16* rotated, AttentionShape shape,
                  Frequencies frequencies) {
  constexpr int kWarps = kPrepareThreads / 32;
  __shared__ float2 rotation[kMaxRotaryPairs];
  __shared__ __align__(16) bf16 rows[kWarps][kMaxHeadDim];
  const int thread = static_cast<int>(threadIdx.x);
  const int lane = thread % 32;
  const int warp = thread / 32;
  const int dim = shape.head_dim;
  const uint4 query_weight = load_head(q_norm, dim, lane);
  const uint4 key_weight = load_head(k_norm, dim, lane);
  bf16* row = rows[warp];

  wait_for_previous_kernel();
  let_next_kernel_start();
  const auto token = static_cast<int64_t>(blockIdx.x);
  const int64_t place = position[0] + token;
  const int64_t first_cache_row = slot[0] * shape.key_heads * shape.cache_length + place;
  const bf16* from = qkv + token * shape.row_size();
  const bf16* keys = from + 2 * shape.query_size();
  compute_rotation(rotation, frequencies, shape.rotary_dim, place, thread, kPrepareThreads);
  __syncthreads();

  const int heads = shape.query_heads + shape.key_heads;
  for (int head = warp; head < heads + shape.key_heads; head += kWarps) {
    const int key_head = (head - shape.query_heads) % shape.key_heads;
    const int64_t in_cache =
        (first_cache_row + static_cast<int64_t>(key_head) * shape.cache_length) * dim + 8 * lane;
    if (head >= heads) {
      if (8 * lane < dim)
        store_16(value_cache + in_cache, load_head(keys + shape.key_size() + key_head * dim, dim, lane));
      continue;
    }
    const bool is_query = head < shape.query_heads;
    const uint4 x = load_head(is_query ? from + 2 * head * dim : keys + key_head * dim, dim, lane);
    norm_and_rotate(row, x, is_query ? query_weight : key_weight, rotation, shape, lane);
    __syncwarp();
    if (8 * lane < dim) {
      bf16* to =
          is_query ? rotated + (token * shape.query_heads + head) * dim + 8 * lane : key_cache + in_cache;
      store_16(to, load_16(row + 8 * lane));
    }
    __syncwarp();
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
  QWEN_RETURN_IF_CUDA_ERROR(
      launch(prepare_heads, {dim3(static_cast<unsigned>(tokens)), dim3(kPrepareThreads)}, stream, qkv, q_norm,
             k_norm, key_cache, value_cache, position, slot, rotated, shape, rotary_frequencies(shape)));
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
