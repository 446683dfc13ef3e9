// Prefill: one kernel norms and rotates the heads and fills the cache, one attends, tile by tile with an
// online softmax on tensor cores. The rows of a tile are pairs (token, query head of one key head), token by
// token: the heads of a key head share what is read of the cache, and few tokens still fill a tile.
#include "kernels/attention/heads.cuh"

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

constexpr int kWarps = 4;
constexpr int kThreads = 32 * kWarps;
constexpr int kRows = 16 * kWarps;
constexpr int kKeys = 64;

// A tile [rows, kDim] in shared memory: 16-byte chunks, each row's permuted so that eight rows of one column
// lie in different banks.
template <int kDim>
struct Tile {
  static constexpr int kChunks = kDim / 8;
  __device__ __forceinline__ static int offset(int row, int chunk) {
    return (row * kChunks + (chunk ^ (row & 7))) * 8;
  }
  // Of 2 i chunks after the offset of chunk 0 or 1.
  __device__ __forceinline__ static int advance(int offset, int i) {
    return (offset ^ 16 * (i % 4)) + 64 * (i / 4);
  }
};

// Keys or values first to first + kKeys of the head at head_offset; rows from `end` on are zero: they may
// hold anything.
template <int kDim>
__device__ __forceinline__ void copy_rows(bf16* to, const bf16* cache, int64_t head_offset, int first,
                                          int end, int head_dim, int thread) {
  constexpr int kRowsAtOnce = kThreads / Tile<kDim>::kChunks;
  const int chunk = thread % Tile<kDim>::kChunks;
  const int first_row = thread / Tile<kDim>::kChunks;
  const int rows = 8 * chunk < head_dim ? end - first : 0;
  const bf16* from = cache + head_offset + static_cast<int64_t>(first + first_row) * head_dim + 8 * chunk;
#pragma unroll
  for (int i = 0; i < kKeys / kRowsAtOnce; ++i) {
    const int row = first_row + i * kRowsAtOnce;
    copy_async_16(to + Tile<kDim>::offset(row, chunk), row < rows ? from : cache, row < rows);
    from += kRowsAtOnce * head_dim;
  }
  copy_async_commit();
}

struct Arguments {
  const bf16* qkv;      // for the gates
  const bf16* rotated;  // [T, Hq, Dh]
  const bf16* key_cache;
  const bf16* value_cache;
  const int64_t* position;
  const int64_t* slot;
  bf16* out;
  AttentionShape shape;
  int tokens;
};

// grid: (key heads, tiles of kRows rows). Two blocks a multiprocessor, so that one's products hide the
// other's softmax. Lane 4 r + q of a warp holds rows r and r + 8 of its 16, columns 2 q and 2 q + 1 of
// each 8.
template <int kDim>
__global__ void __launch_bounds__(kThreads, 2) attend(Arguments a) {
  QWEN_DYNAMIC_SHARED(shared_bytes);
  using At = Tile<kDim>;
  bf16* queries = reinterpret_cast<bf16*>(shared_bytes);
  bf16* keys = queries + kRows * kDim;
  bf16* values = keys + kKeys * kDim;
  const AttentionShape& shape = a.shape;
  const int thread = static_cast<int>(threadIdx.x);
  const int lane = thread % 32;
  const int warp = thread / 32;
  const int r = lane / 4;
  const int q = lane % 4;
  const int dim = shape.head_dim;
  const int key_head = static_cast<int>(blockIdx.x);
  const int heads = shape.query_heads / shape.key_heads;  // of this key head
  // The longest contexts first, the shortest fill the gaps at the end.
  const int first_row = static_cast<int>(gridDim.y - 1 - blockIdx.y) * kRows;
  const int end_row = min(first_row + kRows, a.tokens * heads);

  wait_for_previous_kernel();
  let_next_kernel_start();
  const int position = static_cast<int>(a.position[0]);
  const int64_t cache_offset = (a.slot[0] * shape.key_heads + key_head) * shape.cache_length * dim;
  const int end = position + (end_row - 1) / heads + 1;  // of the keys that a row of the tile sees
  const int tiles = (end + kKeys - 1) / kKeys;
  // Tiles before see the keys of no row masked.
  const int first_masked = (position + first_row / heads + 1) / kKeys;

  for (int i = thread; i < kRows * At::kChunks; i += kThreads) {
    const int row = i / At::kChunks;
    const int chunk = i % At::kChunks;
    const int token = (first_row + row) / heads;
    const int head = key_head * heads + (first_row + row) % heads;
    const bool valid = first_row + row < end_row && 8 * chunk < dim;
    const int64_t from =
        valid ? (static_cast<int64_t>(token) * shape.query_heads + head) * dim + 8 * chunk : 0;
    copy_async_16(queries + At::offset(row, chunk), a.rotated + from, valid);
  }
  copy_rows<kDim>(keys, a.key_cache, cache_offset, 0, end, dim, thread);
  copy_async_wait<0>();
  __syncthreads();
  copy_rows<kDim>(values, a.value_cache, cache_offset, 0, end, dim, thread);

  float result[kDim / 8][4];
#pragma unroll
  for (auto& c : result) c[0] = c[1] = c[2] = c[3] = 0;
  float maximum[2] = {-INFINITY, -INFINITY};  // of rows r and r + 8, of scores times log2(e)
  float sum[2] = {0, 0};                      // this lane's columns'
  const float score_scale = kLog2E / sqrtf(static_cast<float>(dim));
  const int warp_row = 16 * warp;
  const int query_offset = At::offset(warp_row + lane % 16, lane / 16);
  const int key_offset = At::offset(lane % 8 + lane / 16 * 8, lane / 8 % 2);
  const int value_offset = At::offset(lane % 16, lane / 16);

  for (int t = 0; t < tiles; ++t) {
    const int first_key = t * kKeys;
    float scores[kKeys / 8][4];
#pragma unroll
    for (auto& c : scores) c[0] = c[1] = c[2] = c[3] = 0;
#pragma unroll
    for (int k = 0; k < kDim / 16; ++k) {
      uint32_t query[4];
      load_matrix_x4(query, queries + At::advance(query_offset, k));
#pragma unroll
      for (int n = 0; n < kKeys / 16; ++n) {
        uint32_t key[4];
        load_matrix_x4(key, keys + 16 * n * kDim + At::advance(key_offset, k));
        mma_bf16(scores[2 * n], query, {key[0], key[1]});
        mma_bf16(scores[2 * n + 1], query, {key[2], key[3]});
      }
    }
    copy_async_wait<0>();
    __syncthreads();  // the values are here, the keys are used up
    if (t + 1 < tiles) copy_rows<kDim>(keys, a.key_cache, cache_offset, first_key + kKeys, end, dim, thread);

    if (t >= first_masked) {
      int last_key[2];
#pragma unroll
      for (int i = 0; i < 2; ++i) last_key[i] = position + (first_row + warp_row + r + 8 * i) / heads;
#pragma unroll
      for (int n = 0; n < kKeys / 8; ++n) {
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          if (first_key + 8 * n + 2 * q + i % 2 > last_key[i / 2]) scores[n][i] = -INFINITY;
        }
      }
    }
    // Every row sees key 0, so its maximum is finite from the first tile on.
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      float top = scores[0][2 * i];
#pragma unroll
      for (auto& c : scores) top = fmaxf(top, fmaxf(c[2 * i], c[2 * i + 1]));
      top = fmaxf(warp_max(top, 4) * score_scale, maximum[i]);
      const float rescale = exp2f(maximum[i] - top);
      maximum[i] = top;
      sum[i] *= rescale;
#pragma unroll
      for (auto& c : scores) {
        c[2 * i] = exp2f(fmaf(c[2 * i], score_scale, -top));
        c[2 * i + 1] = exp2f(fmaf(c[2 * i + 1], score_scale, -top));
        sum[i] += c[2 * i] + c[2 * i + 1];
      }
      // Once the maximum has settled, it rarely changes.
      if (__any_sync(~0U, rescale != 1.0F)) {
#pragma unroll
        for (auto& c : result) {
          c[2 * i] *= rescale;
          c[2 * i + 1] *= rescale;
        }
      }
    }

