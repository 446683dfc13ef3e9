// The decode kernel of one matrix: an input that a warp's slice of x goes through, the product, an output
// that takes its elements.
//
// An Input's weights(column, k) are what it needs but x for four columns, two from `column` and those 16
// further, read before wait_for_previous_kernel(); load(row, column, k) reads x there, finish() makes of both
// what is multiplied. least_columns() must lie in one slice.
//
// An Output's begin(row, out) reads what it will need for an element and no kernel writes, before
// wait_for_previous_kernel(); prepare() reads the rest after it; store(row, out, sum, prepared) writes the
// element. `out` counts the int4 matrix's rows, then, where kExtra, those of bfloat16 rows `extra`.
//
// The kernels let their successors start right after they have waited for their predecessors. Sooner would
// have the successor's weights on their way when the predecessor ends, and a kernel that ends is not over
// before the loads in flight beside it are: on an H200 that costs 1.5 us a kernel more than it saves.
#pragma once

#include <algorithm>
#include <type_traits>

#include "kernels/linear/decode_input.cuh"
#include "kernels/linear/decode_product.cuh"

namespace qwen::cuda {

// Items that a warp multiplies at once: a narrow one alone would wait for its own results.
template <int kGroup, int kUnits>
inline constexpr int kItemsAtOnce = Slice<kGroup, kUnits>::kColumns > 128 ? 1 : 2;
static_assert(kRingSlots % 2 == 0);

// How a block's work is laid out. Block b of `blocks` has the tile rows b, b + blocks, ..: `tiles` of them,
// or one more if b is less than `longer`.
struct DecodePlan {
  int blocks;
  int tiles;
  int longer;
  int slots;  // of a warp's ring: kRingSlots, or as many as a block has tile rows
  int batch;  // tile rows between two barriers
  // Offsets into the shared memory, behind the squares.
  int sums;    // of 2 or 1 batches
  int slices;  // of x
  int ring;
  int bytes;
};

template <int kGroup, int kUnits>
DecodePlan plan_decode(int row_tiles, int rows, int most_blocks) {
  using S = Slice<kGroup, kUnits>;
  DecodePlan plan = {};
  plan.batch = std::max(2, kRingSlots / rows / 2 * 2);
  plan.sums = rows * kDecodeWarps * 4;
  const auto lay_out = [&](int tiles) {
    plan.blocks = (row_tiles + tiles - 1) / tiles;
    plan.tiles = row_tiles / plan.blocks;
    plan.longer = row_tiles % plan.blocks;
    plan.slots = std::min(tiles, kRingSlots);
    const int buffers = tiles > plan.batch ? 2 : 1;
    plan.slices = plan.sums + buffers * std::min(plan.batch, tiles) * rows * 16 * kSumStride * 4;
    plan.ring = plan.slices + kDecodeWarps * S::row_bytes(rows);
    plan.bytes = plan.ring + plan.slots * kDecodeWarps * S::kItemBytes;
  };
  int tiles = (row_tiles + most_blocks - 1) / most_blocks;
  lay_out(tiles);
  // Less than a whole ring must hold all that a block has.
  for (tiles = std::min(tiles, kRingSlots); plan.bytes > max_shared_bytes() && tiles > 1;) lay_out(--tiles);
  return plan;
}

// The sums plus a residual, if there is one.
struct ResidualOutput {
  const bf16* residual;  // [B, N] or null
  bf16* y;               // [B, N]; may be residual
  int n;

  static constexpr bool kExtra = false;
  using Prepared = float;

