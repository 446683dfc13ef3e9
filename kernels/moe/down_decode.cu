// The experts of a decode step, second half: down with the weighted sum and the residual.
//
// Every block chooses the experts for itself, from the router's logits: by a kernel of its own that would
// cost a token one more wait. moe_gate_up_decode lets its successor start only after its own wait, when the
// logits and the residual are visible, so this kernel reads them before it waits, and has its weights on
// their way while gate-up computes. After the wait every instruction counts, as each block repeats it for
// all of act.
#include "kernels/moe/choice.cuh"
#include "kernels/moe/cuda.h"
#include "kernels/moe/down_unit.cuh"
#include "kernels/moe/experts_decode.h"

namespace qwen::cuda {
namespace {

// A warp takes units of the chosen experts first, then the shared one's and such as are all zeros.
constexpr int kDownSlots = 3;  // units of a warp on their way
constexpr int kMaxDownWarps = 18;
static_assert(kMaxDownWarps <= kSumStride);

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
  int turns;  // units of a warp
  int slots;

  // Exact where (A + 1) parts^2 is below 2^20.
  __device__ __forceinline__ int choice_of(int unit) const {
    return min(static_cast<int>(unit * of_parts >> 20), shape.top_k);
  }
  __device__ __forceinline__ int column_of(int unit, int choice) const {
    return (unit - choice * parts) * kDownColumns;
  }
};

template <int kGroup>
struct DownLayout {
  int weights;  // float [kMaxChoices + 1], behind as many experts
  int sums;     // float [16, kSumStride]
  int slices;
  int items;
  int bytes;

