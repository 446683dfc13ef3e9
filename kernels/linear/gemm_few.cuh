// Prefill's products of experts that few tokens chose, bound by reading the weights: one block of sixteen
// warps a multiprocessor, each warp with a stream of weights of its own that no barrier holds up, from tile
// row to tile row and on through the experts.
//
// Instructions are what is short: at the memory's rate a warp has about 110 for a tile of 16 rows by 64
// columns. So weights and tokens multiply as integers, as in a decode step (decode_slice.cuh): a code is an
// int8, a value of x two int8 digits, 16 bits relative to the largest of its row. The block makes the digits
// once for all its tile rows, as the tensor cores' operands, so that a lane loads those of four tokens and 64
// columns at once. That is more exact than rounding code * scale, as wider tiles do.
#pragma once

#include <algorithm>

#include "kernels/linear/gemm_few_digits.cuh"
#include "kernels/linear/gemm_few_tiles.cuh"
#include "kernels/linear/gemm_loader.cuh"
#include "kernels/linear/gemm_output.cuh"

namespace qwen::cuda::gemm {

// Tiles of at most kTokens tokens, 8 or 16.
template <int kGroup, int kTokens>
struct FewTile {
  static constexpr int kWarps = 16;
  static constexpr int kThreads = 32 * kWarps;
  static constexpr int kStepTiles = 2;                            // column tiles a step
  static constexpr int kScaleChunks = kStepTiles * 128 / kGroup;  // of 16 bytes, a step's
  static constexpr int kSlotBytes = kStepTiles * kWeightBytes + 16 * kScaleChunks;
  static constexpr int kSlots = kTokens > 8 ? 5 : 8;
  static constexpr int kRing = kSlots * kSlotBytes;  // a warp's
  static constexpr int kStreamBytes = kWarps * kRing;

