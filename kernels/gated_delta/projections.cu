// The two projections of linear attention in a decode step, each with all that happens to its channels.
#include "kernels/cuda/activation.cuh"
#include "kernels/gated_delta/cuda.h"
#include "kernels/linear/decode_kernel.cuh"

namespace qwen::cuda {
namespace {

// Rows below C go through the convolution and advance its state, the next Z are z, the last the gates.
struct DeltaOutput {
  Bf16Rows extra;           // ab [2 Hv, D]
  const bf16* conv_weight;  // [C, W]
  bf16* conv_state;         // [S, C, W - 1]
  const int64_t* slot;      // [B]
  float* mixed;             // [B, C]
  bf16* z;                  // [B, Z]
  float* gates;             // [B, 2 Hv]
  int channels;             // C
  int value_size;           // Z
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
  // No kernel writes a slot's number: it may be read before the wait.
  __device__ Prepared begin(int row, int out) const {
    Prepared prepared = {};
    if (out >= channels) return prepared;
    prepared.slot = static_cast<int>(slot[row]);
#pragma unroll
    for (int i = 0; i < kMaxTaps; ++i) {
      if (i < taps) prepared.filter[i] = __bfloat162float(conv_weight[out * taps + i]);
    }
    return prepared;
  }
  __device__ void prepare(Prepared& prepared, int /*row*/, int out) const {
    if (out >= channels) return;
    const bf16* state = state_of(prepared, out);
#pragma unroll
    for (int i = 0; i < kMaxTaps - 1; ++i) {
      if (i < taps - 1) prepared.history[i] = __bfloat162float(state[i]);
    }
  }

  __device__ void store(int row, int out, float sum, const Prepared& prepared) const {
    const bf16 rounded = to_bf16(sum);
    if (out >= channels + value_size) {
      gates[static_cast<int64_t>(row) * extra.n + out - channels - value_size] = __bfloat162float(rounded);
      return;
    }
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
    mixed[static_cast<int64_t>(row) * channels + out] = fast_silu(convolved);
    bf16* state = state_of(prepared, out);
#pragma unroll
    for (int i = 0; i < kMaxTaps - 1; ++i) {
      if (i < taps - 2) {
        state[i] = to_bf16(prepared.history[i + 1]);
      } else if (i == taps - 2) {
        state[i] = rounded;
      }
    }
  }
};

// The gated norm of the recurrence's output, head by head.
struct GatedNormInput {
  const float* core;   // [B, Z]
  const bf16* z;       // [B, Z]
  const bf16* weight;  // [Dv]
  float eps;
  int dim;  // Dv

  static constexpr bool kNorm = false;
  using Weights = Bf16Four;
  struct Raw {
    float2 low, high;
    Bf16Four gate;
  };

  __device__ Weights weights(int column, int k) const {
    return column < k ? Weights{load_two(column), load_two(column + 16)} : Weights{};
  }
  __device__ uint32_t load_two(int column) const {
    return *reinterpret_cast<const uint32_t*>(weight + (column & (dim - 1)));  // a power of two
  }
  __device__ Raw load(int row, int column, int k) const {
    const int64_t at = static_cast<int64_t>(row) * k + column;
    return {*reinterpret_cast<const float2*>(core + at), *reinterpret_cast<const float2*>(core + at + 16),
            Bf16Four::read(z + at)};
  }
  __device__ Four finish(const Raw& raw, const Weights& weights, float& /*square*/) const {
    Four v = {{round_bf16(raw.low.x), round_bf16(raw.low.y)},
              {round_bf16(raw.high.x), round_bf16(raw.high.y)}};
    float low = v.low[0] * v.low[0] + v.low[1] * v.low[1];
    float high = v.high[0] * v.high[0] + v.high[1] * v.high[1];
    // A lane's columns are of one head, or of two that are too small to reach over 16.
    if (dim >= 32) {
      low = high = warp_sum(low + high, dim / 4);
    } else {
      low = warp_sum(low, dim / 2);
      high = warp_sum(high, dim / 2);
    }
    const Four weight_of = weights.widen();
    const Four gate = raw.gate.widen();
    const float low_scale = rsqrtf(low / static_cast<float>(dim) + eps);
    const float high_scale = rsqrtf(high / static_cast<float>(dim) + eps);
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      v.low[i] = gated(v.low[i] * low_scale, weight_of.low[i], gate.low[i]);
      v.high[i] = gated(v.high[i] * high_scale, weight_of.high[i], gate.high[i]);
    }
    return v;
  }
  int least_columns() const { return dim; }

  // The normalized value and its product with the weight are each rounded, as norm/reference.py does.
  __device__ static float gated(float normalized, float weight, float gate) {
    return round_bf16(weight * round_bf16(normalized)) * fast_silu(gate);
  }
};

}  // namespace

cudaError_t delta_input_decode(const bf16* x, RmsNorm norm, Int4Matrix qkvz, const bf16* ab,
                               const bf16* conv_weight, bf16* conv_state, const int64_t* slot, float* mixed,
                               bf16* z, float* gates, DeltaShape shape, int rows, cudaStream_t stream) {
  if (!shape.has_valid_taps() || norm.weight == nullptr || qkvz.n != shape.channels() + shape.value_size())
    return cudaErrorInvalidValue;
  const int gate_rows = 2 * shape.value_heads;
  const DeltaOutput output = {{ab, ab, gate_rows, gate_rows, qkvz.k},
                              conv_weight,
                              conv_state,
                              slot,
                              mixed,
                              z,
                              gates,
                              shape.channels(),
                              shape.value_size(),
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