#pragma unroll
    for (int k = 0; k < kKeys / 16; ++k) {
      const auto& low = scores[2 * k];
      const auto& high = scores[2 * k + 1];
      const uint32_t weights[4] = {pack_bf16(low[0], low[1]), pack_bf16(low[2], low[3]),
                                   pack_bf16(high[0], high[1]), pack_bf16(high[2], high[3])};
#pragma unroll
      for (int n = 0; n < kDim / 16; ++n) {
        uint32_t value[4];
        load_matrix_x4_transposed(value, values + 16 * k * kDim + At::advance(value_offset, n));
        mma_bf16(result[2 * n], weights, {value[0], value[1]});
        mma_bf16(result[2 * n + 1], weights, {value[2], value[3]});
      }
    }
    copy_async_wait<0>();
    __syncthreads();  // the next keys are here, the values are used up
    if (t + 1 < tiles)
      copy_rows<kDim>(values, a.value_cache, cache_offset, first_key + kKeys, end, dim, thread);
  }

  // Through the warp's own rows of shared memory, so that it stores whole rows.
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    const float scale = 1.0F / warp_sum(sum[i], 4);
#pragma unroll
    for (int n = 0; n < kDim / 8; ++n) {
      const uint32_t pair = pack_bf16(result[n][2 * i] * scale, result[n][2 * i + 1] * scale);
      *reinterpret_cast<uint32_t*>(queries + At::offset(warp_row + r + 8 * i, n) + 2 * q) = pair;
    }
  }
  __syncwarp();
  for (int i = lane; i < 16 * At::kChunks; i += 32) {
    const int row = warp_row + i / At::kChunks;
    const int chunk = i % At::kChunks;
    if (first_row + row >= end_row || 8 * chunk >= dim) continue;
    const int64_t token = (first_row + row) / heads;
    const int head = key_head * heads + (first_row + row) % heads;
    float v[8];
    float gate[8];
    unpack_bf16(v, load_16(queries + At::offset(row, chunk)));
    unpack_bf16(gate, load_16(a.qkv + token * shape.row_size() + (2 * head + 1) * dim + 8 * chunk));
#pragma unroll
    for (int e = 0; e < 8; ++e) v[e] = gated(v[e], gate[e]);
    store_16(a.out + (token * shape.query_heads + head) * dim + 8 * chunk, pack_bf16(v));
  }
}

template <int kDim>
cudaError_t launch_attend(const Arguments& arguments, cudaStream_t stream) {
  const AttentionShape& shape = arguments.shape;
  const int64_t rows = int64_t{arguments.tokens} * (shape.query_heads / shape.key_heads);
  constexpr int64_t kMostTiles = 65535;  // of a grid's second dimension
  if (rows > kMostTiles * kRows) return cudaErrorInvalidValue;
  const dim3 grid(shape.key_heads, static_cast<unsigned>((rows + kRows - 1) / kRows));
  return launch(attend<kDim>, {grid, dim3(kThreads), (kRows + 2 * kKeys) * kDim * sizeof(bf16)}, stream,
                arguments);
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