  // Two buffers of tokens have the next tile's at hand, where they fit.
  static constexpr int64_t shared_bytes(int column_tiles, int buffers) {
    return kStreamBytes +
           int64_t{buffers} * kTokens * (column_tiles * kRowBytes + static_cast<int>(sizeof(float)));
  }
};

// Item i is tile row i % row_tiles of token tile i / row_tiles. Each block has consecutive items, so that it
// rarely changes its tokens, and its warps take turns.
//
// Scattered, it follows the gathered product of the same routing, which lets it start only after its own wait
// (launch.h): it reads the routing and weights before it waits.
template <int kGroup, int kTokens, Output kOutput, Rows kRows>
__global__ void __launch_bounds__(FewTile<kGroup, kTokens>::kThreads, 1)
    multiply_few(const __grid_constant__ Arguments g, int buffers) {
  using F = FewTile<kGroup, kTokens>;
  QWEN_DYNAMIC_SHARED(shared);
  const int lane = threadIdx.x % 32;
  const int warp = threadIdx.x / 32;
  const Int4Matrix& w = g.w;
  const int column_tiles = w.column_tiles();
  const int row_tiles = w.row_tiles();
  const int groups = column_tiles * 64 / kGroup;
  const int steps = (column_tiles + F::kStepTiles - 1) / F::kStepTiles;
  const int token_bytes = kTokens * column_tiles * kRowBytes;          // of a buffer
  unsigned char* const stream = shared + warp * F::kRing + lane * 16;  // the lane's part of a tile
  unsigned char* const tokens = shared + F::kStreamBytes;
  float* const token_scales = reinterpret_cast<float*>(tokens + buffers * token_bytes);
  const uint32_t part = 0xffffffffU / gridDim.x;

  constexpr bool kEarly = kRows == Rows::kScattered;
  if constexpr (!kEarly) {
    wait_for_previous_kernel();
    let_next_kernel_start();
  }
  const FewShare share = find_share<kTokens>(g.offsets, g.experts, row_tiles, part);
  const int first = first_item(share.items, static_cast<int>(blockIdx.x), part);
  const int end = first_item(share.items, static_cast<int>(blockIdx.x) + 1, part);
  if (first == end) {
    if constexpr (kEarly) wait_for_previous_kernel();
    return;
  }
  TokenTiles<kTokens> tile(g.offsets, g.experts, share);
  TokenTiles<kTokens> next = tile;  // whose tokens are made next

  // A warp makes one token's digits. What it has to ask for that, it asks early.
  int source = 0;
  const auto find_row = [&] {
    const int row = next.begin() + min(warp, next.rows() - 1);
    source = kRows == Rows::kGathered ? g.order[row] : row;
  };
  const auto make_tokens = [&](int to) {
    if (warp < next.rows()) {
      const int row = kRows == Rows::kGathered ? source / g.top_k : source;
      const float scale = store_digits(tokens + to * token_bytes + warp * kRowBytes, kTokens * kRowBytes,
                                       g.x + static_cast<size_t>(row) * w.k, w.k, column_tiles);
      if (lane == 0) token_scales[to * kTokens + warp] = scale;
    }
  };
  find_row();

  // The stream: what is copied next.
  int load_item = first + warp;
  int load_row = first % row_tiles + warp;
  int load_step = 0;
  TokenTiles<kTokens> load_tile = tile;
  const unsigned char* weights_from = nullptr;  // of the lane
  const unsigned char* scales_from = nullptr;
  const auto find_weights = [&] {
    if (load_item >= end) return;
    for (; load_row >= row_tiles; load_row -= row_tiles) load_tile.advance();
    const int64_t row = int64_t{load_tile.expert()} * row_tiles + load_row;
    weights_from = reinterpret_cast<const unsigned char*>(w.tiles + row * column_tiles * 32) + lane * 16;
    scales_from =
        reinterpret_cast<const unsigned char*>(w.scales + row * groups * 8) + lane % F::kScaleChunks * 16;
  };
  find_weights();
  const auto copy_step = [&](int to_slot) {
    if (load_item < end) {
      unsigned char* const to = stream + to_slot;
      const int left = column_tiles - load_step * F::kStepTiles;  // tiles
      copy_async_16(to, weights_from);
      if (kGroup == 128 || left > 1) copy_async_16(to + kWeightBytes, weights_from + kWeightBytes);
      const int chunks = kGroup == 128 ? F::kScaleChunks : min(F::kScaleChunks, left * 128 / kGroup);
      if (lane < chunks) copy_async_16(to + F::kStepTiles * kWeightBytes, scales_from);
      weights_from += F::kStepTiles * kWeightBytes;
      scales_from += F::kScaleChunks * 16;
      if (++load_step == steps) {
        load_step = 0;
        load_item += F::kWarps;
        load_row += F::kWarps;
        find_weights();
      }
    }
    copy_async_commit();
  };
  // The first tokens wait for what is asked of the memory before them.
  constexpr int kHead = kEarly ? F::kSlots - 1 : 2;
#pragma unroll 1
  for (int i = 0; i < kHead; ++i) copy_step(i * F::kSlotBytes);
  if constexpr (kEarly) {
    wait_for_previous_kernel();
    let_next_kernel_start();
  }
  make_tokens(0);
#pragma unroll 1
  for (int i = kHead; i < F::kSlots - 1; ++i) copy_step(i * F::kSlotBytes);

  const unsigned char* const scales = shared + warp * F::kRing + F::kStepTiles * kWeightBytes + lane / 4 * 4;
  int slot = 0;                                 // the one that is next, as an offset
  int empty = (F::kSlots - 1) * F::kSlotBytes;  // and the one before it
  int item = first + warp;
  int tile_first = first - first % row_tiles;  // item
  int buffer = 0;
  // The items of a tile of up to 4 kPieces tokens.
  const auto multiply = [&]<int kPieces>() {
    constexpr bool kConvert = kPieces * 128 / kGroup <= 8;
    float factors[kPieces];
    int targets[kPieces];  // rows of y
#pragma unroll
    for (int p = 0; p < kPieces; ++p) {
      const int t = 4 * p + lane % 4;
      const int row = tile.begin() + min(t, tile.rows() - 1);
      targets[p] = kRows == Rows::kScattered ? g.order[row] : row;
      factors[p] = token_scales[buffer * kTokens + t];
    }
    for (; item < min(end, tile_first + row_tiles); item += F::kWarps) {
      float acc[kPieces][2] = {};  // rows r and r + 8 with token 4 p + q
      const unsigned char* x_from = tokens + buffer * token_bytes + lane * 16;
#pragma unroll 1
      for (int step = 0; step < steps; ++step) {
        copy_async_wait<F::kSlots - 2>();
        __syncwarp();  // the slot is filled, and the one before is read
        copy_step(empty);
        const int from = slot;
        empty = slot;
        slot = slot + F::kSlotBytes < F::kRing ? slot + F::kSlotBytes : 0;
        int32_t products[kPieces][4];
#pragma unroll
        for (int i = 0; i < F::kStepTiles; ++i) {
          if (kGroup < 128 && i > 0 && step * F::kStepTiles + i >= column_tiles) break;
          const uint4 v = *reinterpret_cast<const uint4*>(stream + from + i * kWeightBytes);
          uint32_t a[2][4];
          unpack(a[0], v.x, v.z);
          unpack(a[1], v.y, v.w);
#pragma unroll
          for (int p = 0; p < kPieces; ++p) {
            const uint4 x = *reinterpret_cast<const uint4*>(x_from + i * kTokens * kRowBytes + p * 512);
#pragma unroll
            for (int half = 0; half < 2; ++half) {
              const uint32_t b[2] = {half == 0 ? x.x : x.z, half == 0 ? x.y : x.w};
              const int columns = 64 * i + 32 * half;
              int32_t (&c)[4] = products[p];
              if (columns % kGroup == 0) {
                mma_s8_from(kConvert ? 0 : kShiftBits, c, a[half], b);
              } else {
                mma_s8(c, a[half], b);
              }
              if ((columns + 32) % kGroup == 0) {
                const uint32_t scale =
                    *reinterpret_cast<const uint32_t*>(scales + from + columns / kGroup * 32);
                acc[p][0] += low_bf16(scale) * value_of<kConvert>(c[0], c[1]);
                acc[p][1] += high_bf16(scale) * value_of<kConvert>(c[2], c[3]);
              }
            }
          }
        }
        x_from += F::kStepTiles * kTokens * kRowBytes;
      }

      const int row_tile = item - tile_first;
      const int features = kOutput == Output::kSwiglu ? w.n / 2 : w.n;
#pragma unroll
      for (int p = 0; p < kPieces; ++p) {
        if (4 * p + lane % 4 >= tile.rows()) continue;
        bf16* const to = g.y + static_cast<size_t>(targets[p]) * features;
        const float upper = acc[p][0] * factors[p];
        const float lower = acc[p][1] * factors[p];
        if constexpr (kOutput == Output::kSwiglu) {
          const int feature = row_tile * 8 + lane / 4;
          if (feature < features) to[feature] = to_bf16(swiglu(upper, lower));
        } else {
          const int feature = row_tile * 16 + lane / 4;
          if (feature < features) to[feature] = to_bf16(upper);
          if (feature + 8 < features) to[feature + 8] = to_bf16(lower);
        }
      }
    }
  };

  while (true) {
    const bool last = tile_first + row_tiles >= end;
    if (!last) {
      next.advance();
      find_row();
    }
    __syncthreads();  // the tile's tokens are there, and those before it used up
    if (!last && buffers > 1) make_tokens(buffer ^ 1);
    const int rows = tile.rows();
    if (rows <= 4) {
      multiply.template operator()<1>();
    } else if (kTokens == 8 || rows <= 8) {
      multiply.template operator()<2>();
    } else if (rows <= 12) {
      multiply.template operator()<kTokens == 8 ? 2 : 3>();
    } else {
      multiply.template operator()<kTokens / 4>();
    }
    if (last) return;
    tile = next;
    tile_first += row_tiles;
    if (buffers > 1) {
      buffer ^= 1;
    } else {
      __syncthreads();
      make_tokens(0);
    }
  }
}

// Whether a block fits on this GPU, and then with how many buffers of tokens; 0 if not.
template <int kGroup, int kTokens>
int few_buffers(const Int4Matrix& w) {
  constexpr int kStaticBytes = 256;
  for (int buffers = 2; buffers > 0; --buffers) {
    if (FewTile<kGroup, kTokens>::shared_bytes(w.column_tiles(), buffers) + kStaticBytes <=
        max_shared_bytes()) {
      return buffers;
    }
  }
  return 0;
}

template <int kGroup, int kTokens, Output kOutput, Rows kRows>
cudaError_t launch_few(const Arguments& arguments, int64_t token_tiles, cudaStream_t stream) {
  using F = FewTile<kGroup, kTokens>;
  const Int4Matrix& w = arguments.w;
  const int64_t items = token_tiles * w.row_tiles();  // at most
  if (items >= int64_t{1} << 30) return cudaErrorInvalidValue;
  const int64_t blocks = (items + F::kWarps - 1) / F::kWarps;
  const dim3 grid(static_cast<unsigned>(std::min<int64_t>(blocks, multiprocessors())));
  const int buffers = few_buffers<kGroup, kTokens>(w);
  return launch(multiply_few<kGroup, kTokens, kOutput, kRows>,
                {grid, dim3(F::kThreads), static_cast<size_t>(F::shared_bytes(w.column_tiles(), buffers))},
                stream, arguments, buffers);
}

// Tiles of 8 kPieces tokens; false where a block takes more than this GPU has.
template <int kPieces>
bool few_fit(const Int4Matrix& w) {
  switch (w.group) {
    case 32:
      return few_buffers<32, 8 * kPieces>(w) > 0;
    case 64:
      return few_buffers<64, 8 * kPieces>(w) > 0;
    default:
      return few_buffers<128, 8 * kPieces>(w) > 0;
  }
}

// Enqueues the product.
template <int kPieces, Output kOutput, Rows kRows>
cudaError_t multiply_few(const Arguments& arguments, int64_t token_tiles, cudaStream_t stream) {
  switch (arguments.w.group) {
    case 32:
      return launch_few<32, 8 * kPieces, kOutput, kRows>(arguments, token_tiles, stream);
    case 64:
      return launch_few<64, 8 * kPieces, kOutput, kRows>(arguments, token_tiles, stream);
    default:
      return launch_few<128, 8 * kPieces, kOutput, kRows>(arguments, token_tiles, stream);
  }
}

}  // namespace qwen::cuda::gemm
