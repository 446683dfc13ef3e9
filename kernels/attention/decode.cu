// Decode: each row's context is cut into parts, a part into as many spans as a cluster has blocks. A block
// takes its span in chunks of keys through a ring of shared memory, of which as much as fits is on its way
// before the queries exist: earlier steps wrote it. Every block leaves its heads' results with the block of
// the cluster that finishes the head, which stores the output or, where the context has several parts, leaves
// it in scratch, where the last cluster to finish combines them. How a context is cut depends on it alone, so
// a row's result does not depend on the other rows.
#include "kernels/attention/decode_cut.cuh"
#include "kernels/attention/decode_results.cuh"
#include "kernels/attention/decode_tiles.cuh"
#include "kernels/cuda/cluster.cuh"

namespace qwen::cuda {
namespace {

constexpr int kThreads = kHeads * 32;
constexpr int kUnits = 3;  // of the ring: the keys or the values of a chunk
constexpr int kCluster = 8;
// Most blocks that are of use, for one row and for many.
constexpr int kBlocks = 128;
constexpr int kBlocksOfManyRows = 256;

template <int kDim, int kBlocksOfCluster>
struct Config {
  static constexpr int kKeys = kDim > 128 && kBlocksOfCluster == 1 ? 32 : 64;  // of a chunk
  static constexpr int kOwnHeads = kHeads / kBlocksOfCluster;  // that a block of the cluster finishes
  static constexpr int kQuads = kOwnHeads * kDim / 4;
  static constexpr int kQuadsOfThread = (kQuads + kThreads - 1) / kThreads;
  using ChunkType = Chunk<kDim, kKeys>;

