#include "kernels/gated_delta/cpu.h"

#include <algorithm>
#include <cmath>

#include "kernels/parallel.h"
#include "kernels/vector.h"

namespace qwen::cpu {
namespace {

constexpr float kL2Epsilon = 1e-6f;
// Rows that are convolved before they recur, which bounds scratch; each block costs two starts of the
// threads.
constexpr int64_t kBlockRows = 256;
// Channels of the convolution, and columns of a head's state, that a worker takes at once.
constexpr int64_t kBlockChannels = 256;
constexpr int64_t kBlockColumns = 64;

float load(const void* data, DType dtype, int64_t i) {
  return dtype == DType::kFloat32 ? static_cast<const float*>(data)[i]
                                  : bf16_to_float(static_cast<const uint16_t*>(data)[i]);
}

float load(const Array& array, int64_t i) { return load(array.data, array.dtype, i); }

void store(void* data, DType dtype, int64_t i, float value) {
  if (dtype == DType::kFloat32) {
    static_cast<float*>(data)[i] = value;
  } else {
    static_cast<uint16_t*>(data)[i] = float_to_bf16(value);
  }
}

// torch's softplus: the identity above 20, where the logarithm would add nothing.
float softplus(float x) { return x > 20.0f ? x : std::log1p(std::exp(x)); }

class GatedDelta {
 public:
  GatedDelta(const GatedDeltaInputs& inputs, void* conv_state, float* recurrent_state, void* out,
             const GatedDeltaShape& shape)
      : in_(inputs),
        conv_state_(conv_state),
        recurrent_state_(recurrent_state),
        out_(out),
        s_(shape),
        key_width_(shape.key_heads * shape.key_dim),
        value_width_(shape.value_heads * shape.value_dim),
        channels_(2 * key_width_ + value_width_) {}

  int run();

 private:
  int64_t slot_of(int64_t row) const { return in_.slot[s_.slot_ids == 1 ? 0 : row]; }
  // The first row after `row` that is not of its span: consecutive tokens of one slot.
  int64_t span_end(int64_t row, int64_t block_end) const { return s_.slot_ids == 1 ? block_end : row + 1; }

  void convolve(int64_t begin, int64_t end, int64_t channel, int64_t count, float* history);
  void normalize(const float* x, float scale, float* out) const;
  void recur(int64_t begin, int64_t end, int64_t head, int64_t column, int64_t count, float* scratch);

  const GatedDeltaInputs& in_;
  void* conv_state_;
  float* recurrent_state_;
  void* out_;
  const GatedDeltaShape& s_;
  const int64_t key_width_, value_width_, channels_;

