// Decode: each row's context is cut into splits, each split into tiles that the warps of a block take in
// turn, each with its own maximum, so that no barrier stands between a lane's loads: 512 bytes of them are in
// flight. The warps' results meet in shared memory, the splits' in scratch, where the last block to finish
// combines them. How a context is cut depends on it alone, so a row's result does not depend on the other
// rows.
#include "kernels/attention/decode_tiles.cuh"
#include "kernels/cuda/last_block.cuh"

namespace qwen::cuda {
namespace {

constexpr int kThreads = 256;
constexpr int kWarps = kThreads / 32;
constexpr int kHeads = 8;  // query heads of a block
constexpr int kMaxSplits = 64;
// About one block a multiprocessor for one row, two for many; a block takes several splits in turn.
constexpr int kBlocks = 128;
constexpr int kBlocksOfManyRows = 256;

__host__ __device__ int head_groups(const AttentionShape& shape) {
  return (shape.query_heads / shape.key_heads + kHeads - 1) / kHeads;
}

__host__ __device__ int max_splits(const AttentionShape& shape) {
  const int splits = kBlocks / (shape.key_heads * head_groups(shape));
  return splits < 4 ? 4 : splits > kMaxSplits ? kMaxSplits : splits;
}

int padded_dim(int head_dim) { return head_dim <= 64 ? 64 : head_dim <= 128 ? 128 : 256; }

struct Splits {
  int tiles;  // of the context
  int tiles_per_split;
  int count;
};

// A split costs the block that combines them about as much time as 8 keys cost the block that reads them, so
// about sqrt(context / 8) splits are best.
__device__ __forceinline__ Splits split_context(int position, int limit) {
  Splits splits;
  splits.tiles = position / kTileKeys + 1;
  const int balanced = static_cast<int>(sqrtf(0.5F * static_cast<float>(splits.tiles)));
  const int fewest = (splits.tiles + limit - 1) / limit;
  splits.tiles_per_split = max(max(balanced, fewest), 1);
  splits.count = (splits.tiles + splits.tiles_per_split - 1) / splits.tiles_per_split;
  return splits;
}

// Maxima are of scores times log2(e), sums and results relative to them.
struct Extent {
  float maximum;
  float sum;
};

template <int kDim>
struct Shared {
  float results[kWarps][kHeads][kDim + 4];
  Extent extents[kWarps][kHeads];
  float scales[kMaxSplits][kHeads];  // of the warps, then of the splits
  float2 rotation[kMaxRotaryPairs];
  bf16 queries[kHeads][kQueryStride<kDim>];
  bf16 key[kDim];
  bf16 value[kDim];
};

// Elements d to d + 3 of a head of the block, one of a thread's.
template <int kDim>
struct Quad {
  static constexpr int kAll = kHeads * kDim / 4;
  static constexpr int kOfThread = (kAll + kThreads - 1) / kThreads;

  int h;
  int d;

