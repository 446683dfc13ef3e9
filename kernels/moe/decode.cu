// The experts of a decode step: gate-up with SwiGLU, then down with the weighted sum and the residual.
//
// Both choose the experts from the router's logits, each block for itself: by a kernel of its own that would
// cost a token one more wait. moe_gate_up_decode lets its successor start only after its own wait, when the
// logits are visible, so moe_down_decode may read them before it waits and has its weights on their way while
// gate-up computes.
#include "kernels/cuda/activation.cuh"
#include "kernels/linear/decode_kernel.cuh"
#include "kernels/moe/choice.cuh"
#include "kernels/moe/cuda.h"

namespace qwen::cuda {
namespace {

__device__ __forceinline__ Int4Matrix expert_matrix(Int4Matrix w, int expert) {
  w.tiles += static_cast<int64_t>(expert) * w.row_tiles() * w.column_tiles() * 32;
  w.scales += static_cast<int64_t>(expert) * w.row_tiles() * w.groups() * 8;
  return w;
}

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
};

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
    const int choice_of_all = choices_block / p.blocks_of_a_choice;
    rows = is_shared ? p.rows : 1;
    first_row = choice_of_all / p.shape.top_k;
    choice = choice_of_all % p.shape.top_k;
    first_tile = choices_block % p.blocks_of_a_choice * p.tiles;
    tiles = is_shared ? 0 : min(p.tiles, p.routed.row_tiles() - first_tile);
    const int all = p.shared.row_tiles();
    const int blocks = p.shape.top_k * p.blocks_of_a_choice;
    if (is_shared) {
      first_shared = block * p.shared_tiles;
      shared_tiles = min(p.shared_tiles, all - first_shared);
    } else {
      first_shared = p.shared_blocks > 0 ? 0 : block * all / blocks;
      shared_tiles = p.shared_blocks > 0 ? 0 : (block + 1) * all / blocks - first_shared;
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
    sums = squares + rows * kMaxDecodeWarps * 4;
    slices = sums + tiles * rows * 16 * kSumStride * 4;
    items = slices + kMaxDecodeWarps * S::row_bytes(rows);
    bytes = items + tiles * kMaxDecodeWarps * S::kItemBytes;
  }
};

constexpr int kGateUpThreads = (kMaxDecodeWarps + 1) * 32;

