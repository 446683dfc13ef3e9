// The int8 head, bound by the bandwidth of its weights, and the int8 embedding.
//
// Every number of a code is a bfloat16, so the head multiplies codes with bfloat16 activations on tensor
// cores and scales each group's sum. All batch sizes run the same instructions on their row, which makes a
// row's result independent of the others.
#include "kernels/cuda/primitives.cuh"
#include "kernels/linear/cuda.h"

namespace qwen::cuda {
namespace {

constexpr int kWarps = 8;
constexpr int kThreads = 32 * kWarps;
// A warp has 16 rows of W and goes through them kStep columns at a time: two loads of 16 bytes for each of
// its lanes' two rows, so that a row is read by whole cache lines.
constexpr int kStep = 128;
constexpr int kHalf = 64;  // columns that the four lanes of a row read together

// A lane's codes, and its rows' scales, of a step: [row r or r + 8][half].
template <int kGroup>
struct Step {
  static constexpr int kScales = kStep / kGroup;
  uint4 codes[2][2];
  bf16 scales[2][kScales];
};

// The codes in bytes 0 and 2 of `pair` as exact bfloat16: the seven low bits stand in the mantissa of
// 128 + x, the sign bit turns the 128 that is subtracted into 256.
__device__ __forceinline__ uint32_t codes_to_bf16(uint32_t pair) {
  const uint32_t magnitude = and_xor(pair, 0x007f007fU, 0x43004300U);
  const uint32_t bias = and_xor(pair, 0x00800080U, 0x43004300U);
  const __nv_bfloat162 code = __hsub2(*reinterpret_cast<const __nv_bfloat162*>(&magnitude),
                                      *reinterpret_cast<const __nv_bfloat162*>(&bias));
  return *reinterpret_cast<const uint32_t*>(&code);
}

// A lane's two rows of W, from a column on.
struct Rows {
  const int8_t* codes[2];  // its own 16 of each 64 columns
  const bf16* scales[2];
  int left;       // columns, less than one when there are none
  bool by_steps;  // K is a multiple of kStep: scales are aligned to what a step has of them
};

// Loads the step that is `kAhead` steps on.
template <int kAhead, int kGroup>
__device__ __forceinline__ void load_step(const Rows& rows, int q, Step<kGroup>& step) {
  constexpr int kScales = Step<kGroup>::kScales, kColumn = kAhead * kStep, kFirst = kAhead * kScales;
  if (kColumn >= rows.left) return;
#pragma unroll
  for (int i = 0; i < 2; ++i) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int k = kColumn + kHalf * half;
      step.codes[i][half] = k + 16 * q < rows.left
                                ? load_streaming(reinterpret_cast<const uint4*>(rows.codes[i] + k))
                                : uint4{0, 0, 0, 0};
    }
    const bf16* const scales = rows.scales[i] + kFirst;
    if (kScales > 1 && rows.by_steps) {
      if constexpr (kScales == 4) {
        *reinterpret_cast<uint2*>(step.scales[i]) = __ldg(reinterpret_cast<const uint2*>(scales));
      } else if constexpr (kScales == 2) {
        *reinterpret_cast<uint32_t*>(step.scales[i]) = __ldg(reinterpret_cast<const uint32_t*>(scales));
      }
    } else {
#pragma unroll
      for (int g = 0; g < kScales; ++g) {
        step.scales[i][g] = kColumn + g * kGroup < rows.left ? __ldg(scales + g) : __float2bfloat16(0.0F);
      }
    }
  }
}

