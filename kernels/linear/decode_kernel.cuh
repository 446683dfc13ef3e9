// The decode kernel of one int4 matrix: an input that fills the activations, the product, an output that
// takes it.
//
// An Input's copy_weights(shared, k) begins one group of copies into 2 K bytes, before
// wait_for_previous_kernel(); its load<kGroup, kLaterCopies>(activations, shared, partial, rows, k) comes
// after it, kLaterCopies groups of copies later, and ends with a barrier.
//
// An Output's prepare(row, out) reads what it will need for an element, after wait_for_previous_kernel();
// store(row, out, sum, prepared) writes the element. Where it has kExtra, blocks behind the product's call
// copy_extra before that wait and run_extra when the activations are there.
//
// The kernels let their successors start before they wait for their predecessors, so that several kernels'
// weights are on their way at once.
#pragma once

#include <algorithm>
#include <type_traits>

#include "kernels/linear/decode_configs.h"
#include "kernels/linear/gemv.cuh"

namespace qwen::cuda {

// Offsets into the dynamic shared memory of a block.
struct DecodeLayout {
  int sums;
  int input;    // the Input's weights
  int partial;  // kMaxDecodeRows floats a warp
  int weights;
  int row_bytes;

  __host__ __device__ DecodeLayout(int column_tiles, int group, int rows, int warps, int input_bytes) {
    row_bytes = Activations::bytes_of_row(column_tiles);
    sums = rows * row_bytes;
    input = sums + Activations::bytes_of_sums(column_tiles, group);
    partial = input + input_bytes;
    weights = partial + kMaxDecodeRows * warps * 4;
  }
};

// x through the norm of the layer.
struct NormedInput {
  const bf16* x;
  RmsNorm norm;

  __device__ void copy_weights(unsigned char* shared, int k) const { copy_norm_weights(shared, norm, k); }
  template <int kGroup, int kLaterCopies>
  __device__ void load(const Activations& to, const unsigned char* shared, float* partial, int rows,
                       int k) const {
    load_normed_rows<kGroup, kLaterCopies>(to, x, norm, shared, partial, rows, k);
  }
};

// The sums plus a residual, if there is one.
struct ResidualOutput {
  const bf16* residual;  // [B, N] or null
  bf16* y;               // [B, N]; may be residual
  int n;

  static constexpr bool kExtra = false;
  using Prepared = float;

