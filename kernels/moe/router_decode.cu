// The router of a decode step: norm and logits. The kernels after it choose the experts (choice.cuh).
#include "kernels/linear/decode_kernel.cuh"
#include "kernels/moe/cuda.h"

namespace qwen::cuda {
namespace {

constexpr int kGroup = 32;  // nothing here has groups: the smallest make the smallest units

struct Router {
  NormedInput input;
  Bf16Rows weights;  // router [E, D], then shared_gate [1, D]
  float* logits;     // [B, E + 1]
  int rows;
};

// Offsets into the shared memory, behind the squares.
template <int kUnits>
struct RouterLayout {
  int sums;
  int slices;
  int items;
  int bytes;

  __host__ __device__ explicit RouterLayout(int rows) {
    using S = Slice<kGroup, kUnits>;
    sums = rows * kDecodeWarps * 4;
    slices = sums + rows * 16 * kSumStride * 4;
    items = slices + kDecodeWarps * S::row_bytes(rows);
    bytes = items + kDecodeWarps * S::kBf16Bytes;
  }
};

// A block has 16 rows of the weights.
template <int kUnits, int kMaxRows>
__global__ void __launch_bounds__(kDecodeWarps * 32, kDecodeBlocks<kGroup, kUnits>) router_kernel(Router p) {
  using S = Slice<kGroup, kUnits>;
  QWEN_DYNAMIC_SHARED(shared);
  let_next_kernel_start();
  const int rows = kMaxRows == 1 ? 1 : p.rows;
  const RouterLayout<kUnits> layout(rows);
  const int thread = static_cast<int>(threadIdx.x);
  const int warp = static_cast<int>(threadIdx.x / 32);
  const int k = p.weights.k;
  const int first_column = warp * S::kColumns;
  float* squares = reinterpret_cast<float*>(shared);
  float* sums = reinterpret_cast<float*>(shared + layout.sums);
  unsigned char* slice = shared + layout.slices + warp * S::row_bytes(rows);
  unsigned char* item = shared + layout.items + warp * S::kBf16Bytes;

  copy_item<kGroup, kUnits>(item, p.weights, static_cast<int>(blockIdx.x), first_column);
  copy_async_commit();
  NormedInput::Weights norm_weights[S::kOfLane];
#pragma unroll
  for (int i = 0; i < S::kOfLane; ++i) {
    norm_weights[i] = p.input.weights(first_column + S::column_of_lane(i), k);
  }
  wait_for_previous_kernel();

  load_slice<kGroup, kUnits, false, kMaxRows>(slice, squares, p.input, norm_weights, first_column, rows, k);
  copy_async_wait<0>();
  __syncwarp();
  store_sums(sums, multiply_bf16<kGroup, kUnits>(slice, item, rows), rows);
  __syncthreads();
  const int out = static_cast<int>(blockIdx.x) * 16 + thread % 16;
  if (thread >= rows * 16 || out >= p.weights.n) return;
  const int row = thread / 16;
  const float factor = norm_factor(p.input, squares + row * kDecodeWarps, k);
  p.logits[row * p.weights.n + out] = round_bf16(sum_over_warps(sums + thread * kSumStride) * factor);
}

template <int kUnits>
cudaError_t launch_router(const Router& p, cudaStream_t stream) {
  const int bytes = RouterLayout<kUnits>(p.rows).bytes;
  if (bytes > max_shared_bytes()) return cudaErrorInvalidValue;
  const auto kernel = p.rows == 1 ? router_kernel<kUnits, 1> : router_kernel<kUnits, kMaxDecodeRows>;
  return launch(kernel, {dim3(p.weights.row_tiles()), dim3(kDecodeWarps * 32), static_cast<size_t>(bytes)},
                stream, p);
}

}  // namespace

cudaError_t router_decode(const bf16* x, RmsNorm norm, const bf16* router, const bf16* shared_gate,
                          float* logits, MoeShape shape, int rows, cudaStream_t stream) {
  if (rows < 1 || rows > kMaxDecodeRows || shape.hidden < 1 || shape.hidden % 32 != 0 || shape.experts < 1) {
    return cudaErrorInvalidValue;
  }
  const Router p = {
      {x, norm}, {router, shared_gate, shape.experts, shape.experts + 1, shape.hidden}, logits, rows};
  switch (units_of_warp<kGroup>((shape.hidden + 63) / 64, p.input.least_columns())) {
    case 1:
      return launch_router<1>(p, stream);
    case 2:
      return launch_router<2>(p, stream);
    case 4:
      return launch_router<4>(p, stream);
    case 8:
      return launch_router<8>(p, stream);
    default:
      return cudaErrorInvalidValue;
  }
}

}  // namespace qwen::cuda