// sums += the step's product with x. x: this lane's row of activations, from the step's first column on.
template <int kGroup>
__device__ __forceinline__ void multiply_step(const Step<kGroup>& step, const bf16* x, bool has_row, int q,
                                              float (&sums)[4]) {
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    uint4 activations[2] = {{0, 0, 0, 0}, {0, 0, 0, 0}};
    if (has_row) {
      const uint4* const from = reinterpret_cast<const uint4*>(x + kHalf * half + 16 * q);
      activations[0] = from[0];
      activations[1] = from[1];
    }
    const uint32_t* const b_words = &activations[0].x;
    // Groups of 32 are the halves' halves: lanes q < 2 have the first, the others the second. One product
    // each, with zeros in place of the other's activations.
    constexpr int kProducts = kGroup == 32 ? 2 : 1;
    float products[kProducts][4] = {};
#pragma unroll
    for (int j = 0; j < 4; ++j) {
      const uint32_t upper = reinterpret_cast<const uint32_t*>(&step.codes[0][half])[j];
      const uint32_t lower = reinterpret_cast<const uint32_t*>(&step.codes[1][half])[j];
      const uint32_t a[4] = {codes_to_bf16(upper), codes_to_bf16(lower), codes_to_bf16(upper >> 8),
                             codes_to_bf16(lower >> 8)};
#pragma unroll
      for (int p = 0; p < kProducts; ++p) {
        const bool mine = kProducts == 1 || (q >= 2) == (p == 1);
        const uint32_t b[2] = {mine ? b_words[2 * j] : 0, mine ? b_words[2 * j + 1] : 0};
        mma_bf16(products[p], a, b);
      }
    }
#pragma unroll
    for (int p = 0; p < kProducts; ++p) {
      const int group = (kHalf * half + 32 * p) / kGroup;
      const float scale[2] = {__bfloat162float(step.scales[0][group]),
                              __bfloat162float(step.scales[1][group])};
#pragma unroll
      for (int i = 0; i < 4; ++i) sums[i] += scale[i / 2] * products[p][i];
    }
  }
}

// Norms the rows of x into shared memory, shuffled: [rows][stride], zeros past K. A warp a row at a time.
__device__ void load_activations(const bf16* x, const RmsNorm& norm, bf16* shared, int rows, int k,
                                 int stride) {
  const int lane = threadIdx.x % 32;
  for (int row = threadIdx.x / 32; row < rows; row += kWarps) {
    const uint4* const from = reinterpret_cast<const uint4*>(x + static_cast<int64_t>(row) * k);
    bf16* const to = shared + row * stride;
    float scale = 1;
    if (norm.weight != nullptr) {
      float sum = 0;
      for (int v = lane; v < k / 8; v += 32) {
        const uint4 eight = from[v];
        const uint32_t words[4] = {eight.x, eight.y, eight.z, eight.w};
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          sum += low_bf16(words[i]) * low_bf16(words[i]) + high_bf16(words[i]) * high_bf16(words[i]);
        }
      }
      scale = rsqrtf(warp_sum(sum) / static_cast<float>(k) + norm.eps);
    }
    for (int v = lane; v < stride / 8; v += 32) {
      uint32_t words[4] = {0, 0, 0, 0};
      if (v < k / 8) {
        const uint4 eight = from[v];
        const uint32_t values[4] = {eight.x, eight.y, eight.z, eight.w};
        uint4 weight = {0, 0, 0, 0};
        if (norm.weight != nullptr) weight = __ldg(reinterpret_cast<const uint4*>(norm.weight) + v);
        const uint32_t weights[4] = {weight.x, weight.y, weight.z, weight.w};
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          words[i] = pack_bf16(low_bf16(values[i]) * scale * (1.0F + low_bf16(weights[i])),
                               high_bf16(values[i]) * scale * (1.0F + high_bf16(weights[i])));
        }
      }
      // A word of four codes becomes pairs of every second one: columns 0 1 2 3 become 0 2 1 3.
      *reinterpret_cast<uint4*>(to + 8 * v) = {
          __byte_perm(words[0], words[1], 0x5410), __byte_perm(words[0], words[1], 0x7632),
          __byte_perm(words[2], words[3], 0x5410), __byte_perm(words[2], words[3], 0x7632)};
    }
  }
}

// Of a row of activations in shared memory. Of two rows, four lanes each read every second 16 bytes of 128:
// the eight extra columns put the second row's between the first's.
__host__ __device__ inline int stride_of(int k) { return (k + kStep - 1) / kStep * kStep + 8; }