// The last warp chooses while the others read x. Wider slices than the model's take the registers of two
// blocks.
template <int kGroup, int kUnits, int kMaxRows>
__global__ void __launch_bounds__(kGateUpThreads, Slice<kGroup, kUnits>::kColumns > 128 ? 1 : 2)
    gate_up_kernel(GateUp p) {
  using S = Slice<kGroup, kUnits>;
  QWEN_DYNAMIC_SHARED(shared);
  const int lane = static_cast<int>(threadIdx.x % 32);
  const int warp = static_cast<int>(threadIdx.x / 32);
  const bool chooses = warp == kMaxDecodeWarps;
  const GateUpShare share(p, static_cast<int>(blockIdx.x));
  const int rows = kMaxRows == 1 ? 1 : share.rows;
  const int tiles = share.shared_tiles + share.tiles;
  const GateUpLayout<kGroup, kUnits> layout(rows, tiles);
  const int k = p.routed.k;
  const int first_column = warp * S::kColumns;
  int* expert = reinterpret_cast<int*>(shared);
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

  Fragments<kGroup, kUnits, kMaxRows> x;
  if (!chooses) {
    load_slice<kGroup, kUnits, true, kMaxRows>(slice, squares, input, norm_weights, first_column, rows, k);
    x.read(slice, rows);
  } else if (share.tiles > 0) {
    const int experts = p.shape.experts;
    const uint32_t own =
        choose_experts(p.logits + share.first_row * (experts + 1), experts, share.choice + 1);
    if (lane == share.choice) *expert = expert_of(own);
  }
  __syncthreads();

  if (chooses) {
    if (lane < rows) factors[lane] = norm_factor(input, squares + lane * kMaxDecodeWarps, k);
  } else {
    if (share.tiles > 0) source.advance(p.routed, *expert * p.routed.row_tiles());
    unsigned char* to = shared + routed_items;
#pragma unroll 1
    for (int i = 0; i < share.tiles; ++i) {
      source.copy(to);
      copy_async_commit();
      source.advance(p.routed, 1);
      to += S::kItemBytes;
    }
#pragma unroll 1
    for (int i = tiles; i < kRingSlots; ++i) copy_async_commit();  // of nothing: the waits count
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

  // A warp has two tile rows of one row of x.
  constexpr int kPairs = kRingSlots / 2;
  const int width = p.shape.top_k * p.shape.intermediate + p.shape.shared_intermediate;
#pragma unroll 1
  for (int part = warp; part < rows * kPairs; part += kMaxDecodeWarps + 1) {
    const int row = part / kPairs;
    const int tile = part % kPairs * 2 + lane / 16;
    const int out = lane % 16;
    const float* of_warps = sums + ((min(tile, tiles - 1) * rows + row) * 16 + out) * kSumStride;
    const float sum = sum_over_warps(of_warps) * factors[row];
    const float up = __shfl_down_sync(~0U, sum, 8);
    if (tile >= tiles || out >= 8) continue;
    const bool is_shared = tile < share.shared_tiles;
    const int choice = is_shared ? p.shape.top_k : share.choice;
    const int tile_row = is_shared ? share.first_shared + tile : share.first_tile + tile - share.shared_tiles;
    p.act[(share.first_row + row) * width + choice * p.shape.intermediate + tile_row * 8 + out] =
        __float2bfloat16(silu(sum) * up);
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
  const int blocks = p.shared_blocks + choices * p.blocks_of_a_choice;
  const auto kernel =
      p.rows == 1 ? gate_up_kernel<kGroup, kUnits, 1> : gate_up_kernel<kGroup, kUnits, kMaxDecodeRows>;
  return launch(kernel, {dim3(blocks), dim3(kGateUpThreads), static_cast<size_t>(bytes)}, stream, p);
}

// Down's units: 128 columns of a choice, those of the chosen experts first. A warp takes two at a time.
// Behind the shared expert's last unit are units
// that are all zeros.
constexpr int kDownColumns = 128;
constexpr int kDownSlots = 3;  // pairs of units of a warp on their way
constexpr int kMaxDownWarps = 18;

struct Down {
  const bf16* act;      // [B, A I + Is]
  const float* logits;  // [B, E + 1]
  Int4Matrix routed;
  Int4Matrix shared;
  const bf16* residual;  // [B, D]
  bf16* y;               // [B, D]
  MoeShape shape;
  int parts;          // units of a chosen expert
  uint32_t of_parts;  // 2^20 / parts, rounded up
  int warps;
  int turns;  // pairs of units of a warp
  int slots;

  // Exact where (A + 1) parts^2 is below 2^20.
  __device__ int choice_of(int unit) const {
    return min(static_cast<int>(unit * of_parts >> 20), shape.top_k);
  }
  __device__ int column_of(int unit) const { return (unit - choice_of(unit) * parts) * kDownColumns; }
};

// The activations of a pair of units, as two rows.
struct PairInput {
  const bf16* act;
  int first[2];    // column of each
  int columns[2];  // that there are from there on

  static constexpr bool kNorm = false;
  struct Weights {};
  using Raw = Bf16Four;

  __device__ Raw load(int unit, int column, int /*k*/) const {
    if (column >= (unit == 0 ? columns[0] : columns[1])) return {};
    return Raw::read(act + ((unit == 0 ? first[0] : first[1]) + column));
  }
  __device__ Four finish(const Raw& raw, const Weights& /*weights*/, float& /*square*/) const {
    return raw.widen();
  }
};

template <int kGroup>
struct DownLayout {
  static constexpr int kUnits = kDownColumns / Unit<kGroup>::kColumns;
  using S = Slice<kGroup, kUnits>;

  int weights;  // float [kMaxChoices + 1], behind as many experts
  int partial;  // float [warps, 16]
  int slices;   // of act
  int items;
  int bytes;

  __host__ __device__ explicit DownLayout(const Down& p) {
    weights = 4 * kMaxChoices;
    partial = weights + 4 * kMaxChoices + 16;
    slices = partial + p.warps * 64;
    items = slices + p.warps * S::row_bytes(2);
    bytes = items + p.warps * p.slots * 2 * S::kItemBytes;
  }
};

// Block (tile row, row of the step).
template <int kGroup>
__global__ void __launch_bounds__(kMaxDownWarps * 32, 2) down_kernel(Down p) {
  using Layout = DownLayout<kGroup>;
  using S = typename Layout::S;
  QWEN_DYNAMIC_SHARED(shared);
  let_next_kernel_start();
  const Layout layout(p);
  const int thread = static_cast<int>(threadIdx.x);
  const int lane = static_cast<int>(threadIdx.x % 32);
  const int warp = static_cast<int>(threadIdx.x / 32);
  const int top_k = p.shape.top_k;
  const int row_tile = static_cast<int>(blockIdx.x);
  const int row = static_cast<int>(blockIdx.y);
  int* experts = reinterpret_cast<int*>(shared);
  float* weights = reinterpret_cast<float*>(shared + layout.weights);
  float* partial = reinterpret_cast<float*>(shared + layout.partial);
  unsigned char* slice = shared + layout.slices + warp * S::row_bytes(2);
  unsigned char* items = shared + layout.items + warp * p.slots * 2 * S::kItemBytes;

  if (warp == 0) {
    const float* logits = p.logits + row * (p.shape.experts + 1);
    const float gate = __ldcg(logits + p.shape.experts);
    const uint32_t own = choose_experts(logits, p.shape.experts, top_k);
    const float weight = choice_weight(own, top_k);
    if (lane < top_k) {
      experts[lane] = expert_of(own);
      weights[lane] = weight;
    }
    if (lane == 0) weights[top_k] = shared_weight(gate);
  }
  __syncthreads();
  const auto copy = [&](int turn, unsigned char* slot) {
    if (turn < p.turns) {
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        const int unit = (turn * p.warps + warp) * 2 + i;
        const int choice = p.choice_of(unit);
        const Int4Matrix w = choice < top_k ? expert_matrix(p.routed, experts[choice]) : p.shared;
        copy_item<kGroup, Layout::kUnits>(slot + i * S::kItemBytes, w, row_tile, p.column_of(unit));
      }
    }
    copy_async_commit();
  };
#pragma unroll 1
  for (int i = 0; i < kDownSlots; ++i) copy(i, items + i * 2 * S::kItemBytes);
  const auto input_of = [&](int turn) {
    PairInput input = {p.act, {}, {}};
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const int unit = (turn * p.warps + warp) * 2 + i;
      const int choice = p.choice_of(unit);
      const int column = p.column_of(unit);
      const int width = top_k * p.shape.intermediate + p.shape.shared_intermediate;
      input.first[i] = row * width + choice * p.shape.intermediate + column;
      input.columns[i] = (choice < top_k ? p.routed.k : p.shared.k) - column;
    }
    return input;
  };
  const auto weight_of = [&](int turn) {
    return weights[p.choice_of((turn * p.warps + warp) * 2 + lane % 2)];
  };
  PairInput input = input_of(0);
  float weight = weight_of(0);
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    settle(input.first[i]);
    settle(input.columns[i]);
  }
  settle(weight);
  wait_for_previous_kernel();

  const int out = row_tile * 16 + thread;
  const bool has_output = thread < 16 && out < p.routed.n;
  bf16 before = {};  // as it is until the end: nothing waits for it
  if (has_output) before = p.residual[row * p.routed.n + out];

  const PairInput::Weights no_weights[S::kOfLane] = {};
  float total[2] = {};  // rows r and r + 8; lanes with q = 0 have the first units', q = 1 the second's
  int slot = 0;
