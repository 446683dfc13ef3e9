// The experts of a decode step, first half: gate-up with SwiGLU.
//
// Every block chooses the experts for itself, as moe_down_decode's do (down_decode.cu); it is what that one
// may read the logits for before it waits, so that its own weights are on their way in the meantime.
#include "kernels/linear/decode_kernel.cuh"
#include "kernels/moe/choice.cuh"
#include "kernels/moe/cuda.h"
#include "kernels/moe/experts_decode.h"

namespace qwen::cuda {
namespace {

struct GateUp {
  NormedInput input;
  const float* logits;  // [B, E + 1]
  Int4Matrix routed;
  Int4Matrix shared;
  bf16* act;  // [B, A I + Is]
  MoeShape shape;
  int rows;
  // The first `shared_blocks` blocks have `shared_tiles` tile rows of the shared expert each, for all rows.
  // Then come the choices' blocks, `tiles` tile rows of one choice each; where shared_blocks is 0, which is
  // of one row, the shared expert's lie in these, dealt evenly.
  int shared_blocks;
  int shared_tiles;
  int tiles;
  int blocks_of_a_choice;
  uint32_t of_blocks;  // reciprocals: of blocks_of_a_choice and of the number of choices
  uint32_t of_choices;
  // Without shared_blocks: a choice's block has this many of the shared expert's, one more if it is below.
  int shared_each;
  int shared_longer;
  // Bytes of an expert's and of a tile row's tiles and scales.
  uint32_t expert_tiles;
  uint32_t expert_scales;
  uint32_t row_tiles;
  uint32_t row_scales;
};

template <typename T>
__device__ __forceinline__ const T* plus_bytes(const T* p, uint64_t bytes) {
  return reinterpret_cast<const T*>(reinterpret_cast<const unsigned char*>(p) + bytes);
}

// Division by multiplication: exact for x d < 2^31.
uint32_t reciprocal(int d) { return static_cast<uint32_t>(((1ULL << 31) + d - 1) / d); }
__device__ __forceinline__ int times_reciprocal(int x, uint32_t of) {
  return static_cast<int>(static_cast<uint64_t>(static_cast<uint32_t>(x)) * of >> 31);
}

// What a block of gate-up has: tile rows of the shared expert, then of a choice.
struct GateUpShare {
  int first_row;
  int rows;
  int choice;
  int first_shared;
  int shared_tiles;
  int first_tile;
  int tiles;

  __device__ GateUpShare(const GateUp& p, int block) {
    const bool is_shared = block < p.shared_blocks;
    block -= is_shared ? 0 : p.shared_blocks;
    const int choices_block = is_shared ? 0 : block;
    const int choice_of_all = times_reciprocal(choices_block, p.of_blocks);
    rows = is_shared ? p.rows : 1;
    first_row = p.rows == 1 ? 0 : times_reciprocal(choice_of_all, p.of_choices);
    choice = choice_of_all - first_row * p.shape.top_k;
    first_tile = (choices_block - choice_of_all * p.blocks_of_a_choice) * p.tiles;
    tiles = is_shared ? 0 : min(p.tiles, p.routed.row_tiles() - first_tile);
    if (is_shared) {
      first_shared = block * p.shared_tiles;
      shared_tiles = min(p.shared_tiles, p.shared.row_tiles() - first_shared);
    } else {
      first_shared = block * p.shared_each + min(block, p.shared_longer);
      shared_tiles = p.shared_each + (block < p.shared_longer ? 1 : 0);
    }
  }
};

// Offsets into the shared memory of a block with `rows` rows and `tiles` tile rows.
template <int kGroup, int kUnits>
struct GateUpLayout {
  int squares;  // behind the expert and the norm's factors
  int sums;
  int slices;
  int items;
  int bytes;

