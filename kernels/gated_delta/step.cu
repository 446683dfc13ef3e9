// One token of the gated delta rule moves a head's state through the machine once: 2 * Hv * Dk * Dv * 4
// bytes, 4.2 MB for 32 heads of 128 by 128. A block keeps 32 columns of a head in registers, so that 128
// blocks have the whole state in flight at once.
#include "kernels/cuda/primitives.cuh"
#include "kernels/gated_delta/cuda.h"
#include "kernels/gated_delta/gates.cuh"
#include "kernels/gated_delta/recurrence.h"

namespace qwen::cuda {
namespace {

constexpr int kRows = 4;  // of the state, consecutive, a thread; and four columns

// Starts a read into L2, where a write by a kernel that still runs also goes: it may come before
// wait_for_previous_kernel().
__device__ __forceinline__ void prefetch_to_l2([[maybe_unused]] const void* p) {
#ifndef QWEN_CUDA_EMULATION
  asm volatile("prefetch.global.L2 [%0];" ::"l"(p));
#endif
}

template <int kKeyDim, int kColumns>
struct Layout {
  static constexpr int kColumnGroups = kColumns / 4;
  static constexpr int kRowGroups = kKeyDim / kRows;
  static constexpr int kActive = kColumnGroups * kRowGroups;
  static constexpr int kThreads = kActive < 32 ? 32 : kActive;
  static constexpr int kWarps = kThreads / 32;
};

__device__ __forceinline__ void add_product(float4& sum, float x, const float4& y) {
  sum.x += x * y.x;
  sum.y += x * y.y;
  sum.z += x * y.z;
  sum.w += x * y.w;
}

__device__ __forceinline__ float dot(const float4& x, const float4& y) {
  return x.x * y.x + x.y * y.y + x.z * y.z + x.w * y.w;
}

// Sums over the lanes that differ in the bits of kFirst and above.
template <int kFirst>
__device__ __forceinline__ void add_across_lanes(float4& v) {
#pragma unroll
  for (int offset = kFirst; offset < 32; offset *= 2) {
    v.x += __shfl_xor_sync(~0U, v.x, offset);
    v.y += __shfl_xor_sync(~0U, v.y, offset);
    v.z += __shfl_xor_sync(~0U, v.z, offset);
    v.w += __shfl_xor_sync(~0U, v.w, offset);
  }
}

// What a thread reads of a token: of all q and k its lane's four, of its rows of the state its four.
struct Token {
  float4 q, k, own_q, own_k, v;
  float a, b;
};

// Block (column slice and value head of the key head, key head, sequence). S the state, k and q normalized,
// after the decay:
//   delta = beta (v - S^T k);  S += k delta^T;  o = S^T q, which is (S before)^T q + (k.q) delta,
// so that one reduction over the rows gives both. No __restrict__: it would let the compiler move reads ahead
// of wait_for_previous_kernel().
template <int kKeyDim, int kColumns>
__global__ __launch_bounds__(Layout<kKeyDim, kColumns>::kThreads) void recur(
    const float* mixed, const float* gates, const bf16* a_log, const bf16* dt_bias, float* recurrent_state,
    const int64_t* slot, float* core, DeltaShape shape, int64_t tokens) {
  using L = Layout<kKeyDim, kColumns>;
  __shared__ float4 partial[2][L::kWarps][L::kColumnGroups][2];
  let_next_kernel_start();

  // Dv, and so the slices, are a power of two: no division, which would come between the loads.
  const unsigned slices = static_cast<unsigned>(shape.value_dim) / kColumns;
  const int shift = __ffs(static_cast<int>(slices)) - 1;
  const int head = static_cast<int>(blockIdx.y * (gridDim.x >> shift) + (blockIdx.x >> shift));
  const int warp = static_cast<int>(threadIdx.x) / 32;
  const int lane = static_cast<int>(threadIdx.x) % 32;
  const int column_group = static_cast<int>(threadIdx.x) % L::kColumnGroups;
  const int row_group = static_cast<int>(threadIdx.x) / L::kColumnGroups;
  const bool active = row_group < L::kRowGroups;
  const int column = static_cast<int>(blockIdx.x & (slices - 1)) * kColumns + column_group * 4;
  const auto state_of = [&](int64_t s) {
    return recurrent_state +
           ((s * shape.value_heads + head) * kKeyDim + row_group * kRows) * shape.value_dim + column;
  };

  // An exception to launch.h's rule: no kernel writes a slot's number, so it is there. A number that is no
  // slot is not followed: whether a prefetch may fault is not documented.
  if (active && column_group == 0) {
    const int64_t expected = *static_cast<const volatile int64_t*>(slot + blockIdx.z);
    if (expected >= 0 && expected < shape.slots) {
      const float* const state = state_of(expected);
#pragma unroll
      for (int i = 0; i < kRows; ++i) prefetch_to_l2(state + i * shape.value_dim);
    }
  }
  const float head_a_log = __bfloat162float(a_log[head]);
  const float head_dt_bias = __bfloat162float(dt_bias[head]);
  const int keys = shape.key_heads * kKeyDim;
  const int first_key = static_cast<int>(blockIdx.y) * kKeyDim;
  const auto load_token = [&](int64_t row) {
    const auto load4 = [](const float* p) { return *reinterpret_cast<const float4*>(p); };
    const float* q = mixed + row * shape.channels() + first_key;
    const float* k = q + keys;
    Token token = {};
    if (lane * 4 < kKeyDim) {
      token.q = load4(q + lane * 4);
      token.k = load4(k + lane * 4);
    }
    if (active) {
      token.own_q = load4(q + row_group * kRows);
      token.own_k = load4(k + row_group * kRows);
    }
    token.v = load4(mixed + row * shape.channels() + 2 * keys + head * shape.value_dim + column);
    token.a = gates[row * 2 * shape.value_heads + head];
    token.b = gates[row * 2 * shape.value_heads + shape.value_heads + head];
    return token;
  };
  const int64_t first_row = blockIdx.z * tokens;
  wait_for_previous_kernel();

  const int64_t own_slot = slot[blockIdx.z];
  Token token = load_token(first_row);  // while the slot's number is on its way
  float4* const state = reinterpret_cast<float4*>(state_of(own_slot));
  const int stride = shape.value_dim / 4;
  float4 s[kRows] = {};
#pragma unroll
  for (int i = 0; i < kRows; ++i) {
    if (active) s[i] = __ldcg(state + i * stride);
  }

  for (int64_t t = 0; t < tokens; ++t) {
    const int64_t row = first_row + t;
    if (t > 0) token = load_token(row);

    const float q_scale =
        rsqrtf(warp_sum(dot(token.q, token.q)) + kL2Epsilon) * rsqrtf(static_cast<float>(kKeyDim));
    const float k_scale = rsqrtf(warp_sum(dot(token.k, token.k)) + kL2Epsilon);
    const float kq = warp_sum(dot(token.k, token.q)) * k_scale * q_scale;
    const float decay = expf(log_decay(token.a, head_a_log, head_dt_bias));
    const float beta = fast_sigmoid(token.b);
    const float key[kRows] = {token.own_k.x * k_scale, token.own_k.y * k_scale, token.own_k.z * k_scale,
                              token.own_k.w * k_scale};
    const float query[kRows] = {token.own_q.x * q_scale, token.own_q.y * q_scale, token.own_q.z * q_scale,
                                token.own_q.w * q_scale};

    float4 sums[2] = {};  // S^T k, S^T q
#pragma unroll
    for (int i = 0; i < kRows; ++i) {
      s[i] = {s[i].x * decay, s[i].y * decay, s[i].z * decay, s[i].w * decay};
      add_product(sums[0], key[i], s[i]);
      add_product(sums[1], query[i], s[i]);
    }
    add_across_lanes<L::kColumnGroups>(sums[0]);
    add_across_lanes<L::kColumnGroups>(sums[1]);
    if constexpr (L::kWarps > 1) {
      // Two buffers: a barrier a token is enough.
      auto& buffer = partial[t % 2];
      if (lane < 2 * L::kColumnGroups) {
        buffer[warp][column_group][lane / L::kColumnGroups] = lane < L::kColumnGroups ? sums[0] : sums[1];
      }
      __syncthreads();
      sums[0] = sums[1] = {};
#pragma unroll
      for (int w = 0; w < L::kWarps; ++w) {
        add_product(sums[0], 1.0F, buffer[w][column_group][0]);
        add_product(sums[1], 1.0F, buffer[w][column_group][1]);
      }
    }
    const float4 delta = {beta * (token.v.x - sums[0].x), beta * (token.v.y - sums[0].y),
                          beta * (token.v.z - sums[0].z), beta * (token.v.w - sums[0].w)};
#pragma unroll
    for (int i = 0; i < kRows; ++i) add_product(s[i], key[i], delta);
    if (row_group == 0) {
      add_product(sums[1], kq, delta);
      *reinterpret_cast<float4*>(core + row * shape.value_size() + head * shape.value_dim + column) = sums[1];
    }
  }
#pragma unroll
  for (int i = 0; i < kRows; ++i) {
    if (active) state[i * stride] = s[i];
  }
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