#pragma unroll 1
  for (int turn = 0; turn < p.turns; ++turn) {
    load_slice<kGroup, Layout::kUnits, true, 2>(slice, nullptr, input, no_weights, 0, 2, kDownColumns);
    Fragments<kGroup, Layout::kUnits, 2> x;
    x.read(slice, 2);
    copy_async_wait<kDownSlots - 1>();
    __syncwarp();
    unsigned char* pair = items + slot * 2 * S::kItemBytes;
    TileSums of[2];
    x.multiply(of, {pair, pair + S::kItemBytes});
    total[0] += weight * (lane % 2 == 0 ? of[0].of[0][0] : of[1].of[0][0]);
    total[1] += weight * (lane % 2 == 0 ? of[0].of[0][1] : of[1].of[0][1]);
    __syncwarp();
    copy(turn + kDownSlots, pair);
    if (turn + 1 < p.turns) {
      input = input_of(turn + 1);
      weight = weight_of(turn + 1);
    }
    slot = slot + 1 == p.slots ? 0 : slot + 1;
  }
#pragma unroll
  for (int i = 0; i < 2; ++i) total[i] += __shfl_xor_sync(~0U, total[i], 1);
  if (lane % 4 == 0) {
    partial[warp * 16 + lane / 4] = total[0];
    partial[warp * 16 + lane / 4 + 8] = total[1];
  }
  __syncthreads();
  if (!has_output) return;
  float sum = 0;