  __device__ Prepared begin(int /*row*/, int /*out*/) const { return 0.0F; }
  __device__ void prepare(Prepared& before, int row, int out) const {
    if (residual != nullptr) before = __bfloat162float(residual[static_cast<int64_t>(row) * n + out]);
  }
  __device__ void store(int row, int out, float sum, Prepared before) const {
    y[static_cast<int64_t>(row) * n + out] = to_bf16(before + sum);
  }
};

// The factor of a row's norm, from the warps' squares.
template <typename Input>
__device__ __forceinline__ float norm_factor([[maybe_unused]] const Input& input,
                                             [[maybe_unused]] const float* squares, [[maybe_unused]] int k) {
  if constexpr (Input::kNorm) {
    return rsqrtf(sum_over_warps(squares) / static_cast<float>(k) + input.norm.eps);
  } else {
    return 1.0F;
  }
}

// Registers for two blocks an SM, so that the next kernel's can be there, where a slice leaves them.
template <int kGroup, int kUnits>
inline constexpr int kDecodeBlocks = Slice<kGroup, kUnits>::kColumns > 256 ? 1 : 2;

template <int kGroup, int kUnits, int kMaxRows, typename Input, typename Output>
__global__ void __launch_bounds__(kDecodeWarps * 32, kDecodeBlocks<kGroup, kUnits>)
    decode_kernel(Input input, Int4Matrix w, Output output, int given_rows, DecodePlan plan) {
  using S = Slice<kGroup, kUnits>;
  QWEN_DYNAMIC_SHARED(shared);
  const int rows = kMaxRows == 1 ? 1 : given_rows;
  const int thread = static_cast<int>(threadIdx.x);
  const int warp = thread / 32;
  const int first_column = warp * S::kColumns;
  float* squares = reinterpret_cast<float*>(shared);  // [rows, kDecodeWarps]
  unsigned char* slice = shared + plan.slices + warp * S::row_bytes(rows);
  const bool extra = Output::kExtra && static_cast<int>(blockIdx.x) >= plan.blocks;
  const int block = static_cast<int>(blockIdx.x) - (extra ? plan.blocks : 0);
  const int first_out = extra ? w.n : 0;
  int outs = w.n;
  if constexpr (Output::kExtra) outs = extra ? output.extra.n : w.n;
  const int tiles = extra ? 1 : plan.tiles + (block < plan.longer ? 1 : 0);
  unsigned char* ring = shared + plan.ring + warp * plan.slots * S::kItemBytes;

  if constexpr (Output::kExtra) {
    if (extra) {
      ring = shared + plan.ring + warp * S::kBf16Bytes;
      copy_item<kGroup, kUnits>(ring, output.extra, block, first_column);
    }
  }
  // Items are copied as they are multiplied: kAtOnce in a group.
  constexpr int kAtOnce = kItemsAtOnce<kGroup, kUnits>;
  constexpr int kCopyGroups = kRingSlots / kAtOnce;
  ItemSource<kGroup, kUnits> source(w, extra ? 0 : block, first_column);
  int to_copy = extra ? 0 : tiles;
  const auto copy_next = [&](unsigned char* slot) {
    if (to_copy <= 0) return;
    source.copy(slot);
    source.advance(w, plan.blocks);
    --to_copy;
  };
#pragma unroll 1
  for (int i = 0; i < kCopyGroups; ++i) {
#pragma unroll
    for (int j = 0; j < kAtOnce; ++j) copy_next(ring + (i * kAtOnce + j) * S::kItemBytes);
    copy_async_commit();
  }
  typename Input::Weights weights[S::kOfLane];
#pragma unroll
  for (int i = 0; i < S::kOfLane; ++i) weights[i] = input.weights(first_column + S::column_of_lane(i), w.k);

  // Element i of a batch whose tile rows begin with `tile`.
  const auto element = [&](int tile, int i, int& row, int& out) {
    if (i >= min(plan.batch, tiles - tile) * rows * 16) return false;
    row = i / 16 % rows;
    out = (block + (tile + i / 16 / rows) * plan.blocks) * 16 + i % 16;
    return out < outs;
  };
  int row = 0;
  int out = 0;
  typename Output::Prepared prepared = {};
  const bool has_element = element(0, thread, row, out);
  if (has_element) prepared = output.begin(row, first_out + out);
  wait_for_previous_kernel();
  let_next_kernel_start();

  if (has_element) output.prepare(prepared, row, first_out + out);
  const auto take_batch = [&](const float* sums, int tile, int count) {
    __syncthreads();
    for (int i = thread; i < count * rows * 16; i += static_cast<int>(blockDim.x)) {
      if (!element(tile, i, row, out)) continue;
      if (tile > 0 || i != thread) {
        prepared = output.begin(row, first_out + out);
        output.prepare(prepared, row, first_out + out);
      }
      const float sum = sum_over_warps(sums + i * kSumStride);
      const float factor = norm_factor(input, squares + row * kDecodeWarps, w.k);
      output.store(row, first_out + out, sum * factor, prepared);
    }
  };
  float* all_sums = reinterpret_cast<float*>(shared + plan.sums);
  if constexpr (Output::kExtra) {
    if (extra) {
      load_slice<kGroup, kUnits, false, kMaxRows>(slice, squares, input, weights, first_column, rows, w.k);
      copy_async_wait<0>();
      __syncwarp();
      store_sums(all_sums, multiply_bf16<kGroup, kUnits>(slice, ring, rows), rows);
      take_batch(all_sums, 0, 1);
      return;
    }
  }
  load_slice<kGroup, kUnits, true, kMaxRows>(slice, squares, input, weights, first_column, rows, w.k);
  Fragments<kGroup, kUnits, kMaxRows> x;
  x.read(slice, rows);

  int slot = 0;
  int buffer = 0;
#pragma unroll 1
  for (int tile = 0; tile < tiles; tile += plan.batch) {
    float* sums = all_sums + buffer * plan.batch * rows * 16 * kSumStride;
    const int count = min(plan.batch, tiles - tile);
#pragma unroll 1
    for (int i = 0; i < count; i += kAtOnce) {
      copy_async_wait<kCopyGroups - 1>();
      __syncwarp();
      TileSums of[kAtOnce];
      const unsigned char* items[kAtOnce];
#pragma unroll
      for (int j = 0; j < kAtOnce; ++j) {
        // Of an item past the last one nothing is used.
        items[j] = ring + min(slot + j, plan.slots - 1) * S::kItemBytes;
      }
      x.multiply(of, items);
      __syncwarp();
#pragma unroll
      for (int j = 0; j < kAtOnce; ++j) {
        if (i + j < count) store_sums(sums + (i + j) * rows * 16 * kSumStride, of[j], rows);
      }
      if (to_copy > 0) {
#pragma unroll
        for (int j = 0; j < kAtOnce; ++j) copy_next(ring + (slot + j) * S::kItemBytes);
      }
      copy_async_commit();
      slot = slot + kAtOnce >= plan.slots ? 0 : slot + kAtOnce;
    }
    take_batch(sums, tile, count);
    buffer ^= 1;
  }
}

template <int kGroup, int kUnits, int kMaxRows, typename Input, typename Output>
cudaError_t launch_decode_slices(const Input& input, const Int4Matrix& w, const Output& output, int rows,
                                 int blocks, cudaStream_t stream) {
  using S = Slice<kGroup, kUnits>;
  int extra_blocks = 0;
  if constexpr (Output::kExtra) extra_blocks = output.extra.row_tiles();
  DecodePlan plan = plan_decode<kGroup, kUnits>(w.row_tiles(), rows, std::max(blocks - extra_blocks, 1));
  if constexpr (Output::kExtra) plan.bytes = std::max(plan.bytes, plan.ring + kDecodeWarps * S::kBf16Bytes);
  if (plan.bytes > max_shared_bytes()) return cudaErrorInvalidValue;
  return launch(decode_kernel<kGroup, kUnits, kMaxRows, Input, Output>,
                {dim3(plan.blocks + extra_blocks), dim3(kDecodeWarps * 32), static_cast<size_t>(plan.bytes)},
                stream, input, w, output, rows, plan);
}

inline constexpr int kMaxSliceColumns = 512;

// The units of a warp for `units` of them in all: 1, 2, 4 or 8, and at least `least_columns`; 0 where a slice
// would be too wide.
template <int kGroup>
int units_of_warp(int units, int least_columns) {
  int each = 1;
  while (each * kDecodeWarps < units || each * Unit<kGroup>::kColumns < least_columns) each *= 2;
  return each * Unit<kGroup>::kColumns <= kMaxSliceColumns ? each : 0;
}

// with(integral_constant group, integral_constant units).
template <typename With>
cudaError_t with_slices(int group, int column_tiles, int least_columns, const With& with) {
  const auto with_group = [&]<int kGroup>() {
    const int units = column_tiles / Unit<kGroup>::kTiles;
    const auto with_units = [&]<int kUnits>() {
      return with(std::integral_constant<int, kGroup>(), std::integral_constant<int, kUnits>());
    };
    switch (units_of_warp<kGroup>(units, least_columns)) {
      case 1:
        return with_units.template operator()<1>();
      case 2:
        return with_units.template operator()<2>();
      case 4:
        return with_units.template operator()<4>();
      case 8:
        if constexpr (kGroup <= 64) return with_units.template operator()<8>();
        return cudaErrorInvalidValue;
      default:
        return cudaErrorInvalidValue;
    }
  };
  switch (group) {
    case 32:
      return with_group.template operator()<32>();
    case 64:
      return with_group.template operator()<64>();
    case 128:
      return with_group.template operator()<128>();
    default:
      return cudaErrorInvalidValue;
  }
}

// Rows 1 to kMaxDecodeRows.
template <typename Input, typename Output>
cudaError_t launch_decode(DecodeKernel kernel, const Input& input, const Int4Matrix& w, const Output& output,
                          int rows, cudaStream_t stream) {
  if (!w.is_valid() || rows < 1 || rows > kMaxDecodeRows) return cudaErrorInvalidValue;
  const DecodeConfig config = decode_config(kernel, w.n, w.k, w.group);
  const int blocks = config.blocks_per_sm * multiprocessors();
  return with_slices(w.group, w.column_tiles(), input.least_columns(), [&](auto group, auto units) {
    constexpr int kGroup = decltype(group)::value;
    constexpr int kUnits = decltype(units)::value;
    return rows == 1
               ? launch_decode_slices<kGroup, kUnits, 1>(input, w, output, rows, blocks, stream)
               : launch_decode_slices<kGroup, kUnits, kMaxDecodeRows>(input, w, output, rows, blocks, stream);
  });
}

}  // namespace qwen::cuda