  __device__ __forceinline__ Quad(int thread, int i)
      : h((thread + i * kThreads) / (kDim / 4)), d((thread + i * kThreads) % (kDim / 4) * 4) {}
};

__device__ __forceinline__ void store_result(bf16* out, const uint2& gate, const float4& v) {
  uint2 packed;
  packed.x = pack_bf16(gated(v.x, low_bf16(gate.x)), gated(v.y, high_bf16(gate.x)));
  packed.y = pack_bf16(gated(v.z, low_bf16(gate.y)), gated(v.w, high_bf16(gate.y)));
  *reinterpret_cast<uint2*>(out) = packed;
}

__device__ __forceinline__ void add_scaled(float4& sum, float scale, const float4& v) {
  sum.x += scale * v.x;
  sum.y += scale * v.y;
  sum.z += scale * v.z;
  sum.w += scale * v.w;
}

template <bool kShared>
__device__ __forceinline__ Extent load_extent(const Extent* from) {
  if constexpr (kShared) return *from;
  const float2 v = __ldcg(reinterpret_cast<const float2*>(from));  // past L1, which may be older
  return {v.x, v.y};
}

// Warp h: scales that bring the `count` parts of head h to one maximum, with their sum of weights divided out
// if `divide`. extents has a part's heads side by side, in shared or global memory. Returns the whole's
// extent.
template <bool kShared>
__device__ __forceinline__ Extent compute_scales(float (*scales)[kHeads], const Extent* extents, int count,
                                                 bool divide, int h, int lane) {
  static_assert(kWarps == kHeads && kMaxSplits <= 64);
  Extent parts[2];
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    const int part = lane + 32 * i;
    parts[i] = {kMasked, 0};
    if (part < count) parts[i] = load_extent<kShared>(extents + part * kHeads + h);
  }
  const float maximum = warp_max(fmaxf(parts[0].maximum, parts[1].maximum));
  const float low = exp2f(parts[0].maximum - maximum);
  const float high = exp2f(parts[1].maximum - maximum);
  const float sum = warp_sum(low * parts[0].sum + high * parts[1].sum);
  const float factor = divide ? 1.0F / sum : 1.0F;
  if (lane < count) scales[lane][h] = low * factor;
  if (lane + 32 < count) scales[lane + 32][h] = high * factor;
  return {maximum, sum};
}

struct Arguments {
  const bf16* qkv;
  const bf16* q_norm;
  const bf16* k_norm;
  bf16* key_cache;
  bf16* value_cache;
  const int64_t* position;
  const int64_t* slot;
  float* partial;   // [rows, key heads, head groups, max_splits, kHeads, kDim]
  Extent* extents;  // [rows, key heads, head groups, max_splits, kHeads]
  uint32_t* counters;
  bf16* out;
  AttentionShape shape;
};

// grid: (head groups of all key heads and rows, blocks that share their splits)
template <int kDim>
__global__ void __launch_bounds__(kThreads, 1) decode(Arguments a, Frequencies frequencies) {
  QWEN_DYNAMIC_SHARED(shared_bytes);
  auto& shared = *reinterpret_cast<Shared<kDim>*>(shared_bytes);
  const AttentionShape& shape = a.shape;
  const int thread = static_cast<int>(threadIdx.x);
  const int lane = thread % 32;
  const int warp = thread / 32;
  const int r = lane / 4;
  const int q = lane % 4;
  const int dim = shape.head_dim;

  const int groups = head_groups(shape);
  const int item = static_cast<int>(blockIdx.x);
  const int row = item / (groups * shape.key_heads);
  const int key_head = item / groups % shape.key_heads;
  const int heads_per_key = shape.query_heads / shape.key_heads;
  const int first_head = key_head * heads_per_key + item % groups * kHeads;
  const int heads = min(kHeads, heads_per_key - item % groups * kHeads);
  const bf16* projections = a.qkv + static_cast<int64_t>(row) * shape.row_size();
  const bf16* own_key = projections + 2 * shape.query_size() + key_head * dim;
  const uint4 query_weight = load_head(a.q_norm, dim, lane);
  const uint4 key_weight = load_head(a.k_norm, dim, lane);

  wait_for_previous_kernel();
  // One trip to memory: plain loads would move below the decision to return.
  const uint4 query =
      load_past_l1(projections + 2 * (first_head + warp) * dim + 8 * lane, warp < heads && 8 * lane < dim);
  const int position = static_cast<int>(load_past_l1(a.position + row));
  const int64_t slot = load_past_l1(a.slot + row);
  const int limit = max_splits(shape);
  const Splits splits = split_context(position, limit);
  const int first_split = static_cast<int>(blockIdx.y);
  const int step = static_cast<int>(gridDim.y);
  if (first_split >= splits.count) return;
  let_next_kernel_start();

  const int64_t cache_offset = (slot * shape.key_heads + key_head) * shape.cache_length * dim;
  const bf16* key_cache = a.key_cache + cache_offset;
  const bf16* value_cache = a.value_cache + cache_offset;
  const bool has_position = (splits.count - 1) % step == first_split;

  // The first tile is on its way while the queries are made ready.
  KeyTile<kDim> keys;
  ValueTile<kDim> values;
  const auto load_first_tile = [&](int split) {
    const int first_tile = split * splits.tiles_per_split;
    const int first_key = (first_tile + warp) * kTileKeys;
    const int end = warp < splits.tiles_per_split ? position : 0;
    keys.load(key_cache, first_key, end, dim, r, q);
    values.load(value_cache, first_key, end, dim, r, q);
  };
  load_first_tile(first_split);
  uint4 own = {0, 0, 0, 0};  // the position's key, its value
  if (has_position && warp < 2) own = load_head(own_key + warp * shape.key_size(), dim, lane);

  compute_rotation(shared.rotation, frequencies, shape.rotary_dim, position, thread, kThreads);
  if (8 * lane >= dim && 8 * lane < kDim) store_16(shared.queries[warp] + 8 * lane, {0, 0, 0, 0});
  __syncthreads();
  norm_and_rotate(shared.queries[warp], query, query_weight, shared.rotation, shape, lane);
  if (has_position && warp < 2) {
    bf16* own_row = warp == 0 ? shared.key : shared.value;
    if (8 * lane < kDim) store_16(own_row + 8 * lane, own);
    if (warp == 0) norm_and_rotate(own_row, own, key_weight, shared.rotation, shape, lane);
    __syncwarp();
    if (item % groups == 0 && 8 * lane < dim) {
      store_16((warp == 0 ? a.key_cache : a.value_cache) + cache_offset +
                   static_cast<int64_t>(position) * dim + 8 * lane,
               load_16(own_row + 8 * lane));
    }
  }
  __syncthreads();

  bf16* out = a.out + (static_cast<int64_t>(row) * shape.query_heads + first_head) * dim;
  const auto load_gate = [&](const Quad<kDim>& quad) {
    return *reinterpret_cast<const uint2*>(projections + (2 * (first_head + quad.h) + 1) * dim + quad.d);
  };
  const float score_scale = kLog2E / sqrtf(static_cast<float>(dim));
  for (int split = first_split; split < splits.count; split += step) {
    const int first_tile = split * splits.tiles_per_split;
    const int tiles = min(splits.tiles_per_split, splits.tiles - first_tile);
    Accumulator<kDim> accumulator;
    accumulator.clear();
    for (int t = warp; t < tiles; t += kWarps) {
      const int first_key = (first_tile + t) * kTileKeys;
      const int next_key = first_key + kWarps * kTileKeys;
      const bool last = first_tile + t == splits.tiles - 1;
      const int rows = min(position - first_key, kTileKeys) + 1;
      if (last) keys.replace(rows - 1, shared.key, r, q);
      float scores[4];
      multiply_keys<kDim>(scores, keys, shared.queries[0], r, q);
      if (t + kWarps < tiles) keys.load(key_cache, next_key, position, dim, r, q);
#pragma unroll
      for (int i = 0; i < 4; ++i) scores[i] = r + 8 * (i / 2) < rows ? scores[i] * score_scale : kMasked;
      uint32_t weights[2];
      accumulator.weigh(weights, scores, r, q);
      if (last) values.replace(rows - 1, shared.value, r, q);
      multiply_values<kDim>(accumulator.result, values, weights);
      if (t + kWarps < tiles) values.load(value_cache, next_key, position, dim, r, q);
    }
    if (split + step < splits.count) load_first_tile(split + step);

    const int warps = min(tiles, kWarps);
    if (warp < warps) {
#pragma unroll
      for (int h = 0; h < 2; ++h) {
        float sum = accumulator.sum[h];
#pragma unroll
        for (int offset = 4; offset < 32; offset *= 2) sum += __shfl_xor_sync(~0U, sum, offset);
        if (r == 0) shared.extents[warp][2 * q + h] = {accumulator.maximum[h], sum};
        float* to = shared.results[warp][2 * q + h] + 8 * r;
#pragma unroll
        for (int b = 0; b < kDim / 64; ++b) {
          const auto& c = accumulator.result;
#pragma unroll
          for (int j = 0; j < 4; j += 2) {
            *reinterpret_cast<float4*>(to + 64 * b + 2 * j) = {c[4 * b + j][h], c[4 * b + j][h + 2],
                                                               c[4 * b + j + 1][h], c[4 * b + j + 1][h + 2]};
          }
        }
      }
    }
    __syncthreads();
    const bool whole = splits.count == 1;
    const int64_t part = static_cast<int64_t>(item) * limit + split;
    const Extent extent = compute_scales<true>(shared.scales, shared.extents[0], warps, whole, warp, lane);
    if (!whole && lane == 0) a.extents[part * kHeads + warp] = extent;
    __syncthreads();
#pragma unroll
    for (int i = 0; i < Quad<kDim>::kOfThread; ++i) {
      const Quad<kDim> quad(thread, i);
      if (quad.h >= heads || quad.d >= dim) continue;
      float4 sum = {0, 0, 0, 0};
      for (int w = 0; w < warps; ++w) {
        add_scaled(sum, shared.scales[w][quad.h],
                   *reinterpret_cast<const float4*>(shared.results[w][quad.h] + quad.d));
      }
      if (whole) {
        store_result(out + quad.h * dim + quad.d, load_gate(quad), sum);
      } else {
        *reinterpret_cast<float4*>(a.partial + (part * kHeads + quad.h) * kDim + quad.d) = sum;
      }
    }
    if (whole) return;

    if (!is_last_block(a.counters + item, static_cast<uint32_t>(splits.count))) continue;

    // Eight splits' parts of all of a thread's quads at once, the first while the scales are computed. What
    // lies past the heads and Dh is read and dropped.
    constexpr int kBatch = 8;
    constexpr int kQuads = Quad<kDim>::kOfThread;
    const int64_t first_part = static_cast<int64_t>(item) * limit;
    const bool has_quads = thread < Quad<kDim>::kAll;
    float4 batch[kBatch][kQuads];
    float4 sums[kQuads];
    uint2 gates[kQuads];
    const auto load_batch = [&](int first) {
#pragma unroll
      for (int s = 0; s < kBatch; ++s) {
        const int64_t from = first_part + min(first + s, splits.count - 1);
#pragma unroll
        for (int i = 0; i < kQuads; ++i) {
          const Quad<kDim> quad(thread, i);
          batch[s][i] =
              __ldcg(reinterpret_cast<const float4*>(a.partial + (from * kHeads + quad.h) * kDim + quad.d));
        }
      }
    };
    if (has_quads) load_batch(0);
#pragma unroll
    for (int i = 0; i < kQuads; ++i) {
      const Quad<kDim> quad(thread, i);
      sums[i] = {0, 0, 0, 0};
      gates[i] = quad.h < heads && quad.d < dim ? load_gate(quad) : uint2{0, 0};
    }
    compute_scales<false>(shared.scales, a.extents + first_part * kHeads, splits.count, true, warp, lane);
    __syncthreads();
    if (!has_quads) return;
    for (int first = 0;;) {
#pragma unroll
      for (int s = 0; s < kBatch; ++s) {
        if (first + s >= splits.count) break;
#pragma unroll
        for (int i = 0; i < kQuads; ++i) {
          add_scaled(sums[i], shared.scales[first + s][Quad<kDim>(thread, i).h], batch[s][i]);
        }
      }
      first += kBatch;
      if (first >= splits.count) break;
      load_batch(first);
    }
#pragma unroll
    for (int i = 0; i < kQuads; ++i) {
      const Quad<kDim> quad(thread, i);
      if (quad.h < heads && quad.d < dim) store_result(out + quad.h * dim + quad.d, gates[i], sums[i]);
    }
    return;
  }
}

template <int kDim>
cudaError_t launch_decode(const Arguments& arguments, dim3 grid, cudaStream_t stream) {
  return launch(decode<kDim>, {grid, dim3(kThreads), sizeof(Shared<kDim>)}, stream, arguments,
                rotary_frequencies(arguments.shape));
}

size_t parts(const AttentionShape& shape, int rows) {
  return static_cast<size_t>(rows) * shape.key_heads * head_groups(shape) * max_splits(shape);
}

}  // namespace

