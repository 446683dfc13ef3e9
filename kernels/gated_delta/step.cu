// One token of the gated delta rule moves a head's state through the machine once: 2 * Hv * Dk * Dv * 4
// bytes, 4.2 MB for 32 heads of 128 by 128. A block keeps 32 columns of a head in registers, so that 128
// blocks have the whole state in flight at once, and the first token's before the previous kernel has ended.
#include "kernels/cuda/primitives.cuh"
#include "kernels/gated_delta/cuda.h"
#include "kernels/gated_delta/gates.cuh"
#include "kernels/gated_delta/recurrence.h"

namespace qwen::cuda {
namespace {

// A thread has four columns of kRows consecutive rows of the state. Two warps more have what all rows share:
// one the norms of q and k, one the gates.
template <int kKeyDim, int kColumns>
struct Layout {
  static constexpr int kColumnGroups = kColumns / 4;
  static constexpr int kQuads = kKeyDim * kColumnGroups;
  static constexpr int kStateThreads = kQuads < 128 ? kQuads : 128;
  static constexpr int kWarps = kStateThreads / 32;
  static constexpr int kRows = kQuads / kStateThreads;
  static constexpr int kThreads = kStateThreads + 64;
  static_assert(kQuads % 32 == 0 && 32 % kColumnGroups == 0);
};

struct alignas(16) Norms {
  float q_scale, k_scale;
  float kq;  // the product as they are
};
struct alignas(8) Gates {
  float decay, beta;
};

template <int kKeyDim, int kColumns>
struct Exchanged {
  float4 products[Layout<kKeyDim, kColumns>::kWarps][2][kColumns / 4];  // S^T k, S^T q of a warp's rows
  Norms norms;
  Gates gates;
};

// Makes the compiler compute an address here, not where it is used: after the wait every cycle counts.
template <typename T>
__device__ __forceinline__ void compute_now([[maybe_unused]] T*& address) {
#ifndef QWEN_CUDA_EMULATION
  asm volatile("" : "+l"(address));
#endif
}

__device__ __forceinline__ float4 load4(const float* p) { return __ldcg(reinterpret_cast<const float4*>(p)); }

template <int kRows>
__device__ __forceinline__ void load_rows(float (&to)[kRows], const float* p) {
  if constexpr (kRows % 4 == 0) {
#pragma unroll
    for (int i = 0; i < kRows; i += 4) {
      const float4 four = load4(p + i);
      to[i] = four.x;
      to[i + 1] = four.y;
      to[i + 2] = four.z;
      to[i + 3] = four.w;
    }
  } else {
#pragma unroll
    for (int i = 0; i < kRows; ++i) to[i] = __ldcg(p + i);
  }
}

__device__ __forceinline__ float dot(const float4& x, const float4& y) {
  return x.x * y.x + x.y * y.y + x.z * y.z + x.w * y.w;
}

// Sums over the lanes that differ in the bits of kFirst and above. A lane gets kept_sums<kFirst> of them,
// from the returned index on: fewer shuffles than all for each.
template <int kFirst>
inline constexpr int kept_sums = kFirst == 8 ? 2 : 1;
template <int kFirst>
__device__ __forceinline__ int add_across_lanes(float (&v)[8], int lane) {
  int index = 0;
#pragma unroll
  for (int offset = 16, n = 8; offset >= kFirst; offset /= 2) {
    if (n == 1) {
      v[0] += __shfl_xor_sync(~0U, v[0], offset);
      continue;
    }
    n /= 2;
    const bool upper = (lane & offset) != 0;
#pragma unroll
    for (int i = 0; i < n; ++i) {
      const float given = upper ? v[i] : v[i + n];
      v[i] = (upper ? v[i + n] : v[i]) + __shfl_xor_sync(~0U, given, offset);
    }
    index += upper ? n : 0;
  }
  return index;
}

// q and k from a lane's address on.
template <int kKeyDim>
__device__ __forceinline__ Norms norms_of(const float* q, const float* k, int lane) {
  float4 query = {};
  float4 key = {};
  if (lane * 4 < kKeyDim) {
    query = load4(q);
    key = load4(k);
  }
  return {rsqrtf(warp_sum(dot(query, query)) + kL2Epsilon) * rsqrtf(static_cast<float>(kKeyDim)),
          rsqrtf(warp_sum(dot(key, key)) + kL2Epsilon), warp_sum(dot(key, query))};
}

// Block (column slice and value head of the key head, key head, sequence). S the state, k and q normalized:
//   S *= decay;  delta = beta (v - S^T k);  S += k delta^T;  o = S^T q, which is (S before)^T q + (k.q)
//   delta.
// So one reduction over the rows gives both products; of k and q as they are, so that it waits for no norm.
// No __restrict__: it would let the compiler move reads ahead of wait_for_previous_kernel().
template <int kKeyDim, int kColumns>
__global__ __launch_bounds__(Layout<kKeyDim, kColumns>::kThreads) void recur(
    const float* mixed, const float* gates, const bf16* a_log, const bf16* dt_bias, float* recurrent_state,
    const int64_t* slot, float* core, DeltaShape shape, int64_t tokens) {
  using L = Layout<kKeyDim, kColumns>;
  __shared__ Exchanged<kKeyDim, kColumns> buffers[2];  // so a barrier a token is enough
  let_next_kernel_start();

  // Dv, and so the slices, are a power of two: no division, which would come before the first load.
  const unsigned slices = static_cast<unsigned>(shape.value_dim) / kColumns;
  const int shift = __ffs(static_cast<int>(slices)) - 1;
  const int head = static_cast<int>(blockIdx.y * (gridDim.x >> shift) + (blockIdx.x >> shift));
  const int warp = static_cast<int>(threadIdx.x) / 32;
  const int lane = static_cast<int>(threadIdx.x) % 32;
  const bool has_state = warp < L::kWarps;
  const bool has_norms = warp == L::kWarps;
  const int column_group = static_cast<int>(threadIdx.x) % L::kColumnGroups;
  const int first_row = static_cast<int>(threadIdx.x) / L::kColumnGroups * L::kRows;  // of the state
  const int column = static_cast<int>(blockIdx.x & (slices - 1)) * kColumns + column_group * 4;
  const int stride = shape.value_dim / 4;

  // What a thread reads of a token: rows of q and k and four columns of v, lanes' parts of q and k, or a and
  // b.
  const int64_t row = blockIdx.z * tokens;
  const float* const token = mixed + row * shape.channels();
  const int keys = shape.key_heads * kKeyDim;
  const float* first = token + blockIdx.y * kKeyDim;
  const float* second = first + keys;
  const float* v = token + 2 * keys + head * shape.value_dim + column;
  float* out = core + row * shape.value_size() + head * shape.value_dim + column;
  float4* state = nullptr;
  float4 s[L::kRows];
  float head_a_log = 0;
  float head_dt_bias = 0;
  if (has_state) {
    // An exception to launch.h's rule.
    const int64_t own = __ldcg(slot + blockIdx.z) * shape.value_heads + head;
    state =
        reinterpret_cast<float4*>(recurrent_state + (own * kKeyDim + first_row) * shape.value_dim + column);
#pragma unroll
    for (int i = 0; i < L::kRows; ++i) s[i] = __ldcg(state + i * stride);
    first += first_row;
    second += first_row;
    compute_now(v);
    compute_now(out);
  } else if (has_norms) {
    first += lane * 4;
    second += lane * 4;
  } else {
    head_a_log = __bfloat162float(a_log[head]);
    head_dt_bias = __bfloat162float(dt_bias[head]);
    first = gates + row * 2 * shape.value_heads + head;
    second = first + shape.value_heads;
  }
  const int step = has_state || has_norms ? shape.channels() : 2 * shape.value_heads;
  compute_now(first);
  compute_now(second);
  wait_for_previous_kernel();

  for (int64_t t = 0; t < tokens; ++t) {
    auto& buffer = buffers[t % 2];
    float key[L::kRows];
    float4 value;
    if (has_state) {
      float query[L::kRows];
      load_rows(query, first);
      load_rows(key, second);
      value = load4(v);
      float products[8] = {};
#pragma unroll
      for (int i = 0; i < L::kRows; ++i) {
        products[0] += key[i] * s[i].x;
        products[1] += key[i] * s[i].y;
        products[2] += key[i] * s[i].z;
        products[3] += key[i] * s[i].w;
        products[4] += query[i] * s[i].x;
        products[5] += query[i] * s[i].y;
        products[6] += query[i] * s[i].z;
        products[7] += query[i] * s[i].w;
      }
      const int index = add_across_lanes<L::kColumnGroups>(products, lane);
      float* const to = &buffer.products[warp][index / 4][column_group].x + index % 4;
      if constexpr (kept_sums<L::kColumnGroups> == 2) {
        *reinterpret_cast<float2*>(to) = {products[0], products[1]};
      } else {
        *to = products[0];
      }
    } else if (has_norms) {
      const Norms norms = norms_of<kKeyDim>(first, second, lane);
      if (lane == 0) buffer.norms = norms;
    } else {
      const float a = __ldcg(first);
      const float b = __ldcg(second);
      const Gates gates_of_head = {expf(log_decay(a, head_a_log, head_dt_bias)), fast_sigmoid(b)};
      if (lane == 0) buffer.gates = gates_of_head;
    }
    __syncthreads();
    if (has_state) {
      const auto sum_over_warps = [&](int product) {
        float4 sum = buffer.products[0][product][column_group];
#pragma unroll
        for (int w = 1; w < L::kWarps; ++w) {
          const float4& more = buffer.products[w][product][column_group];
          sum = {sum.x + more.x, sum.y + more.y, sum.z + more.z, sum.w + more.w};
        }
        return sum;
      };
      const auto [q_scale, k_scale, kq] = buffer.norms;
      const auto [decay, beta] = buffer.gates;
      const float gain = beta * k_scale;
      const float scale = decay * k_scale;
      const float4 sums = sum_over_warps(0);
      // By k_scale, which then is not the key's.
      const float4 delta = {gain * (value.x - scale * sums.x), gain * (value.y - scale * sums.y),
                            gain * (value.z - scale * sums.z), gain * (value.w - scale * sums.w)};
#pragma unroll
      for (int i = 0; i < L::kRows; ++i) {
        s[i] = {decay * s[i].x + key[i] * delta.x, decay * s[i].y + key[i] * delta.y,
                decay * s[i].z + key[i] * delta.z, decay * s[i].w + key[i] * delta.w};
      }
      if (first_row == 0) {
        const float4 before = sum_over_warps(1);
        *reinterpret_cast<float4*>(out) = {
            q_scale * (decay * before.x + kq * delta.x), q_scale * (decay * before.y + kq * delta.y),
            q_scale * (decay * before.z + kq * delta.z), q_scale * (decay * before.w + kq * delta.w)};
      }
    }
    first += step;
    second += step;
    v += step;
    out += shape.value_size();
  }
  if (!has_state) return;
#pragma unroll
  for (int i = 0; i < L::kRows; ++i) state[i * stride] = s[i];
}

}  // namespace

cudaError_t delta_recurrence(const float* mixed, const float* gates, const bf16* a_log, const bf16* dt_bias,
                             float* recurrent_state, const int64_t* slot, float* core, DeltaShape shape,
                             int sequences, int64_t tokens, cudaStream_t stream) {
  if (!shape.has_valid_heads() || sequences < 1 || sequences > kMaxDecodeRows || tokens < 1)
    return cudaErrorInvalidValue;
  const auto with_sizes = [&]<int kKeyDim, int kColumns>() {
    const dim3 grid(shape.value_dim / kColumns * (shape.value_heads / shape.key_heads), shape.key_heads,
                    sequences);
    return launch(recur<kKeyDim, kColumns>, {grid, dim3(Layout<kKeyDim, kColumns>::kThreads)}, stream, mixed,
                  gates, a_log, dt_bias, recurrent_state, slot, core, shape, tokens);
  };
  const auto with_key_dim = [&]<int kKeyDim>() {
    if (shape.value_dim % 32 == 0) return with_sizes.template operator()<kKeyDim, 32>();
    if (shape.value_dim == 16) return with_sizes.template operator()<kKeyDim, 16>();
    if (shape.value_dim == 8) return with_sizes.template operator()<kKeyDim, 8>();
    return cudaErrorInvalidValue;
  };
  switch (shape.key_dim) {
    case 16:
      return with_key_dim.template operator()<16>();
    case 32:
      return with_key_dim.template operator()<32>();
    case 64:
      return with_key_dim.template operator()<64>();
    case 128:
      return with_key_dim.template operator()<128>();
    default:
      return cudaErrorInvalidValue;
  }
}

cudaError_t delta_step_decode(const float* mixed, const float* gates, const bf16* a_log, const bf16* dt_bias,
                              float* recurrent_state, const int64_t* slot, float* core, DeltaShape shape,
                              int rows, cudaStream_t stream) {
  return delta_recurrence(mixed, gates, a_log, dt_bias, recurrent_state, slot, core, shape, rows, 1, stream);
}

}  // namespace qwen::cuda
