// The experts of a decode step: gate-up with SwiGLU, then down with the weighted sum and the residual.
//
// Which experts they are is known when the router has finished, two kernels before moe_down_decode.
// moe_gate_up_decode lets its successor start only after its own wait, when the router's results are visible,
// so moe_down_decode may read the ids before it waits and has its weights on their way while gate-up
// computes.
#include "kernels/cuda/activation.cuh"
#include "kernels/linear/decode_kernel.cuh"
#include "kernels/moe/cuda.h"

namespace qwen::cuda {
namespace {

__device__ __forceinline__ Int4Matrix expert_matrix(Int4Matrix w, int expert) {
  w.tiles += static_cast<int64_t>(expert) * w.row_tiles() * w.column_tiles() * 32;
  w.scales += static_cast<int64_t>(expert) * w.row_tiles() * w.groups() * 8;
  return w;
}

constexpr int kMaxGateUpWarps = 8;

struct GateUp {
  const bf16* normed;  // [B, D]
  const int32_t* ids;  // [B, A]
  Int4Matrix routed;
  Int4Matrix shared;
  bf16* act;  // [B, A I + Is]
  MoeShape shape;
  int rows;
  int shared_blocks;       // the first ones; they take all rows
  int blocks_of_a_choice;  // the others: a choice of a row
};

template <int kGroup, int kRowTiles>
__global__ void __launch_bounds__(kMaxGateUpWarps * 32, kRowTiles == 1 ? 5 : 3)
    gate_up_kernel(GateUp p, UnitSplit split) {
  QWEN_DYNAMIC_SHARED(shared);
  const int warps = static_cast<int>(blockDim.x) / 32;
  const int thread = static_cast<int>(threadIdx.x);
  const bool is_shared = static_cast<int>(blockIdx.x) < p.shared_blocks;
  const int routed_block = static_cast<int>(blockIdx.x) - p.shared_blocks;
  const int choice = is_shared ? 0 : routed_block / p.blocks_of_a_choice;  // of all rows'
  const int row_tile =
      kRowTiles * (is_shared ? static_cast<int>(blockIdx.x) : routed_block % p.blocks_of_a_choice);
  const int rows = is_shared ? p.rows : 1;
  const int first_row = choice / p.shape.top_k;
  Int4Matrix w = is_shared ? p.shared : p.routed;
  const DecodeLayout layout(w.column_tiles(), kGroup, p.rows, warps, 0);
  const Activations x = {shared, reinterpret_cast<float4*>(shared + layout.sums), layout.row_bytes};
  unsigned char* weights = shared + layout.weights;

  const auto slice = WeightSlice<kGroup, kRowTiles>::of_warp(weights, split, thread / 32);
  if (is_shared) slice.copy(w, row_tile);
  wait_for_previous_kernel();
  if (!is_shared) {
    w = expert_matrix(w, p.ids[choice]);
    slice.copy(w, row_tile);
  }
  let_next_kernel_start();  // not before the wait: see above
  load_rows<kGroup>(x, p.normed + static_cast<int64_t>(first_row) * w.k, rows, w.k);
  slice.multiply_all(x, rows);
  __syncthreads();

  const int width = p.shape.top_k * p.shape.intermediate + p.shape.shared_intermediate;
  const int first_column = (is_shared ? p.shape.top_k : choice % p.shape.top_k) * p.shape.intermediate;
  for (int i = thread; i < kRowTiles * rows * 8; i += static_cast<int>(blockDim.x)) {
    const int tile = i / 8 % kRowTiles;
    const int row = i / (8 * kRowTiles);
    if (row_tile + tile >= w.row_tiles()) continue;
    const float gate = sum_over_warps<kGroup, kRowTiles>(weights, split, rows, tile, row, i % 8);
    const float up = sum_over_warps<kGroup, kRowTiles>(weights, split, rows, tile, row, i % 8 + 8);
    p.act[static_cast<int64_t>(first_row + row) * width + first_column + (row_tile + tile) * 8 + i % 8] =
        __float2bfloat16(silu(gate) * up);
  }
}

template <int kGroup, int kRowTiles>
cudaError_t launch_gate_up(GateUp p, int warps, cudaStream_t stream) {
  using Slice = WeightSlice<kGroup, kRowTiles>;
  const DecodeLayout layout(p.routed.column_tiles(), kGroup, p.rows, warps, 0);
  const UnitSplit split = split_columns<kGroup>(p.routed, warps);
  const int bytes = layout.weights + split.shares * split.each * Slice::kUnitBytes;
  if (bytes > max_shared_bytes() || warps > kMaxGateUpWarps) {
    if constexpr (kRowTiles > 1) return launch_gate_up<kGroup, 1>(p, warps, stream);
    return cudaErrorInvalidValue;
  }
  p.shared_blocks = (p.shared.row_tiles() + kRowTiles - 1) / kRowTiles;
  p.blocks_of_a_choice = (p.routed.row_tiles() + kRowTiles - 1) / kRowTiles;
  const int blocks = p.shared_blocks + p.rows * p.shape.top_k * p.blocks_of_a_choice;
  return launch(gate_up_kernel<kGroup, kRowTiles>,
                {dim3(blocks), dim3(warps * 32), static_cast<size_t>(bytes)}, stream, p, split);
}

constexpr int kMaxDownWarps = 18;

struct Down {
  const bf16* act;       // [B, A I + Is]
  const int32_t* ids;    // [B, A]
  const float* weights;  // [B, A + 1]
  Int4Matrix routed;
  Int4Matrix shared;
  const bf16* residual;  // [B, D]
  bf16* y;               // [B, D]
  MoeShape shape;
  int parts;  // along K that a choice is split into
  int slots;  // parts that a warp has on their way at once: 1 or 2
};

// Offsets into the shared memory of moe_down's blocks.
struct DownLayout {
  int choice_tiles;  // column tiles of a routed choice's activations
  int sums;
  int partial;
  int weights;
  int slot_bytes;
  int row_bytes;