template <int kGroup>
__global__ void __launch_bounds__(kThreads, 2)
    int8_head_rows(const bf16* x, RmsNorm norm, Int8Matrix w, float* y, int rows) {
  QWEN_DYNAMIC_SHARED(shared_bytes);
  bf16* const shared = reinterpret_cast<bf16*>(shared_bytes);
  const int lane = threadIdx.x % 32, r = lane / 4, q = lane % 4;
  const int first = (blockIdx.x * kWarps + threadIdx.x / 32) * 16;
  const int groups = w.k / kGroup, stride = stride_of(w.k);
  Rows w_rows;
  for (int i = 0; i < 2; ++i) {
    // Rows past the end are computed from the last, and not stored.
    const int64_t row = min(first + r + 8 * i, w.n - 1);
    w_rows.codes[i] = w.qweight + row * w.k + 16 * q;
    w_rows.scales[i] = w.scales + row * groups;
  }
  w_rows.left = w.k;
  w_rows.by_steps = w.k % kStep == 0;
  Step<kGroup> steps[2];
  load_step<0>(w_rows, q, steps[0]);
  load_step<1>(w_rows, q, steps[1]);

  let_next_kernel_start();
  wait_for_previous_kernel();
  load_activations(x, norm, shared, rows, w.k, stride);
  __syncthreads();

  const bool has_row = r < rows;
  const bf16* activations = shared + (has_row ? r : 0) * stride;
  float sums[4] = {};
  while (w_rows.left > 0) {
    multiply_step<kGroup>(steps[0], activations, has_row, q, sums);
    load_step<2>(w_rows, q, steps[0]);
    if (kStep < w_rows.left) multiply_step<kGroup>(steps[1], activations + kStep, has_row, q, sums);
    load_step<3>(w_rows, q, steps[1]);
    activations += 2 * kStep;
    for (int i = 0; i < 2; ++i) {
      w_rows.codes[i] += 2 * kStep;
      w_rows.scales[i] += 2 * Step<kGroup>::kScales;
    }
    w_rows.left -= 2 * kStep;
  }
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    const int row = first + r + 8 * (i / 2), token = 2 * q + i % 2;
    if (row < w.n && token < rows) {
      y[static_cast<int64_t>(token) * w.n + row] = round_bf16(sums[i]);
    }
  }
}

template <int kGroup>
cudaError_t launch_head(const bf16* x, RmsNorm norm, Int8Matrix w, float* y, int rows, cudaStream_t stream) {
  const unsigned blocks = (w.n + 16 * kWarps - 1) / (16 * kWarps);
  const LaunchShape shape = {dim3(blocks), dim3(kThreads),
                             static_cast<size_t>(rows) * stride_of(w.k) * sizeof(bf16)};
  return launch(&int8_head_rows<kGroup>, shape, stream, x, norm, w, y, rows);
}

// Eight columns a thread.
__global__ void __launch_bounds__(kThreads)
    embed(const int64_t* ids, Int8Matrix table, bf16* y, int64_t tokens) {
  let_next_kernel_start();
  wait_for_previous_kernel();
  const int vectors = table.k / 8;
  const int64_t i = blockIdx.x * int64_t{kThreads} + threadIdx.x;
  if (i >= tokens * vectors) return;
  const int64_t token = i / vectors;
  const int k = static_cast<int>(i % vectors) * 8;
  const int64_t id = ids[token];
  uint4 out = {~0U, ~0U, ~0U, ~0U};  // NaN
  if (id >= 0 && id < table.n) {
    const uint2 codes = __ldg(reinterpret_cast<const uint2*>(table.qweight + id * table.k + k));
    const float scale =
        __bfloat162float(__ldg(table.scales + id * (table.k / table.group) + k / table.group));
    const auto pair = [scale](uint32_t word, int shift) {
      return pack_bf16(static_cast<int8_t>(word >> shift) * scale,
                       static_cast<int8_t>(word >> (shift + 8)) * scale);
    };
    out = {pair(codes.x, 0), pair(codes.x, 16), pair(codes.y, 0), pair(codes.y, 16)};
  }
  *reinterpret_cast<uint4*>(y + token * table.k + k) = out;
}

bool is_valid(const Int8Matrix& w) {
  return w.n > 0 && w.k > 0 && w.k % 32 == 0 && (w.group == 32 || w.group == 64 || w.group == 128) &&
         w.k % w.group == 0;
}

}  // namespace

cudaError_t int8_head(const bf16* x, RmsNorm norm, Int8Matrix w, float* y, int rows, cudaStream_t stream) {
  if (!is_valid(w) || rows < 1 || rows > kMaxDecodeRows) return cudaErrorInvalidValue;
  switch (w.group) {
    case 32:
      return launch_head<32>(x, norm, w, y, rows, stream);
    case 64:
      return launch_head<64>(x, norm, w, y, rows, stream);
    default:
      return launch_head<128>(x, norm, w, y, rows, stream);
  }
}

cudaError_t int8_embedding(const int64_t* ids, Int8Matrix table, bf16* y, int64_t tokens,
                           cudaStream_t stream) {
  if (!is_valid(table) || tokens <= 0) return cudaErrorInvalidValue;
  const int64_t vectors = tokens * (table.k / 8);
  return launch(&embed, {dim3(static_cast<unsigned>((vectors + kThreads - 1) / kThreads)), dim3(kThreads)},
                stream, ids, table, y, tokens);
}

}  // namespace qwen::cuda
