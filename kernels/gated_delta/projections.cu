// The two projections of linear attention in a decode step, each with all that happens to its channels.
#include "kernels/cuda/activation.cuh"
#include "kernels/gated_delta/cuda.h"
#include "kernels/linear/decode_kernel.cuh"

namespace qwen::cuda {
namespace {

// Rows below C go through the convolution and advance its state, the rest are z. Further blocks have a row of
// the gates' bfloat16 weights a warp.
struct DeltaOutput {
  const bf16* ab;           // [2 Hv, D]
  const bf16* conv_weight;  // [C, W]
  bf16* conv_state;         // [S, C, W - 1]
  const int64_t* slot;      // [B]
  float* mixed;             // [B, C]
  bf16* z;                  // [B, Z]
  float* gates;             // [B, 2 Hv]
  int channels;             // C
  int value_size;           // Z
  int gate_rows;            // 2 Hv
  int taps;                 // W

  static constexpr bool kExtra = true;
  struct Prepared {
    float history[kMaxTaps - 1];
    float filter[kMaxTaps];
    int slot;
  };

  __device__ bf16* state_of(const Prepared& prepared, int out) const {
    return conv_state + (static_cast<int64_t>(prepared.slot) * channels + out) * (taps - 1);
  }
  __device__ Prepared prepare(int row, int out) const {
    Prepared prepared = {};
    if (out >= channels) return prepared;
    prepared.slot = static_cast<int>(slot[row]);
    const bf16* state = state_of(prepared, out);
#pragma unroll
    for (int i = 0; i < kMaxTaps; ++i) {
      if (i < taps) prepared.filter[i] = __bfloat162float(conv_weight[out * taps + i]);
    }
#pragma unroll
    for (int i = 0; i < kMaxTaps - 1; ++i) {
      if (i < taps - 1) prepared.history[i] = __bfloat162float(state[i]);
    }
    return prepared;
  }

  __device__ void store(int row, int out, float sum, const Prepared& prepared) const {
    const bf16 rounded = __float2bfloat16(sum);
    if (out >= channels) {
      z[static_cast<int64_t>(row) * value_size + out - channels] = rounded;
      return;
    }
    const float now = __bfloat162float(rounded);
    float convolved = 0;
#pragma unroll
    for (int i = 0; i < kMaxTaps; ++i) {
      if (i < taps - 1) {
        convolved += prepared.filter[i] * prepared.history[i];
      } else if (i == taps - 1) {
        convolved += prepared.filter[i] * now;
      }
    }
    mixed[static_cast<int64_t>(row) * channels + out] = silu(convolved);
    bf16* state = state_of(prepared, out);
#pragma unroll
    for (int i = 0; i < kMaxTaps - 1; ++i) {
      if (i < taps - 2) {
        state[i] = __float2bfloat16(prepared.history[i + 1]);
      } else if (i == taps - 2) {
        state[i] = rounded;
      }
    }
  }

  int extra_blocks(int warps) const { return (gate_rows + warps - 1) / warps; }
  static int extra_shared_bytes(int k, int warps) { return warps * k * 2; }

  // The row of this warp into shared memory; each lane copies what it will read.
  __device__ void copy_extra(unsigned char* shared, int k, int block) const {
    const int warp = static_cast<int>(threadIdx.x) / 32;
    const int gate = min(block * static_cast<int>(blockDim.x) / 32 + warp, gate_rows - 1);
    for (int chunk = static_cast<int>(threadIdx.x) % 32; chunk < k / 8; chunk += 32) {
      copy_async_16(shared + (warp * (k / 8) + chunk) * 16, ab + static_cast<int64_t>(gate) * k + chunk * 8);
    }
    copy_async_commit();
  }

  __device__ void run_extra(const Activations& x, const unsigned char* shared, int rows, int k,
                            int block) const {
    const int warp = static_cast<int>(threadIdx.x) / 32;
    const int lane = static_cast<int>(threadIdx.x) % 32;
    const int gate = block * static_cast<int>(blockDim.x) / 32 + warp;
    copy_async_wait<0>();
    if (gate >= gate_rows) return;
    dot_rows(x, shared + warp * k * 2, rows, k, [&](int row, float sum) {
      if (lane == 0) gates[row * gate_rows + gate] = round_bf16(sum);
    });
  }
};

// The gated norm of the recurrence's output, head by head.
struct GatedNormInput {
  const float* core;   // [B, Z]
  const bf16* z;       // [B, Z]
  const bf16* weight;  // [Dv]
  float eps;
  int dim;  // Dv