  Scratch<float> taps_;   // [W, C]
  Scratch<float> mixed_;  // [block rows, C]: q, k, v after convolution
};

// Rows [begin, end) of the call into rows from 0 of mixed_, for `count` channels; advances the convolution's
// state.
void GatedDelta::convolve(int64_t begin, int64_t end, int64_t channel, int64_t count, float* history) {
  const VectorOps& ops = vector_ops();
  const int64_t kept = s_.taps - 1;
  for (int64_t row = begin; row < end;) {
    const int64_t stop = span_end(row, end), rows = stop - row;
    const int64_t state = (slot_of(row) * channels_ + channel) * kept;
    for (int64_t w = 0; w < kept; ++w) {
      for (int64_t c = 0; c < count; ++c) {
        history[w * count + c] = load(conv_state_, in_.dtype, state + c * kept + w);
      }
    }
    for (int64_t t = 0; t < rows; ++t) {
      float* target = history + (kept + t) * count;
      const int64_t source = (row + t) * channels_ + channel;
      if (in_.dtype == DType::kFloat32) {
        std::copy_n(static_cast<const float*>(in_.mixed_qkv) + source, count, target);
      } else {
        ops.bf16_to_float(static_cast<const uint16_t*>(in_.mixed_qkv) + source, count, target);
      }
    }
    for (int64_t t = 0; t < rows; ++t) {
      ops.convolve_silu(taps_.get() + channel, channels_, history + t * count, count, s_.taps, count,
                        mixed_.get() + (row + t - begin) * channels_ + channel);
    }
    for (int64_t w = 0; w < kept; ++w) {
      for (int64_t c = 0; c < count; ++c) {
        store(conv_state_, in_.dtype, state + c * kept + w, history[(rows + w) * count + c]);
      }
    }
    row = stop;
  }
}

// out [Dk] = x / |x| * scale.
void GatedDelta::normalize(const float* x, float scale, float* out) const {
  const float factor = scale / std::sqrt(vector_ops().sum_of_squares(x, s_.key_dim) + kL2Epsilon);
  for (int64_t i = 0; i < s_.key_dim; ++i) {
    out[i] = x[i] * factor;
  }
}

// Rows [begin, end) of the call through `count` columns of a value head's state. Normalizing q and k here,
// for every value head and block of columns again, costs little and saves a start of the threads.
void GatedDelta::recur(int64_t begin, int64_t end, int64_t head, int64_t column, int64_t count,
                       float* scratch) {
  const VectorOps& ops = vector_ops();
  const int64_t key_head = head / (s_.value_heads / s_.key_heads);
  const float query_scale = 1.0f / std::sqrt(static_cast<float>(s_.key_dim));
  const float rate = std::exp(load(in_.a_log, head)), bias = load(in_.dt_bias, head);
  float* q = scratch;
  float* k = q + s_.key_dim;
  float* result = k + s_.key_dim;
  for (int64_t row = begin; row < end; ++row) {
    const float* mixed = mixed_.get() + (row - begin) * channels_;
    normalize(mixed + key_head * s_.key_dim, query_scale, q);
    normalize(mixed + key_width_ + key_head * s_.key_dim, 1.0f, k);
    const float a = load(in_.a, in_.dtype, row * s_.value_heads + head);
    const float b = load(in_.b, in_.dtype, row * s_.value_heads + head);
    const float decay = std::exp(-rate * softplus(a + bias)), beta = 1.0f / (1.0f + std::exp(-b));
    const int64_t value = head * s_.value_dim + column;
    float* state =
        recurrent_state_ + (slot_of(row) * s_.value_heads + head) * s_.key_dim * s_.value_dim + column;
    ops.delta_step(state, s_.value_dim, s_.key_dim, count, q, k, mixed + 2 * key_width_ + value, decay, beta,
                   result);
    const int64_t target = row * value_width_ + value;
    if (in_.dtype == DType::kFloat32) {
      std::copy_n(result, count, static_cast<float*>(out_) + target);
    } else {
      ops.float_to_bf16(result, count, static_cast<uint16_t*>(out_) + target);
    }
  }
}

int GatedDelta::run() {
  const int64_t block = std::min(kBlockRows, s_.rows);
  const int64_t channel_blocks = (channels_ + kBlockChannels - 1) / kBlockChannels;
  const int64_t column_blocks = (s_.value_dim + kBlockColumns - 1) / kBlockColumns;
  const int64_t items = s_.value_heads * column_blocks;
  const int workers = worker_count(items, block * 4 * s_.key_dim * value_width_);
  const int64_t worker_floats = std::max(kBlockChannels * (block + s_.taps), 2 * s_.key_dim + kBlockColumns);
  taps_ = make_scratch<float>(s_.taps * channels_);
  mixed_ = make_scratch<float>(block * channels_);
  const auto scratch = make_scratch<float>(workers * worker_floats);
  if (!taps_ || !mixed_ || !scratch) {
    return kOutOfMemory;
  }
  for (int64_t w = 0; w < s_.taps; ++w) {
    for (int64_t c = 0; c < channels_; ++c) {
      taps_[w * channels_ + c] = load(in_.conv_weight, c * s_.taps + w);
    }
  }
  for (int64_t begin = 0; begin < s_.rows; begin += block) {
    const int64_t end = std::min(s_.rows, begin + block);
    parallel_for(channel_blocks, workers, [&](int64_t item, int worker) {
      const int64_t channel = item * kBlockChannels;
      convolve(begin, end, channel, std::min(kBlockChannels, channels_ - channel),
               scratch.get() + worker * worker_floats);
    });
    parallel_for(items, workers, [&](int64_t item, int worker) {
      const int64_t column = item % column_blocks * kBlockColumns;
      recur(begin, end, item / column_blocks, column, std::min(kBlockColumns, s_.value_dim - column),
            scratch.get() + worker * worker_floats);
    });
  }
  return kOk;
}

}  // namespace

int gated_delta(const GatedDeltaInputs& inputs, void* conv_state, float* recurrent_state, void* out,
                const GatedDeltaShape& shape) {
  if (shape.rows < 0 || (shape.slot_ids != 1 && shape.slot_ids != shape.rows) || shape.key_heads <= 0 ||
      shape.value_heads <= 0 || shape.value_heads % shape.key_heads != 0 || shape.key_dim <= 0 ||
      shape.value_dim <= 0 || shape.taps <= 0) {
    return kBadShape;
  }
  for (int64_t i = 0; i < shape.slot_ids; ++i) {
    if (inputs.slot[i] < 0 || inputs.slot[i] >= shape.num_slots) {
      return kOutOfRange;
    }
  }
  return shape.rows == 0 ? kOk : GatedDelta(inputs, conv_state, recurrent_state, out, shape).run();
}

}  // namespace qwen::cpu
