// Prefill's products of experts that few tokens chose, bound by reading the weights: one block of sixteen
// warps a multiprocessor, each warp with a stream of weights of its own that no barrier holds up, from tile
// to tile.
//
// Instructions are what is short: at the memory's rate a warp has about 110 for a tile of 16 rows by 64
// columns. So codes go to the tensor cores as they are, 136 too large; a product with constant -136 takes
// that away, and a group's sum is scaled as a whole, in float32. That is more exact than rounding code *
// scale, as wider tiles do.
#pragma once

#include <algorithm>

#include "kernels/linear/gemm_loader.cuh"
#include "kernels/linear/gemm_output.cuh"

namespace qwen::cuda::gemm {

// kPieces: of eight tokens, a tile's.
template <int kPieces>
struct FewTile {
  static constexpr int kWarps = 16;
  static constexpr int kThreads = 32 * kWarps;
  static constexpr int kTokens = 8 * kPieces;
  static constexpr int kStepTiles = kPieces == 1 ? 4 : 2;  // column tiles a step
  static constexpr int kSlotBytes = kStepTiles * (kWeightBytes + kScaleBytes);
  static constexpr int kSlots = 4;
  static constexpr int kStreamBytes = kWarps * kSlots * kSlotBytes;

  static constexpr int64_t token_bytes(int column_tiles) {
    return int64_t{kTokens} * column_tiles * kRowBytes;
  }
  static constexpr int64_t shared_bytes(int column_tiles) {
    return kStreamBytes + 2 * token_bytes(column_tiles);
  }
};

// Unit u is sixteen tile rows of token tile u / feature_blocks. Each block has consecutive units, so that it
// rarely changes its tokens.
template <int kGroup, int kPieces, Output kOutput, Rows kRows>
__global__ void __launch_bounds__(FewTile<kPieces>::kThreads, 1)
    multiply_few(const __grid_constant__ Arguments g) {
  using F = FewTile<kPieces>;
  QWEN_DYNAMIC_SHARED(shared);
  const int lane = threadIdx.x % 32;
  const int warp = threadIdx.x / 32;
  const Int4Matrix& w = g.w;
  const int column_tiles = w.column_tiles();
  const int row_tiles = w.row_tiles();
  const int steps = (column_tiles + F::kStepTiles - 1) / F::kStepTiles;
  const int pitch = column_tiles * kRowBytes;  // of a token's row
  unsigned char* const stream = shared + warp * F::kSlots * F::kSlotBytes;
  unsigned char* const tokens_shared = shared + F::kStreamBytes;

  wait_for_previous_kernel();
  let_next_kernel_start();
  int token_tiles = 0;
  for (int e = lane; e < g.experts; e += 32) {
    token_tiles += (g.offsets[e + 1] - g.offsets[e] + F::kTokens - 1) / F::kTokens;
  }
#pragma unroll
  for (int offset = 16; offset > 0; offset /= 2) token_tiles += __shfl_xor_sync(~0U, token_tiles, offset);
  const int64_t units = int64_t{token_tiles} * g.feature_blocks;
  const int first = static_cast<int>(units * blockIdx.x / gridDim.x);
  const int end = static_cast<int>(units * (blockIdx.x + 1) / gridDim.x);
  if (first == end) return;

  // The stream: what is copied next.
  int load_unit = first;
  int load_step = 0;
  const unsigned char* weights_from = nullptr;  // of the lane
  const unsigned char* scales_from = nullptr;
  constexpr int kScaleChunks = F::kStepTiles * 128 / kGroup;  // of 16 bytes, a step's
  const auto find_weights = [&] {
    const TokenTile tile = find_tile<F::kTokens>(g.offsets, g.experts, load_unit / g.feature_blocks);
    const int row_tile = min(load_unit % g.feature_blocks * F::kWarps + warp, row_tiles - 1);
    const int64_t row = int64_t{tile.expert} * row_tiles + row_tile;
    weights_from = reinterpret_cast<const unsigned char*>(w.tiles + row * column_tiles * 32) + lane * 16;
    scales_from =
        reinterpret_cast<const unsigned char*>(w.scales + row * w.groups() * 8) + lane % kScaleChunks * 16;
  };
  find_weights();
  const auto copy_step = [&](int slot) {
    if (load_unit < end) {
      unsigned char* const to = stream + slot * F::kSlotBytes + lane * 16;
      const int left = column_tiles - load_step * F::kStepTiles;  // tiles
#pragma unroll
      for (int i = 0; i < F::kStepTiles; ++i) {
        if (i < left) copy_async_16(to + i * kWeightBytes, weights_from + i * kWeightBytes);
      }
      weights_from += F::kStepTiles * kWeightBytes;
      if (lane < min(kScaleChunks, left * 128 / kGroup)) {
        copy_async_16(to + F::kStepTiles * kWeightBytes, scales_from);
      }
      scales_from += kScaleChunks * 16;
      if (++load_step == steps) {
        load_step = 0;
        if (++load_unit < end) find_weights();
      }
    }
    copy_async_commit();
  };

  // The tokens of tile `index`, rows of 16-byte chunks, chunk i at i ^ row % 8, into one of two buffers.
  const auto copy_tokens = [&](int index, int buffer) {
    const TokenTile tile = find_tile<F::kTokens>(g.offsets, g.experts, index);
    unsigned char* const to = tokens_shared + buffer * F::kTokens * pitch;
    constexpr int kWarpsARow = F::kWarps / F::kTokens;
    const int t = warp / kWarpsARow;
    if (t >= tile.count) return;
    const int row = kRows == Rows::kGathered ? g.order[tile.begin + t] / g.top_k : tile.begin + t;
    const bf16* const from = g.x + static_cast<size_t>(row) * w.k;
    for (int chunk = warp % kWarpsARow * 32 + lane; chunk < column_tiles * 8; chunk += 32 * kWarpsARow) {
      const bool inside = chunk * 8 < w.k;
      copy_async_16(to + t * pitch + (chunk ^ t % 8) * 16, inside ? from + chunk * 8 : g.x, inside);
    }
  };

  int token_tile = first / g.feature_blocks;
  const int last_tile = (end - 1) / g.feature_blocks;
  for (int slot = 0; slot < F::kSlots - 1; ++slot) copy_step(slot);
  copy_tokens(token_tile, 0);
  copy_async_commit();
  int buffer = 0;
  int slot = 0;
  int steps_since = 0;  // the copies of the tokens that are next
  TokenTile tile = {0, 0, 0};
  for (int unit = first; unit < end; ++unit) {
    if (unit == first || unit % g.feature_blocks == 0) {
      if (unit != first) {
        ++token_tile;
        buffer ^= 1;
      }
      // A step waits for all copies but those of the last kSlots - 2 steps.
      if (steps_since < F::kSlots) copy_async_wait<0>();
      __syncthreads();  // the tokens are there, and the other buffer's are used up
      if (token_tile < last_tile) copy_tokens(token_tile + 1, buffer ^ 1);
      steps_since = 0;
      tile = find_tile<F::kTokens>(g.offsets, g.experts, token_tile);
    }

    float acc[kPieces][4] = {};
    float sum[kPieces][4] = {};     // of a group
    float excess[kPieces][4] = {};  // apart, for shorter chains of dependent products
    const unsigned char* const tokens = tokens_shared + buffer * F::kTokens * pitch + lane % 8 * pitch;
#pragma unroll 1
    for (int step = 0; step < steps; ++step) {
      copy_async_wait<F::kSlots - 2>();
      __syncwarp();  // the slot is filled, and the one before is read
      copy_step(slot == 0 ? F::kSlots - 1 : slot - 1);
      const unsigned char* const from = stream + slot * F::kSlotBytes;
      slot = slot + 1 < F::kSlots ? slot + 1 : 0;
#pragma unroll
      for (int i = 0; i < F::kStepTiles; ++i) {
        const int column_tile = step * F::kStepTiles + i;
        if (i * 64 % kGroup == 0 && i > 0 && column_tile >= column_tiles) break;
        const uint4 words = reinterpret_cast<const uint4*>(from + i * kWeightBytes)[lane];
#pragma unroll
        for (int half = 0; half < 2; ++half) {
          const uint32_t upper = half == 0 ? words.x : words.y;
          const uint32_t lower = half == 0 ? words.z : words.w;
          uint32_t b[kPieces][4];
#pragma unroll
          for (int j = 0; j < kPieces; ++j) {
            const int chunk = (column_tile * 8 + half * 4 + lane / 8) ^ (lane % 8);
            load_matrix_x4(b[j], tokens + j * 8 * pitch + chunk * 16);
          }
#pragma unroll
          for (int k = 0; k < 2; ++k) {
            const uint32_t a[4] = {biased_codes(upper, 2 * k), biased_codes(lower, 2 * k),
                                   biased_codes(upper, 2 * k + 1), biased_codes(lower, 2 * k + 1)};
            constexpr uint32_t kLess = 0xc308c308U;  // -136, -136
            const uint32_t less[4] = {kLess, kLess, kLess, kLess};
#pragma unroll
            for (int j = 0; j < kPieces; ++j) {
              const uint32_t x[2] = {b[j][2 * k], b[j][2 * k + 1]};
              mma_bf16(sum[j], a, x);
              mma_bf16(excess[j], less, x);
            }
          }
          const int columns = i * 64 + half * 32 + 32;
          if (columns % kGroup == 0) {
            const uint32_t scale = reinterpret_cast<const uint32_t*>(
                from + F::kStepTiles * kWeightBytes)[(columns / kGroup - 1) * 8 + lane / 4];
#pragma unroll
            for (int j = 0; j < kPieces; ++j) {
#pragma unroll
              for (int e = 0; e < 4; ++e) {
                acc[j][e] += (e < 2 ? low_bf16(scale) : high_bf16(scale)) * (sum[j][e] + excess[j][e]);
                sum[j][e] = 0;
                excess[j][e] = 0;
              }
            }
          }
        }
      }
    }
    steps_since += steps;

    // Lane 4 r + q has rows r and r + 8 of tokens 2 q and 2 q + 1 of each eight.
    const int row_tile = unit % g.feature_blocks * F::kWarps + warp;
    const int features = kOutput == Output::kSwiglu ? w.n / 2 : w.n;
#pragma unroll
    for (int j = 0; j < kPieces; ++j) {
#pragma unroll
      for (int e = 0; e < 2; ++e) {
        const int t = 8 * j + lane % 4 * 2 + e;
        if (t >= tile.count) continue;
        const int row = kRows == Rows::kScattered ? g.order[tile.begin + t] : tile.begin + t;
        bf16* const to = g.y + static_cast<size_t>(row) * features;
        if constexpr (kOutput == Output::kSwiglu) {
          const int feature = row_tile * 8 + lane / 4;
          if (feature < features) to[feature] = __float2bfloat16(swiglu(acc[j][e], acc[j][e + 2]));
        } else {
          const int feature = row_tile * 16 + lane / 4;
          if (feature < features) to[feature] = __float2bfloat16(acc[j][e]);
          if (feature + 8 < features) to[feature + 8] = __float2bfloat16(acc[j][e + 2]);
        }
      }
    }
  }
}

template <int kGroup, int kPieces, Output kOutput, Rows kRows>
cudaError_t launch_few(Arguments arguments, int64_t token_tiles, cudaStream_t stream) {
  using F = FewTile<kPieces>;
  const Int4Matrix& w = arguments.w;
  arguments.feature_blocks = (w.row_tiles() + F::kWarps - 1) / F::kWarps;
  const int64_t units = token_tiles * arguments.feature_blocks;  // at most
  if (units >= int64_t{1} << 30) return cudaErrorInvalidValue;
  const dim3 grid(static_cast<unsigned>(std::min<int64_t>(units, multiprocessors())));
  return launch(multiply_few<kGroup, kPieces, kOutput, kRows>,
                {grid, dim3(F::kThreads), static_cast<size_t>(F::shared_bytes(w.column_tiles()))}, stream,
                arguments);
}

// Tiles of 8 kPieces tokens; false where a block takes more than this GPU has.
template <int kPieces>
bool few_fit(const Int4Matrix& w) {
  return FewTile<kPieces>::shared_bytes(w.column_tiles()) <= max_shared_bytes();
}

// Enqueues the product.
template <int kPieces, Output kOutput, Rows kRows>
cudaError_t multiply_few(const Arguments& arguments, int64_t token_tiles, cudaStream_t stream) {
  switch (arguments.w.group) {
    case 32:
      return launch_few<32, kPieces, kOutput, kRows>(arguments, token_tiles, stream);
    case 64:
      return launch_few<64, kPieces, kOutput, kRows>(arguments, token_tiles, stream);
    default:
      return launch_few<128, kPieces, kOutput, kRows>(arguments, token_tiles, stream);
  }
}

}  // namespace qwen::cuda::gemm