  __host__ __device__ GateUpLayout(int rows, int tiles) {
    using S = Slice<kGroup, kUnits>;
    squares = 64;
    sums = squares + rows * kDecodeWarps * 4;
    slices = sums + tiles * rows * 16 * kSumStride * 4;
    items = slices + kDecodeWarps * S::row_bytes(rows);
    bytes = items + tiles * kDecodeWarps * S::kItemBytes;
  }
};

// NormedInput's values, loaded already.
struct LoadedInput {
  NormedInput normed;
  NormedInput::Raw values;

  static constexpr bool kNorm = NormedInput::kNorm;
  using Weights = NormedInput::Weights;
  using Raw = NormedInput::Raw;

  __device__ Raw load(int /*row*/, int /*column*/, int /*k*/) const { return values; }
  __device__ Four finish(const Raw& raw, const Weights& weights, float& square) const {
    return normed.finish(raw, weights, square);
  }
};

constexpr int kGateUpThreads = (kDecodeWarps + 1) * 32;

// The last warp chooses. The others have the chosen expert's weights on their way as soon as it is known:
// only then do they make fragments of x, which would take the chooser's turns. Wider slices than the model's
// take the registers of two blocks.
template <int kGroup, int kUnits, int kMaxRows>
__global__ void __launch_bounds__(kGateUpThreads, Slice<kGroup, kUnits>::kColumns > 128 ? 1 : 2)
    gate_up_kernel(GateUp p) {
  using S = Slice<kGroup, kUnits>;
  QWEN_DYNAMIC_SHARED(shared);
  const int lane = static_cast<int>(threadIdx.x % 32);
  const int warp = static_cast<int>(threadIdx.x / 32);
  const bool chooses = warp == kDecodeWarps;
  const GateUpShare share(p, static_cast<int>(blockIdx.x));
  const int rows = kMaxRows == 1 ? 1 : share.rows;
  const int tiles = share.shared_tiles + share.tiles;
  const GateUpLayout<kGroup, kUnits> layout(rows, tiles);
  const int k = p.routed.k;
  const int first_column = warp * S::kColumns;
  uint32_t* expert = reinterpret_cast<uint32_t*>(shared);
  float* factors = reinterpret_cast<float*>(shared) + 1;
  float* squares = reinterpret_cast<float*>(shared + layout.squares);
  float* sums = reinterpret_cast<float*>(shared + layout.sums);
  unsigned char* slice = shared + layout.slices + warp * S::row_bytes(rows);
  unsigned char* items = shared + layout.items + warp * tiles * S::kItemBytes;
  NormedInput input = p.input;
  input.x += share.first_row * k;

  ItemSource<kGroup, kUnits> source(p.routed, share.first_tile, first_column);
  source.settle();
  int routed_items = layout.items + (warp * tiles + share.shared_tiles) * S::kItemBytes;
  settle(routed_items);
  const int experts = p.shape.experts;
  const float* logits = p.logits + share.first_row * (experts + 1);
  int choices = share.tiles > 0 ? share.choice + 1 : 0;  // to choose
  settle(logits);
  settle(choices);
  // A warp has two tile rows of one row of x at the end.
  constexpr int kPairs = kRingSlots / 2;
  const int width = p.shape.top_k * p.shape.intermediate + p.shape.shared_intermediate;
  int sum_at;  // and where it belongs, if it does
  int act_at;
  int row;
  const auto find_element = [&](int part) {
    row = kMaxRows == 1 ? 0 : part / kPairs;
    const int tile = (kMaxRows == 1 ? part : part % kPairs) * 2 + lane / 16;
    const int out = lane % 16;
    sum_at = ((min(tile, tiles - 1) * rows + row) * 16 + out) * kSumStride;
    const bool is_shared = tile < share.shared_tiles;
    const int choice = is_shared ? p.shape.top_k : share.choice;
    const int tile_row = (is_shared ? share.first_shared : share.first_tile - share.shared_tiles) + tile;
    act_at = tile >= tiles || out >= 8
                 ? -1
                 : (share.first_row + row) * width + choice * p.shape.intermediate + tile_row * 8 + out;
  };
  find_element(warp);
  settle(sum_at);
  settle(act_at);
  NormedInput::Weights norm_weights[S::kOfLane] = {};
  if (!chooses) {
#pragma unroll 1
    for (int i = 0; i < share.shared_tiles; ++i) {
      copy_item<kGroup, kUnits>(items + i * S::kItemBytes, p.shared, share.first_shared + i, first_column);
      copy_async_commit();
    }
#pragma unroll
    for (int i = 0; i < S::kOfLane; ++i) {
      norm_weights[i] = input.weights(first_column + S::column_of_lane(i), k);
    }
  }
  wait_for_previous_kernel();
  let_next_kernel_start();  // not before the wait: see above

  constexpr bool kLoadsFirst = kMaxRows == 1 && S::kOfLane == 1;
  LoadedInput loaded = {input, {}};
  if (chooses) {
    if (choices > 0) {
      const uint32_t own = choose_experts(logits, experts, choices);
      if (lane == choices - 1) *expert = expert_of(own);
    }
  } else if (kLoadsFirst) {
    const int column = first_column + S::column_of_lane(0);
    if (column < k) loaded.values = input.load(0, column, k);
  }
  __syncthreads();

  Fragments<kGroup, kUnits, kMaxRows> x;
  if (!chooses) {
    if (share.tiles > 0) {
      const uint32_t chosen = *expert;
      source.tiles = plus_bytes(source.tiles, uint64_t{chosen} * p.expert_tiles);
      source.scales = plus_bytes(source.scales, uint64_t{chosen} * p.expert_scales);
    }
    unsigned char* to = shared + routed_items;
#pragma unroll 1
    for (int i = 0; i < share.tiles; ++i) {
      source.copy(to);
      copy_async_commit();
      source.tiles = plus_bytes(source.tiles, p.row_tiles);
      source.scales = plus_bytes(source.scales, p.row_scales);
      to += S::kItemBytes;
    }
#pragma unroll 1
    for (int i = tiles; i < kRingSlots; ++i) copy_async_commit();  // of nothing: the waits count
    const auto load = [&](const auto& from) {
      load_slice<kGroup, kUnits, true, kMaxRows>(slice, squares, from, norm_weights, first_column, rows, k);
    };
    if constexpr (kLoadsFirst) {
      load(loaded);
    } else {
      load(input);
    }
    x.read(slice, rows);
  }
  __syncthreads();

  if (chooses) {
    if (lane < rows) factors[lane] = norm_factor(input, squares + lane * kDecodeWarps, k);
  } else {
    // One at a time, so that the shared expert's are done while the others are on their way.
    const unsigned char* item = items;
    float* sums_of_tile = sums;
#pragma unroll 1
    for (int i = 0; i < tiles; ++i) {
      copy_async_wait<kRingSlots - 1>();
      __syncwarp();
      TileSums of[1];
      x.multiply(of, {item});
      store_sums(sums_of_tile, of[0], rows);
      copy_async_commit();
      item += S::kItemBytes;
      sums_of_tile += rows * 16 * kSumStride;
    }
  }
  __syncthreads();

#pragma unroll 1
  for (int part = warp; part < rows * kPairs; part += kDecodeWarps + 1) {
    if (part != warp) find_element(part);
    const float sum = sum_over_warps(sums + sum_at) * factors[row];
    const float up = __shfl_down_sync(~0U, sum, 8);
    if (act_at >= 0) p.act[act_at] = __float2bfloat16(__fdividef(sum, 1.0F + __expf(-sum)) * up);
  }
}

template <int kGroup, int kUnits>
cudaError_t launch_gate_up(GateUp p, int most_blocks, cudaStream_t stream) {
  const int row_tiles = p.routed.row_tiles();
  const int choices = p.rows * p.shape.top_k;
  const auto bytes_of = [](int rows, int tiles) { return GateUpLayout<kGroup, kUnits>(rows, tiles).bytes; };
  // Of the shared expert's tile rows, those beside a choice's block; 0 where they have blocks of their own.
  const auto beside = [&](int tiles) {
    if (p.rows > 1) return 0;
    const int blocks = choices * ((row_tiles + tiles - 1) / tiles);
    const int each = (p.shared.row_tiles() + blocks - 1) / blocks;
    return tiles + each <= kRingSlots ? each : 0;
  };
  // Two blocks, or one and the next kernel's, are to fit on a multiprocessor.
  const int most_bytes = max_shared_bytes() / 2;
  const int blocks_each = std::max(1, most_blocks / choices);
  p.tiles = std::min((row_tiles + blocks_each - 1) / blocks_each, kRingSlots);
  while (p.tiles > 1 && bytes_of(1, p.tiles + beside(p.tiles)) > most_bytes) --p.tiles;
  p.blocks_of_a_choice = (row_tiles + p.tiles - 1) / p.tiles;
  int bytes = bytes_of(1, p.tiles + beside(p.tiles));
  p.shared_blocks = 0;
  p.shared_tiles = 0;
  if (beside(p.tiles) == 0) {
    p.shared_tiles = kRingSlots;
    while (p.shared_tiles > 1 && bytes_of(p.rows, p.shared_tiles) > std::max(bytes, most_bytes)) {
      --p.shared_tiles;
    }
    p.shared_blocks = (p.shared.row_tiles() + p.shared_tiles - 1) / p.shared_tiles;
    bytes = std::max(bytes, bytes_of(p.rows, p.shared_tiles));
  }
  if (bytes > max_shared_bytes()) return cudaErrorInvalidValue;
  const int choice_blocks = choices * p.blocks_of_a_choice;
  p.shared_each = p.shared_blocks > 0 ? 0 : p.shared.row_tiles() / choice_blocks;
  p.shared_longer = p.shared_blocks > 0 ? 0 : p.shared.row_tiles() % choice_blocks;
  p.row_tiles = p.routed.column_tiles() * 512U;
  p.row_scales = p.routed.groups() * 32U;
  p.expert_tiles = row_tiles * p.row_tiles;
  p.expert_scales = row_tiles * p.row_scales;
  if (int64_t{row_tiles} * p.row_tiles >= int64_t{1} << 32) return cudaErrorInvalidValue;
  p.of_blocks = reciprocal(p.blocks_of_a_choice);
  p.of_choices = reciprocal(p.shape.top_k);
  const int blocks = p.shared_blocks + choice_blocks;
  const auto kernel =
      p.rows == 1 ? gate_up_kernel<kGroup, kUnits, 1> : gate_up_kernel<kGroup, kUnits, kMaxDecodeRows>;
  return launch(kernel, {dim3(blocks), dim3(kGateUpThreads), static_cast<size_t>(bytes)}, stream, p);
}

}  // namespace

cudaError_t moe_gate_up_decode(const bf16* x, RmsNorm norm, const float* logits, Int4Experts gate_up,
                               Int4Matrix shared_gate_up, bf16* act, MoeShape shape, int rows,
                               cudaStream_t stream) {
  if (!are_valid(gate_up, shared_gate_up, shape, rows) || gate_up.k != shared_gate_up.k ||
      gate_up.n != 2 * shape.intermediate || shared_gate_up.n != 2 * shape.shared_intermediate) {
    return cudaErrorInvalidValue;
  }
  const GateUp p = {{x, norm}, logits, gate_up, shared_gate_up, act, shape, rows, 0, 0, 0, 0, 0, 0, 0, 0, 0,
                    0,         0,      0};
  const DecodeConfig config = decode_config(kMoeGateUp, gate_up.n, gate_up.k, gate_up.group);
  const int blocks = config.blocks_per_sm * multiprocessors();
  return with_slices(
      gate_up.group, gate_up.column_tiles(), p.input.least_columns(), [&](auto group, auto units) {
        return launch_gate_up<decltype(group)::value, decltype(units)::value>(p, blocks, stream);
      });
}

}  // namespace qwen::cuda