  __device__ void copy_weights(unsigned char* shared, int /*k*/) const {
    for (int chunk = static_cast<int>(threadIdx.x); chunk < dim / 8; chunk += static_cast<int>(blockDim.x)) {
      copy_async_16(shared + chunk * 16, weight + chunk * 8);
    }
    copy_async_commit();
  }

  template <int kGroup, int kLaterCopies>
  __device__ void load(const Activations& to, const unsigned char* shared, float* /*partial*/, int rows,
                       int k) const {
    copy_async_wait<kLaterCopies>();
    __syncthreads();  // other threads copied some of the weights
    const int chunks = (k + 63) / 64 * 8;
#pragma unroll 1
    for (int row = 0; row < rows; ++row) {
#pragma unroll 1
      for (int base = 0; base < chunks; base += static_cast<int>(blockDim.x)) {
        const int chunk = base + static_cast<int>(threadIdx.x);
        float value[8] = {};
        uint4 gate = make_uint4(0, 0, 0, 0);
        if (chunk < k / 8) {
          const int64_t at = static_cast<int64_t>(row) * k + chunk * 8;
          const float4 low = *reinterpret_cast<const float4*>(core + at);
          const float4 high = *reinterpret_cast<const float4*>(core + at + 4);
          gate = *reinterpret_cast<const uint4*>(z + at);
          const float all[8] = {low.x, low.y, low.z, low.w, high.x, high.y, high.z, high.w};
#pragma unroll
          for (int i = 0; i < 8; ++i) value[i] = round_bf16(all[i]);
        }
        float squares = 0;
#pragma unroll
        for (int i = 0; i < 8; ++i) squares += value[i] * value[i];
        const float scale = rsqrtf(warp_sum(squares, dim / 8) / static_cast<float>(dim) + eps);
        const uint4 weights = *reinterpret_cast<const uint4*>(shared + (chunk & (dim / 8 - 1)) * 16);
        uint4 v;
        v.x = gated_pair(value[0], value[1], scale, weights.x, gate.x);
        v.y = gated_pair(value[2], value[3], scale, weights.y, gate.y);
        v.z = gated_pair(value[4], value[5], scale, weights.z, gate.z);
        v.w = gated_pair(value[6], value[7], scale, weights.w, gate.w);
        store_columns<kGroup>(to, row, chunk, v, chunk < chunks);
      }
    }
    __syncthreads();
  }

  // The normalized value and its product with the weight are each rounded, as norm/reference.py does.
  __device__ static uint32_t gated_pair(float a, float b, float scale, uint32_t weight, uint32_t gate) {
    const uint32_t normalized = pack_bf16(a * scale, b * scale);
    const uint32_t weighted =
        pack_bf16(low_bf16(weight) * low_bf16(normalized), high_bf16(weight) * high_bf16(normalized));
    return pack_bf16(low_bf16(weighted) * silu(low_bf16(gate)), high_bf16(weighted) * silu(high_bf16(gate)));
  }
};

}  // namespace

cudaError_t delta_input_decode(const bf16* x, RmsNorm norm, Int4Matrix qkvz, const bf16* ab,
                               const bf16* conv_weight, bf16* conv_state, const int64_t* slot, float* mixed,
                               bf16* z, float* gates, DeltaShape shape, int rows, cudaStream_t stream) {
  if (!shape.has_valid_taps() || qkvz.n != shape.channels() + shape.value_size())
    return cudaErrorInvalidValue;
  const DeltaOutput output = {ab,
                              conv_weight,
                              conv_state,
                              slot,
                              mixed,
                              z,
                              gates,
                              shape.channels(),
                              shape.value_size(),
                              2 * shape.value_heads,
                              shape.taps};
  return launch_decode(kDeltaInput, NormedInput{x, norm}, qkvz, output, rows, stream);
}

cudaError_t delta_output_decode(const float* core, const bf16* z, const bf16* norm_weight, float eps,
                                Int4Matrix out, const bf16* residual, bf16* y, DeltaShape shape, int rows,
                                cudaStream_t stream) {
  if (!shape.has_valid_value_dim() || out.k != shape.value_size()) return cudaErrorInvalidValue;
  const GatedNormInput input = {core, z, norm_weight, eps, shape.value_dim};
  return launch_decode(kDeltaOutput, input, out, ResidualOutput{residual, y, out.n}, rows, stream);
}

}  // namespace qwen::cuda