#pragma unroll
  for (int i = 0; i < kMaxDownWarps; ++i) sum += i < p.warps ? partial[i * 16 + thread] : 0.0F;
  p.y[row * p.routed.n + out] = __float2bfloat16(__bfloat162float(before) + sum);
}

template <int kGroup>
cudaError_t launch_down(Down p, int rows, cudaStream_t stream) {
  const auto parts_of = [](const Int4Matrix& w) { return (w.k + kDownColumns - 1) / kDownColumns; };
  p.parts = parts_of(p.routed);
  if (static_cast<int64_t>(p.shape.top_k + 2) * p.parts * p.parts >= 1 << 20) return cudaErrorInvalidValue;
  p.of_parts = static_cast<uint32_t>(((1 << 20) + p.parts - 1) / p.parts);
  const int pairs = (p.shape.top_k * p.parts + parts_of(p.shared) + 1) / 2;
  p.turns = (pairs + kMaxDownWarps - 1) / kMaxDownWarps;
  p.warps = (pairs + p.turns - 1) / p.turns;
  p.slots = std::min(p.turns, kDownSlots);
  const int bytes = DownLayout<kGroup>(p).bytes;
  if (bytes > max_shared_bytes()) return cudaErrorInvalidValue;
  return launch(down_kernel<kGroup>,
                {dim3(p.routed.row_tiles(), rows), dim3(p.warps * 32), static_cast<size_t>(bytes)}, stream,
                p);
}

bool valid(const Int4Matrix& routed, const Int4Matrix& shared, const MoeShape& shape, int rows) {
  return rows >= 1 && rows <= kMaxDecodeRows && routed.is_valid() && shared.is_valid() &&
         routed.group == shared.group && shape.experts <= kMaxExperts && shape.top_k >= 1 &&
         shape.top_k <= std::min(kMaxChoices, shape.experts) && shape.intermediate % 8 == 0 &&
         shape.shared_intermediate % 8 == 0;
}

}  // namespace

cudaError_t moe_gate_up_decode(const bf16* x, RmsNorm norm, const float* logits, Int4Experts gate_up,
                               Int4Matrix shared_gate_up, bf16* act, MoeShape shape, int rows,
                               cudaStream_t stream) {
  if (!valid(gate_up, shared_gate_up, shape, rows) || gate_up.k != shared_gate_up.k ||
      gate_up.n != 2 * shape.intermediate || shared_gate_up.n != 2 * shape.shared_intermediate) {
    return cudaErrorInvalidValue;
  }
  const GateUp p = {{x, norm}, logits, gate_up, shared_gate_up, act, shape, rows, 0, 0, 0, 0};
  const DecodeConfig config = decode_config(kMoeGateUp, gate_up.n, gate_up.k, gate_up.group);
  const int blocks = config.blocks_per_sm * multiprocessors();
  return with_slices(
      gate_up.group, gate_up.column_tiles(), p.input.least_columns(), [&](auto group, auto units) {
        return launch_gate_up<decltype(group)::value, decltype(units)::value>(p, blocks, stream);
      });
}

cudaError_t moe_down_decode(const bf16* act, const float* logits, Int4Experts down, Int4Matrix shared_down,
                            const bf16* residual, bf16* y, MoeShape shape, int rows, cudaStream_t stream) {
  if (!valid(down, shared_down, shape, rows) || down.n != shared_down.n || down.k != shape.intermediate ||
      shared_down.k != shape.shared_intermediate) {
    return cudaErrorInvalidValue;
  }
  const Down p = {act, logits, down, shared_down, residual, y, shape, 1, 1, 1, 1, 1};
  switch (down.group) {
    case 32:
      return launch_down<32>(p, rows, stream);
    case 64:
      return launch_down<64>(p, rows, stream);
    case 128:
      return launch_down<128>(p, rows, stream);
    default:
      return cudaErrorInvalidValue;
  }
}

}  // namespace qwen::cuda