  __device__ float prepare(int row, int out) const {
    return residual == nullptr ? 0.0F : __bfloat162float(residual[static_cast<int64_t>(row) * n + out]);
  }
  __device__ void store(int row, int out, float sum, float before) const {
    y[static_cast<int64_t>(row) * n + out] = __float2bfloat16(before + sum);
  }
};

template <int kGroup, int kRowTiles, typename Input, typename Output>
__global__ void __launch_bounds__(max_decode_warps(kRowTiles) * 32, kRowTiles == 1 || Output::kExtra ? 2 : 3)
    decode_kernel(Input input, Int4Matrix w, UnitSplit split, Output output, int rows, int product_blocks) {
  QWEN_DYNAMIC_SHARED(shared);
  const int warps = static_cast<int>(blockDim.x) / 32;
  const DecodeLayout layout(w.column_tiles(), kGroup, rows, warps, w.column_tiles() * 128);
  const Activations x = {shared, reinterpret_cast<float4*>(shared + layout.sums), layout.row_bytes};
  float* partial = reinterpret_cast<float*>(shared + layout.partial);
  unsigned char* weights = shared + layout.weights;
  const int block = static_cast<int>(blockIdx.x);
  const int thread = static_cast<int>(threadIdx.x);

  input.copy_weights(shared + layout.input, w.k);
  if constexpr (Output::kExtra) {
    if (block >= product_blocks) {
      output.copy_extra(weights, w.k, block - product_blocks);
      let_next_kernel_start();
      wait_for_previous_kernel();
      input.template load<kGroup, 1>(x, shared + layout.input, partial, rows, w.k);
      output.run_extra(x, weights, rows, w.k, block - product_blocks);
      return;
    }
  }
  const int row_tile = block * kRowTiles;
  const auto slice = WeightSlice<kGroup, kRowTiles>::of_warp(weights, split, thread / 32);
  slice.copy(w, row_tile);
  let_next_kernel_start();
  wait_for_previous_kernel();

  const int outputs = kRowTiles * rows * 16;
  const auto element = [&](int i, int& row, int& out) {
    row = i / (16 * kRowTiles);
    out = row_tile * 16 + i % (16 * kRowTiles);
    return i < outputs && out < w.n;
  };
  int row = 0;
  int out = 0;
  typename Output::Prepared prepared = {};
  if (element(thread, row, out)) prepared = output.prepare(row, out);
  input.template load<kGroup, WeightSlice<kGroup, kRowTiles>::kCopyGroups>(x, shared + layout.input, partial,
                                                                           rows, w.k);
  slice.multiply_all(x, rows);
  __syncthreads();
  for (int i = thread; i < outputs; i += static_cast<int>(blockDim.x)) {
    if (!element(i, row, out)) continue;
    if (i != thread) prepared = output.prepare(row, out);
    const int local = out - row_tile * 16;
    output.store(row, out,
                 sum_over_warps<kGroup, kRowTiles>(weights, split, rows, local / 16, row, local % 16),
                 prepared);
  }
}

template <int kGroup, int kRowTiles, typename Input, typename Output>
cudaError_t launch_decode_blocks(const Input& input, const Int4Matrix& w, const Output& output, int rows,
                                 int warps, int extra_blocks, cudaStream_t stream) {
  const DecodeLayout layout(w.column_tiles(), kGroup, rows, warps, w.column_tiles() * 128);
  using Slice = WeightSlice<kGroup, kRowTiles>;
  const UnitSplit split = split_columns<kGroup>(w, warps);
  int bytes = layout.weights + split.shares * split.each * Slice::kUnitBytes;
  if constexpr (Output::kExtra)
    bytes = std::max(bytes, layout.weights + Output::extra_shared_bytes(w.k, warps));
  if (bytes > max_shared_bytes() || warps > max_decode_warps(kRowTiles)) {
    if constexpr (kRowTiles > 1) {
      return launch_decode_blocks<kGroup, 1>(input, w, output, rows, warps, extra_blocks, stream);
    }
    return cudaErrorInvalidValue;  // no block takes rows so long
  }
  const int product_blocks = (w.row_tiles() + kRowTiles - 1) / kRowTiles;
  return launch(decode_kernel<kGroup, kRowTiles, Input, Output>,
                {dim3(product_blocks + extra_blocks), dim3(warps * 32), static_cast<size_t>(bytes)}, stream,
                input, w, split, output, rows, product_blocks);
}

// Rows 1 to kMaxDecodeRows.
template <typename Input, typename Output>
cudaError_t launch_decode(DecodeKernel kernel, const Input& input, const Int4Matrix& w, const Output& output,
                          int rows, cudaStream_t stream) {
  if (!w.is_valid() || rows < 1 || rows > kMaxDecodeRows) return cudaErrorInvalidValue;
  const DecodeConfig config = decode_config(kernel, w.n, w.k, w.group);
  int extra_blocks = 0;
  if constexpr (Output::kExtra) extra_blocks = output.extra_blocks(config.warps);
  const auto with = [&](auto group, auto row_tiles) {
    return launch_decode_blocks<decltype(group)::value, decltype(row_tiles)::value>(
        input, w, output, rows, config.warps, extra_blocks, stream);
  };
  const auto with_group = [&](auto group) {
    switch (config.row_tiles) {
      case 1:
        return with(group, std::integral_constant<int, 1>());
      case 2:
        return with(group, std::integral_constant<int, 2>());
      case 3:
        return with(group, std::integral_constant<int, 3>());
      default:
        return cudaErrorInvalidValue;
    }
  };
  switch (w.group) {
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

}  // namespace qwen::cuda