  __host__ __device__ DownLayout(const Down& p, int warps, int slot_bytes) : slot_bytes(slot_bytes) {
    choice_tiles = p.routed.column_tiles();
    const int tiles = p.shape.top_k * choice_tiles + p.shared.column_tiles();
    row_bytes = Activations::bytes_of_row(tiles);
    sums = row_bytes;
    partial = sums + Activations::bytes_of_sums(tiles, p.routed.group);
    weights = partial + warps * 16 * 4;
  }
};

// The activations of one row, each choice's up to whole tiles. Ends with a barrier.
template <int kGroup>
__device__ void load_choices(const Activations& to, const Down& p, const bf16* act) {
  const int each = p.routed.column_tiles() * 8;  // chunks, padded
  const int real = p.shape.intermediate / 8;
  const int routed = p.shape.top_k * each;
  const int chunks = routed + p.shared.column_tiles() * 8;
#pragma unroll 1
  for (int base = 0; base < chunks; base += static_cast<int>(blockDim.x)) {
    const int chunk = base + static_cast<int>(threadIdx.x);
    const int choice = min(chunk / each, p.shape.top_k);
    const int within = chunk - choice * each;
    uint4 v = make_uint4(0, 0, 0, 0);
    if (within < (choice < p.shape.top_k ? real : p.shape.shared_intermediate / 8)) {
      v = reinterpret_cast<const uint4*>(act)[choice * real + within];
    }
    store_columns<kGroup>(to, 0, chunk, v, chunk < chunks);
  }
  __syncthreads();
}

// Block (tile row, row of the step): its warps take the parts of the choices round-robin.
template <int kGroup>
__global__ void __launch_bounds__(kMaxDownWarps * 32, kGroup == 128 ? 1 : 2)
    down_kernel(Down p, UnitSplit routed_split, UnitSplit shared_split) {
  using Slice = WeightSlice<kGroup, 1>;
  QWEN_DYNAMIC_SHARED(shared);
  const int warps = static_cast<int>(blockDim.x) / 32;
  const int thread = static_cast<int>(threadIdx.x);
  const int warp = thread / 32;
  const int top_k = p.shape.top_k;
  const int row_tile = static_cast<int>(blockIdx.x);
  const int64_t row = blockIdx.y;
  const int shares = (top_k + 1) * p.parts;
  const DownLayout layout(p, warps, max(routed_split.each, shared_split.each) * Slice::kUnitBytes);
  const Activations x = {shared, reinterpret_cast<float4*>(shared + layout.sums), layout.row_bytes};
  float* partial = reinterpret_cast<float*>(shared + layout.partial);

  const auto slice_of = [&](int share, int turn) {
    unsigned char* slot = shared + layout.weights + (warp * p.slots + turn % p.slots) * layout.slot_bytes;
    return Slice::share(slot, share / p.parts < top_k ? routed_split : shared_split, share % p.parts);
  };
  const auto copy = [&](int share, int turn) {
    if (share < shares) {
      const int choice = share / p.parts;
      const Int4Matrix w =
          choice < top_k ? expert_matrix(p.routed, __ldcg(p.ids + row * top_k + choice)) : p.shared;
      const Slice slice = slice_of(share, turn);
#pragma unroll 1
      for (int unit = 0; unit < slice.units; ++unit) slice.copy_unit(w, row_tile, unit);
    }
    copy_async_commit();
  };
  for (int turn = 0; turn < p.slots; ++turn) copy(warp + turn * warps, turn);
  wait_for_previous_kernel();
  let_next_kernel_start();

  const int out = row_tile * 16 + thread;
  const bool has_output = thread < 16 && out < p.routed.n;
  const float before = has_output ? __bfloat162float(p.residual[row * p.routed.n + out]) : 0.0F;
  load_choices<kGroup>(x, p, p.act + row * (top_k * p.shape.intermediate + p.shape.shared_intermediate));
  float total[2] = {};  // rows r and r + 8, in the lanes of the product's first column
#pragma unroll 1
  for (int share = warp, turn = 0; share < shares; share += warps, ++turn) {
    const int choice = share / p.parts;
    const float weight = p.weights[row * (top_k + 1) + choice];
    const Slice slice = slice_of(share, turn);
    if (p.slots == 1) {
      copy_async_wait<0>();
    } else {
      copy_async_wait<1>();
    }
    __syncwarp();
    float acc[1][4] = {};
#pragma unroll 1
    for (int unit = 0; unit < slice.units; ++unit) {
      slice.multiply(acc, x, 1, unit,
                     choice * layout.choice_tiles + (slice.first_unit + unit) * Unit<kGroup>::kTiles);
    }
    total[0] += weight * acc[0][0];
    total[1] += weight * acc[0][2];
    __syncwarp();
    copy(share + p.slots * warps, turn + p.slots);
  }
  const int lane = thread % 32;
  if (lane % 4 == 0) {
    partial[warp * 16 + lane / 4] = total[0];
    partial[warp * 16 + lane / 4 + 8] = total[1];
  }
  __syncthreads();
  if (!has_output) return;
  float sum = 0;
  for (int i = 0; i < warps; ++i) sum += partial[i * 16 + thread];
  p.y[row * p.routed.n + out] = __float2bfloat16(before + sum);
}

template <int kGroup>
cudaError_t launch_down(Down p, int rows, cudaStream_t stream) {
  using Slice = WeightSlice<kGroup, 1>;
  const int choices = p.shape.top_k + 1;
  p.parts = decode_config(kMoeDown, p.routed.n, p.routed.k, kGroup).warps;
  if (p.parts * choices > kMaxDownWarps) p.parts = 1;
  const int turns = (p.parts * choices + kMaxDownWarps - 1) / kMaxDownWarps;
  const int warps = (p.parts * choices + turns - 1) / turns;
  p.slots = std::min(turns, 2);
  const UnitSplit routed_split = split_columns<kGroup>(p.routed, p.parts);
  const UnitSplit shared_split = split_columns<kGroup>(p.shared, p.parts);
  const DownLayout layout(p, warps, std::max(routed_split.each, shared_split.each) * Slice::kUnitBytes);
  const int bytes = layout.weights + warps * p.slots * layout.slot_bytes;
  if (bytes > max_shared_bytes()) return cudaErrorInvalidValue;
  return launch(down_kernel<kGroup>,
                {dim3(p.routed.row_tiles(), rows), dim3(warps * 32), static_cast<size_t>(bytes)}, stream, p,
                routed_split, shared_split);
}

bool valid(const Int4Matrix& routed, const Int4Matrix& shared, const MoeShape& shape, int rows) {
  return rows >= 1 && rows <= kMaxDecodeRows && routed.is_valid() && shared.is_valid() &&
         routed.group == shared.group && shape.top_k >= 1 && shape.top_k <= kMaxChoices &&
         shape.intermediate % 8 == 0 && shape.shared_intermediate % 8 == 0;
}

}  // namespace

cudaError_t moe_gate_up_decode(const bf16* normed, const int32_t* ids, Int4Experts gate_up,
                               Int4Matrix shared_gate_up, bf16* act, MoeShape shape, int rows,
                               cudaStream_t stream) {
  if (!valid(gate_up, shared_gate_up, shape, rows) || gate_up.k != shared_gate_up.k ||
      gate_up.n != 2 * shape.intermediate || shared_gate_up.n != 2 * shape.shared_intermediate) {
    return cudaErrorInvalidValue;
  }
  const GateUp p = {normed, ids, gate_up, shared_gate_up, act, shape, rows, 0, 0};
  const DecodeConfig config = decode_config(kMoeGateUp, gate_up.n, gate_up.k, gate_up.group);
  const auto with_group = [&](auto group) {
    constexpr int kGroup = decltype(group)::value;
    return config.row_tiles == 1 ? launch_gate_up<kGroup, 1>(p, config.warps, stream)
                                 : launch_gate_up<kGroup, 2>(p, config.warps, stream);
  };
  switch (gate_up.group) {
    case 32:
      return with_group(std::integral_constant<int, 32>());
    case 64:
      return with_group(std::integral_constant<int, 64>());
    case 128:
      return with_group(std::integral_constant<int, 128>());
    default:
      return cudaErrorInvalidValue;
  }
}

cudaError_t moe_down_decode(const bf16* act, const int32_t* ids, const float* weights, Int4Experts down,
                            Int4Matrix shared_down, const bf16* residual, bf16* y, MoeShape shape, int rows,
                            cudaStream_t stream) {
  if (!valid(down, shared_down, shape, rows) || down.n != shared_down.n || down.k != shape.intermediate ||
      shared_down.k != shape.shared_intermediate) {
    return cudaErrorInvalidValue;
  }
  const Down p = {act, ids, weights, down, shared_down, residual, y, shape, 1, 1};
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