  __host__ __device__ explicit DownLayout(const Down& p) {
    using Unit = DownUnit<kGroup>;
    weights = 4 * kMaxChoices;
    sums = weights + 4 * kMaxChoices + 16;
    slices = sums + 16 * kSumStride * 4;
    items = slices + p.warps * Unit::kDigitBytes;
    bytes = items + p.warps * p.slots * Unit::S::kItemBytes;
  }
};

// Block (tile row, row of the step). kOneTurn: no warp has more than one unit.
template <int kGroup, bool kOneTurn>
__global__ void __launch_bounds__(kMaxDownWarps * 32, 2) down_kernel(Down p) {
  using Unit = DownUnit<kGroup>;
  using S = typename Unit::S;
  QWEN_DYNAMIC_SHARED(shared);
  const DownLayout<kGroup> layout(p);
  const int thread = static_cast<int>(threadIdx.x);
  const int lane = static_cast<int>(threadIdx.x % 32);
  const int warp = static_cast<int>(threadIdx.x / 32);
  const int top_k = p.shape.top_k;
  const int row_tile = static_cast<int>(blockIdx.x);
  const int row_tiles = static_cast<int>(gridDim.x);
  const int row = static_cast<int>(blockIdx.y);
  int* experts = reinterpret_cast<int*>(shared);
  float* weights = reinterpret_cast<float*>(shared + layout.weights);
  float* sums = reinterpret_cast<float*>(shared + layout.sums);
  unsigned char* slice = shared + layout.slices + warp * Unit::kDigitBytes;
  unsigned char* items = shared + layout.items + warp * p.slots * S::kItemBytes;

  uint32_t own = 0;
  float gate = 0;
  if (warp == 0) {
    const float* logits = p.logits + row * (p.shape.experts + 1);
    gate = __ldcg(logits + p.shape.experts);
    own = choose_experts(logits, p.shape.experts, top_k);
    if (lane < top_k) experts[lane] = expert_of(own);
  }
  int unit = warp;
  int choice = p.choice_of(unit);
  int column = p.column_of(unit, choice);
  const auto source_of_unit = [&] {
    return ItemSource<kGroup, Unit::kUnits>(choice < top_k ? p.routed : p.shared, row_tile, column);
  };
  ItemSource<kGroup, Unit::kUnits> source = source_of_unit();
  source.settle();
  // What is known before the wait, here, where the compiler does not move it behind the wait.
  const int width = top_k * p.shape.intermediate + p.shape.shared_intermediate;
  // Where there are no columns, and the weights are zero, a lane reads others, which saves it a question.
  const auto act_of_unit = [&] {
    const int left = (choice < top_k ? p.routed.k : p.shared.k) - column;
    const int of_lane = ActUnit::column_of_lane();
    return p.act + row * width + (left > 0 ? choice * p.shape.intermediate + column : 0) +
           (of_lane / 32 * 32 < left ? of_lane : of_lane % 32);
  };
  const bf16* from = act_of_unit();
  const int out = row_tile * 16 + thread;
  int element = thread < 16 && out < p.routed.n ? row * p.routed.n + out : -1;
  float before = element >= 0 ? __bfloat162float(p.residual[element]) : 0.0F;
  // Lanes (r, 0) have the sum of row r, lanes (r, 1) that of row r + 8.
  int sum_at = (lane / 4 + lane % 2 * 8) * kSumStride + warp;
  settle(from);
  settle(element);
  settle(before);
  settle(sum_at);
#pragma unroll 1
  for (int i = p.warps + warp; i < kSumStride; i += p.warps) {  // what no warp fills
    if (lane < 16) sums[lane * kSumStride + i] = 0;
  }
  __syncthreads();
  if (choice < top_k) source.advance(p.routed, experts[choice] * row_tiles);
  source.copy(items);
  copy_async_commit();
  const auto copy_later = [&](int turn, unsigned char* slot) {
    if (turn < p.turns) {
      unit = turn * p.warps + warp;
      choice = p.choice_of(unit);
      column = p.column_of(unit, choice);
      source = source_of_unit();
      if (choice < top_k) source.advance(p.routed, experts[choice] * row_tiles);
      source.copy(slot);
    }
    copy_async_commit();
  };
  if constexpr (!kOneTurn) {
#pragma unroll 1
    for (int i = 1; i < kDownSlots; ++i) copy_later(i, items + i * S::kItemBytes);
    choice = p.choice_of(warp);
    column = p.column_of(warp, choice);
  }
  if (warp == 0) {
    const float weight = choice_weight(own, top_k);
    if (lane < top_k) weights[lane] = weight;
    if (lane == 0) weights[top_k] = shared_weight(gate);
  }
  __syncthreads();

  float weight = weights[choice];
  settle(weight);
  wait_for_previous_kernel();
  let_next_kernel_start();  // sooner, gate-up's end would wait for the next kernel's weights

  float total = 0;
  int slot = 0;
#pragma unroll 1
  for (int turn = 0; turn < (kOneTurn ? 1 : p.turns); ++turn) {
    const ActUnit x(from);
    const float scale = x.template write_digits<kGroup>(slice) * weight;
    copy_async_wait<kOneTurn ? 0 : kDownSlots - 1>();
    __syncwarp();
    unsigned char* item = items + slot * S::kItemBytes;
    const DownWeights<kGroup> w(item);
    float of_rows[2];
    w.multiply(of_rows, slice);
    total += scale * (lane % 2 == 0 ? of_rows[0] : of_rows[1]);
    if constexpr (!kOneTurn) {
      __syncwarp();
      copy_later(turn + kDownSlots, item);
      unit = (turn + 1) * p.warps + warp;
      choice = p.choice_of(unit);
      column = p.column_of(unit, choice);
      from = act_of_unit();
      weight = weights[choice];
      slot = slot + 1 == p.slots ? 0 : slot + 1;
    }
  }
  if (lane % 4 < 2) sums[sum_at] = total;
  __syncthreads();
  if (element < 0) return;
  const float4* of_warps = reinterpret_cast<const float4*>(sums + thread * kSumStride);
  float4 v[kSumStride / 4];
#pragma unroll
  for (int i = 0; i < kSumStride / 4; ++i) v[i] = of_warps[i];
  float sum = before;
#pragma unroll
  for (int i = 0; i < kSumStride / 4; ++i) sum += (v[i].x + v[i].y) + (v[i].z + v[i].w);
  p.y[element] = __float2bfloat16(sum);
}

template <int kGroup>
cudaError_t launch_down(Down p, int rows, cudaStream_t stream) {
  const auto parts_of = [](const Int4Matrix& w) { return (w.k + kDownColumns - 1) / kDownColumns; };
  p.parts = parts_of(p.routed);
  if (static_cast<int64_t>(p.shape.top_k + 2) * p.parts * p.parts >= 1 << 20) return cudaErrorInvalidValue;
  p.of_parts = static_cast<uint32_t>(((1 << 20) + p.parts - 1) / p.parts);
  const int units = p.shape.top_k * p.parts + parts_of(p.shared);
  p.turns = (units + kMaxDownWarps - 1) / kMaxDownWarps;
  p.warps = (units + p.turns - 1) / p.turns;
  p.slots = std::min(p.turns, kDownSlots);
  const int bytes = DownLayout<kGroup>(p).bytes;
  if (bytes > max_shared_bytes()) return cudaErrorInvalidValue;
  const auto kernel = p.turns == 1 ? down_kernel<kGroup, true> : down_kernel<kGroup, false>;
  return launch(kernel, {dim3(p.routed.row_tiles(), rows), dim3(p.warps * 32), static_cast<size_t>(bytes)},
                stream, p);
}

}  // namespace

cudaError_t moe_down_decode(const bf16* act, const float* logits, Int4Experts down, Int4Matrix shared_down,
                            const bf16* residual, bf16* y, MoeShape shape, int rows, cudaStream_t stream) {
  if (!are_valid(down, shared_down, shape, rows) || down.n != shared_down.n || down.k != shape.intermediate ||
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