cudaError_t attention_decode(const bf16* qkv, const bf16* q_norm, const bf16* k_norm, bf16* key_cache,
                             bf16* value_cache, const int64_t* position, const int64_t* slot, void* scratch,
                             uint32_t* counters, bf16* out, AttentionShape shape, int rows,
                             cudaStream_t stream) {
  if (!is_valid(shape) || rows < 1 || rows > kMaxDecodeRows) return cudaErrorInvalidValue;
  const int items = rows * shape.key_heads * head_groups(shape);
  if (items > kCounters) return cudaErrorInvalidValue;
  const int dim = padded_dim(shape.head_dim);
  const int limit = max_splits(shape);
  const int shared_by = items >= kBlocksOfManyRows ? 1 : kBlocksOfManyRows / items;
  const dim3 grid(items, shared_by < limit ? shared_by : limit);
  auto* partial = static_cast<float*>(scratch);
  auto* extents = reinterpret_cast<Extent*>(partial + parts(shape, rows) * kHeads * dim);
  const Arguments arguments = {qkv,  q_norm,  k_norm,  key_cache, value_cache, position,
                               slot, partial, extents, counters,  out,         shape};
  if (dim == 64) return launch_decode<64>(arguments, grid, stream);
  if (dim == 128) return launch_decode<128>(arguments, grid, stream);
  return launch_decode<256>(arguments, grid, stream);
}

size_t attention_decode_scratch(AttentionShape shape, int rows) {
  return parts(shape, rows) * kHeads * (padded_dim(shape.head_dim) * sizeof(float) + sizeof(Extent));
}

}  // namespace qwen::cuda