  // With the kilobyte that a block takes besides, half a multiprocessor's shared memory: the next kernel's
  // blocks fit beside.
  struct Shared {
    unsigned char units[kUnits][Rows<kDim, kKeys>::kBytes];
    union {
      typename ChunkType::Queries queries;
      typename ChunkType::Weights weights;  // when the queries are in registers
    };
    union {
      typename ChunkType::Scores scores;
      struct {  // until there are scores
        float2 rotation[kMaxRotaryPairs];
        bf16 key[kDim];
      };
    };
    float results[kBlocksOfCluster][kOwnHeads][kDim];  // of the cluster's blocks
    Extent extents[kBlocksOfCluster][kOwnHeads];
    float rescale[kHeads];
    bool last;
  };
  static_assert(sizeof(Shared) <= 113 * 1024);
};

struct Arguments {
  const bf16* qkv;
  const bf16* q_norm;
  const bf16* k_norm;
  bf16* key_cache;
  bf16* value_cache;
  const int64_t* position;
  const int64_t* slot;
  float* partial;   // [rows, key heads, head groups, max_parts, kHeads, kDim]
  Extent* extents;  // [rows, key heads, head groups, max_parts, kHeads]
  uint32_t* counters;
  bf16* out;
  AttentionShape shape;
  int max_parts;
  float score_scale;
};

// grid: (blocks of a cluster, for each head group of all key heads and rows; clusters that share its parts)
template <int kDim, int kBlocksOfCluster>
__global__ void __launch_bounds__(kThreads, 2) decode(Arguments a, Frequencies frequencies) {
  using C = Config<kDim, kBlocksOfCluster>;
  using ChunkType = typename C::ChunkType;
  constexpr int kKeys = C::kKeys;
  constexpr int kQuadsOfThread = C::kQuadsOfThread;
  QWEN_DYNAMIC_SHARED(shared_bytes);
  auto& shared = *reinterpret_cast<typename C::Shared*>(shared_bytes);
  const AttentionShape& shape = a.shape;
  const int thread = static_cast<int>(threadIdx.x);
  const int lane = thread % 32;
  const int warp = thread / 32;
  const int dim = shape.head_dim;

  let_next_kernel_start();
  if constexpr (kBlocksOfCluster > 1) cluster_begin();
  const int rank = static_cast<int>(blockIdx.x) % kBlocksOfCluster;
  const int item = static_cast<int>(blockIdx.x) / kBlocksOfCluster;
  const int first_part = static_cast<int>(blockIdx.y);
  const int step = static_cast<int>(gridDim.y);
  const int groups = head_groups(shape);
  const int row = item / (groups * shape.key_heads);
  const int key_head = item / groups % shape.key_heads;
  const int group = item % groups;
  const int position = static_cast<int>(load_past_l1(a.position + row));
  const int64_t slot = load_past_l1(a.slot + row);
  const Cut cut(position, kBlocksOfCluster, a.max_parts);
  if (first_part >= cut.parts) {
    wait_for_previous_kernel();
    return;  // as the whole cluster does
  }

  const int64_t cache_offset = (slot * shape.key_heads + key_head) * shape.cache_length * dim;
  const bf16* const key_cache = a.key_cache + cache_offset;
  const bf16* const value_cache = a.value_cache + cache_offset;
  Span span(cut, first_part, rank, position);
  compute_now(span.begin);
  compute_now(span.end);

  // The chunks of all the block's spans, keys and values in turn, go into the ring's units in turn.
  const RowsCopy<kDim, kKeys, kThreads> rows(thread);
  int fetched_part = first_part;
  Span fetched = span;
  int fetched_unit = 0;
  const auto next_unit = [](int i) { return i + 1 < kUnits ? i + 1 : 0; };
  const auto next_span = [&] {
    while (fetched.begin >= fetched.end && (fetched_part += step) < cut.parts) {
      fetched = Span(cut, fetched_part, rank, position);
    }
  };
  const auto fetch = [&](const bf16* cache) {
    if (fetched.begin < fetched.end) {
      rows.copy(shared.units[fetched_unit], cache, fetched.begin, min(fetched.begin + kKeys, fetched.end),
                position, dim);
    }
    copy_async_commit();
    fetched_unit = next_unit(fetched_unit);
  };
  const auto fetch_keys = [&] { fetch(key_cache); };
  const auto fetch_values = [&] {
    fetch(value_cache);
    fetched.begin += kKeys;
    next_span();
  };
  next_span();
  fetch_keys();
  fetch_values();
  fetch_keys();

  const uint4 query_weight = load_head(a.q_norm, dim, lane);
  const uint4 key_weight = load_head(a.k_norm, dim, lane);
  compute_rotation(shared.rotation, frequencies, shape.rotary_dim, position, thread, kThreads);
  __syncthreads();
  const bool fits = LaneRotation::fits(shape);
  LaneRotation rotation(shared.rotation, shape, fits ? lane : 31);
#pragma unroll
  for (int i = 0; i < 8; ++i) {
    compute_now(rotation.cosine[i]);
    compute_now(rotation.sine[i]);
  }

  const int heads_per_key = shape.query_heads / shape.key_heads;
  const int first_head = key_head * heads_per_key + group * kHeads;
  const int heads = min(kHeads, heads_per_key - group * kHeads);
  const bf16* const projections = a.qkv + static_cast<int64_t>(row) * shape.row_size();
  // The position's own key is for warp 0 of the block whose span it is in, its value for warp 1.
  const bool has_position = [&] {
    const Span last(cut, cut.parts - 1, rank, position);
    return (cut.parts - 1) % step == first_part && last.begin <= position && position < last.end;
  }();
  const bool has_key = has_position && warp == 0;
  const bool has_value = has_position && warp == 1;
  const bf16* query_from = projections + 2 * (first_head + warp) * dim + 8 * lane;
  const bf16* own_from =
      projections + 2 * shape.query_size() + (has_value ? shape.key_size() : 0) + key_head * dim + 8 * lane;
  bf16* own_to = (has_key ? a.key_cache : a.value_cache) + cache_offset +
                 static_cast<int64_t>(position) * dim + 8 * lane;
  compute_now(query_from);
  compute_now(own_from);
  compute_now(own_to);
  // Of the heads that this block finishes, each thread has the elements 4 `thread` and on, and so many
  // threads further. Where each begins in the row's output, negative if it is none of it; its gate, behind
  // the head's query.
  int outputs[kQuadsOfThread];
  const bf16* gates_from[kQuadsOfThread];
#pragma unroll
  for (int i = 0; i < kQuadsOfThread; ++i) {
    const int quad = thread + i * kThreads;
    const int h = rank * C::kOwnHeads + quad / (kDim / 4);
    const int element = quad % (kDim / 4) * 4;
    outputs[i] = quad < C::kQuads && h < heads && element < dim ? (first_head + h) * dim + element : -1;
    gates_from[i] = projections + (2 * (first_head + h) + 1) * dim + element;
    compute_now(outputs[i]);
    compute_now(gates_from[i]);
  }
  // Heads 2 q and 2 q + 1 of the results that this lane has of its block's.
  float* const results = shared.results[rank][lane % 4 * 2 % C::kOwnHeads] +
                         warp % ChunkType::kOutputWarps * ChunkType::kOutputs * 16 + lane / 4;
  const BlockMemory even_results(results, lane % 4 * 2 / C::kOwnHeads);
  const BlockMemory odd_results(results, (lane % 4 * 2 + 1) / C::kOwnHeads);
  const BlockMemory extents(&shared.extents[rank][warp % C::kOwnHeads], warp / C::kOwnHeads);
  const ChunkType chunk(warp, lane);

  wait_for_previous_kernel();
  // One trip to memory.
  uint4 query = load_past_l1(query_from, warp < heads && 8 * lane < dim);
  uint4 own = load_past_l1(own_from, (has_key || has_value) && 8 * lane < dim);
  uint2 gates[kQuadsOfThread];
#pragma unroll
  for (int i = 0; i < kQuadsOfThread; ++i) {
    gates[i] = {0, 0};
    if (outputs[i] >= 0) gates[i] = __ldcg(reinterpret_cast<const uint2*>(gates_from[i]));
  }
  if (!fits) {
#pragma unroll 1
    for (int i = has_key ? 0 : 1; i < 2; ++i) {
      bf16* const to = i == 0 ? shared.key : shared.queries[warp];
      norm_and_rotate(to, i == 0 ? own : query, i == 0 ? key_weight : query_weight, shared.rotation, shape,
                      lane);
      __syncwarp();
      (i == 0 ? own : query) = load_head(to, dim, lane);
    }
  } else if (has_key) {
    uint4 both[2] = {query, own};
    rotation.norm_and_rotate<2>(both, {query_weight, key_weight}, shape);
    query = both[0], own = both[1];
  } else {
    uint4 alone[1] = {query};
    rotation.norm_and_rotate<1>(alone, {query_weight}, shape);
    query = alone[0];
  }
  if (8 * lane < kDim) store_16(shared.queries[warp] + 8 * lane, query);
  const auto put_own = [&](unsigned char* unit, int first, int end) {
    if (position < first || position >= end || 8 * lane >= kDim) return;
    *reinterpret_cast<uint4*>(unit + Rows<kDim, kKeys>::piece(position - first, lane)) = own;
  };

  uint32_t queries[ChunkType::kSteps][2];
  bool first_chunk = true;
  int keys_unit = 0;
  for (int part = first_part;;) {
    float result[ChunkType::kOutputs][4] = {};
    Extent extent = {kMasked, 0};  // of head `warp`; the sum is this lane's
    for (int first = span.begin; first < span.end; first += kKeys) {
      const int end = min(first + kKeys, span.end);
      const int values_unit = next_unit(keys_unit);
      if (has_key) put_own(shared.units[keys_unit], first, end);
      if (first_chunk) {
        copy_async_wait<2>();
      } else {
        copy_async_wait<1>();
      }
      __syncthreads();
      if (first_chunk) {
        chunk.load_queries(queries, shared.queries);
      } else {
        fetch_keys();
      }
      first_chunk = false;
      if (first + warp % ChunkType::kTiles * kTileKeys < end) {
        chunk.multiply_keys(shared.scores, shared.units[keys_unit], queries);
      }
      __syncthreads();
      constexpr int kOfLane = ChunkType::kOfLane;
      float weights[kOfLane];
      chunk.load_scores(weights, shared.scores);
      float maximum = kMasked;
#pragma unroll
      for (int i = 0; i < kOfLane; ++i) {
        weights[i] = first + kOfLane * lane + i < end ? weights[i] * a.score_scale : kMasked;
        maximum = fmaxf(maximum, weights[i]);
      }
      maximum = fmaxf(extent.maximum, warp_max(maximum));
      const float rescale = exp2f(extent.maximum - maximum);
      extent = {maximum, extent.sum * rescale};
#pragma unroll
      for (int i = 0; i < kOfLane; ++i) {
        weights[i] = exp2f(weights[i] - maximum);
        extent.sum += weights[i];
      }
      chunk.store_weights(shared.weights, weights);
      if (lane == 0) shared.rescale[warp] = rescale;
      if (has_value) put_own(shared.units[values_unit], first, end);
      fetch_values();
      copy_async_wait<2>();
      __syncthreads();
      if (warp < ChunkType::kOutputWarps) {
        const float even = shared.rescale[lane % 4 * 2];
        const float odd = shared.rescale[lane % 4 * 2 + 1];
#pragma unroll
        for (auto& tile : result) {
          tile[0] *= even, tile[1] *= odd, tile[2] *= even, tile[3] *= odd;
        }
        chunk.multiply_values(result, shared.units[values_unit], shared.weights, end - first);
      }
      keys_unit = next_unit(values_unit);
    }

    const int next_part = part + step;
    const bool last_part = next_part >= cut.parts;
    extent.sum = warp_sum(extent.sum);
    if constexpr (kBlocksOfCluster > 1)
      cluster_wait();  // its blocks have begun, and read what they were left
    if (lane == 0) extents.store(0, make_float2(extent.maximum, extent.sum));
    if (warp < ChunkType::kOutputWarps) {
      constexpr int kOddBytes = C::kOwnHeads > 1 ? kDim * 4 : 0;
#pragma unroll
      for (int j = 0; j < ChunkType::kOutputs; ++j) {
        even_results.store(64 * j, result[j][0]);
        even_results.store(64 * j + 32, result[j][2]);
        odd_results.store(64 * j + kOddBytes, result[j][1]);
        odd_results.store(64 * j + kOddBytes + 32, result[j][3]);
      }
    }
    if constexpr (kBlocksOfCluster > 1) cluster_arrive();
    // Only now: a barrier of the cluster waits for stores before it.
    if ((has_key || has_value) && last_part && group == 0 && 8 * lane < dim) store_16(own_to, own);
    uint2 factors[kQuadsOfThread];
#pragma unroll
    for (int i = 0; i < kQuadsOfThread; ++i) {
      compute_now(gates[i].x);
      compute_now(gates[i].y);
      factors[i] = {gate_factors(gates[i].x), gate_factors(gates[i].y)};
    }
    if constexpr (kBlocksOfCluster > 1) {
      cluster_wait();
    } else {
      __syncthreads();
    }

    // Of the parts of this head group, and of the heads of a part; the whole output's row.
    int item_now = item;
    compute_now(item_now);
    const int64_t first_of_item = static_cast<int64_t>(item_now) * a.max_parts * kHeads + rank * C::kOwnHeads;
    bf16* const out = a.out + static_cast<int64_t>(row) * shape.query_size();
#pragma unroll
    for (int i = 0; i < kQuadsOfThread; ++i) {
      if (outputs[i] < 0) continue;
      const int quad = thread + i * kThreads;
      const int h = quad / (kDim / 4);
      Extent of_blocks[kBlocksOfCluster];
      float4 results_of_blocks[kBlocksOfCluster];
#pragma unroll
      for (int b = 0; b < kBlocksOfCluster; ++b) {
        of_blocks[b] = shared.extents[b][h];
        results_of_blocks[b] = *reinterpret_cast<const float4*>(shared.results[b][0] + 4 * quad);
      }
      Total total;
      total.add(of_blocks, results_of_blocks);
      if (cut.parts == 1) {
        store_output(out + outputs[i], factors[i], total.result, total.extent.sum);
      } else {
        const int64_t to = first_of_item + part * kHeads + h;
        __stcg(reinterpret_cast<float4*>(a.partial + to * kDim) + quad % (kDim / 4), total.result);
        if (quad % (kDim / 4) == 0) {
          __stcg(reinterpret_cast<float2*>(a.extents + to),
                 make_float2(total.extent.maximum, total.extent.sum));
        }
      }
    }
    if (cut.parts == 1) return;

    __syncthreads();
    if constexpr (kBlocksOfCluster > 1) {
      if (!last_part) cluster_arrive();  // what it was left is read
    }
    if (thread == 0) {
      shared.last =
          arrives_last(a.counters + item_now * kBlocksOfCluster + rank, static_cast<uint32_t>(cut.parts));
    }
    __syncthreads();
    if (shared.last) {
#pragma unroll
      for (int i = 0; i < kQuadsOfThread; ++i) {
        if (outputs[i] < 0) continue;
        const int quad = thread + i * kThreads;
        constexpr int kBatch = 8;
        Total total;
        for (int p = 0; p < cut.parts; p += kBatch) {
          Extent of_parts[kBatch];
          float4 results_of_parts[kBatch];
#pragma unroll
          for (int b = 0; b < kBatch; ++b) {  // past L1, which may be older
            const int64_t from = first_of_item + min(p + b, cut.parts - 1) * kHeads + quad / (kDim / 4);
            const float2 v = __ldcg(reinterpret_cast<const float2*>(a.extents + from));
            of_parts[b] = {p + b < cut.parts ? v.x : kMasked, v.y};
            results_of_parts[b] =
                __ldcg(reinterpret_cast<const float4*>(a.partial + from * kDim) + quad % (kDim / 4));
          }
          total.add(of_parts, results_of_parts);
        }
        store_output(out + outputs[i], factors[i], total.result, total.extent.sum);
      }
      return;
    }
    if (last_part) return;
    part = next_part;
    span = Span(cut, part, rank, position);
  }
}

// Blocks of a cluster: the same for all numbers of rows, lest a row's result depend on them.
int blocks_of_cluster(const AttentionShape& shape) {
  const bool counted = kMaxDecodeRows * shape.key_heads * head_groups(shape) * kCluster <= kCounters;
  return counted && max_cluster_blocks() >= kCluster &&
                 max_shared_bytes() >= static_cast<int>(sizeof(Config<kMaxHeadDim, kCluster>::Shared))
             ? kCluster
             : 1;
}

int max_parts(const AttentionShape& shape) {
  const int cluster = blocks_of_cluster(shape);
  const int balanced = kBlocks / (cluster * shape.key_heads * head_groups(shape));
  const int least = cluster > 1 ? 1 : 4;
  const int limit = balanced < least ? least : balanced > 64 ? 64 : balanced;
  return count_parts(tiles_of(shape.cache_length), cluster, limit);
}

int padded_dim(int head_dim) { return head_dim <= 64 ? 64 : head_dim <= 128 ? 128 : 256; }

size_t parts(const AttentionShape& shape, int rows) {
  return static_cast<size_t>(rows) * shape.key_heads * head_groups(shape) * max_parts(shape);
}

template <int kDim, int kBlocksOfCluster>
cudaError_t launch_decode(const Arguments& arguments, int items, cudaStream_t stream) {
  const int most = kBlocksOfManyRows / (kBlocksOfCluster * items);
  const int clusters = most < 1 ? 1 : most < arguments.max_parts ? most : arguments.max_parts;
  return launch(decode<kDim, kBlocksOfCluster>,
                {.grid = dim3(items * kBlocksOfCluster, clusters),
                 .block = dim3(kThreads),
                 .shared_bytes = sizeof(typename Config<kDim, kBlocksOfCluster>::Shared),
                 .cluster = kBlocksOfCluster},
                stream, arguments, rotary_frequencies(arguments.shape));
}

template <int kDim>
cudaError_t launch_decode(const Arguments& arguments, int items, cudaStream_t stream) {
  return blocks_of_cluster(arguments.shape) == 1 ? launch_decode<kDim, 1>(arguments, items, stream)
                                                 : launch_decode<kDim, kCluster>(arguments, items, stream);
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
  auto* partial = static_cast<float*>(scratch);
  auto* extents = reinterpret_cast<Extent*>(partial + parts(shape, rows) * kHeads * dim);
  const Arguments arguments = {qkv,
                               q_norm,
                               k_norm,
                               key_cache,
                               value_cache,
                               position,
                               slot,
                               partial,
                               extents,
                               counters,
                               out,
                               shape,
                               max_parts(shape),
                               kLog2E / std::sqrt(static_cast<float>(shape.head_dim))};
  if (dim == 64) return launch_decode<64>(arguments, items, stream);
  if (dim == 128) return launch_decode<128>(arguments, items, stream);
  return launch_decode<256>(arguments, items, stream);
}

size_t attention_decode_scratch(AttentionShape shape, int rows) {
  return parts(shape, rows) * kHeads * (padded_dim(shape.head_dim) * sizeof(float) + sizeof(Extent));
}

}  // namespace qwen::cuda
