#include "kernels/moe/cpu.h"

#include <algorithm>
#include <cmath>

#include "kernels/linear/product.h"
#include "kernels/parallel.h"
#include "kernels/vector.h"

namespace qwen::cpu {
namespace {

// Intermediate columns, or rows of `down`, that a worker takes at once.
constexpr int64_t kBlock = kColumnBlock;

// The choices (token, expert) of a call, sorted by expert.
struct Grouping {
  Scratch<int64_t> position;  // [T * A] of choice t * A + a in the sorted order
  Scratch<int64_t> token;     // [T * A] of a sorted choice
  Scratch<int64_t> begin;     // [E + 1] where an expert's choices begin
  Scratch<int64_t> active;    // [E] experts that have a choice
  int64_t num_active = 0;
  int64_t largest = 0;  // most choices of one expert

  int build(const int64_t* ids, const MoeShape& shape);
};

int Grouping::build(const int64_t* ids, const MoeShape& shape) {
  const int64_t choices = shape.tokens * shape.top_k;
  position = make_scratch<int64_t>(choices);
  token = make_scratch<int64_t>(choices);
  begin = make_scratch<int64_t>(shape.experts + 1);
  active = make_scratch<int64_t>(shape.experts);
  if (!position || !token || !begin || !active) {
    return kOutOfMemory;
  }
  std::fill_n(begin.get(), shape.experts + 1, 0);
  for (int64_t c = 0; c < choices; ++c) {
    if (ids[c] < 0 || ids[c] >= shape.experts) {
      return kOutOfRange;
    }
    ++begin[ids[c] + 1];
  }
  for (int64_t e = 0; e < shape.experts; ++e) {
    if (begin[e + 1] > 0) {
      active[num_active++] = e;
      largest = std::max(largest, begin[e + 1]);
    }
    begin[e + 1] += begin[e];
  }
  for (int64_t c = 0; c < choices; ++c) {
    position[c] = begin[ids[c]]++;
    token[position[c]] = c / shape.top_k;
  }
  for (int64_t e = shape.experts; e > 0; --e) {
    begin[e] = begin[e - 1];
  }
  begin[0] = 0;
  return kOk;
}

int moe(const Array& x, const int64_t* ids, const float* weights, const Matrix& gate_up, const Matrix& down,
        void* out, const MoeShape& shape) {
  const int64_t hidden = shape.hidden, inner = shape.intermediate;
  if (!gate_up.valid() || !down.valid() || shape.tokens < 0 || shape.top_k <= 0) {
    return kBadShape;
  }
  Grouping groups;
  if (const int status = groups.build(ids, shape); status != kOk || shape.tokens == 0) {
    return status;
  }
  const int64_t choices = shape.tokens * shape.top_k;
  const int64_t inner_blocks = (inner + kBlock - 1) / kBlock, hidden_blocks = (hidden + kBlock - 1) / kBlock;
  const int workers = worker_count(2, choices * 3 * inner * hidden);
  const int64_t input_stride = padded(hidden), inner_stride = padded(inner);
  const int64_t products = groups.largest * kBlock;  // one block of gate, or of up, of one expert
  const int64_t worker_floats = std::max(multiply_scratch(gate_up), multiply_scratch(down)) + 2 * products;
  const auto inputs = make_scratch<float>(shape.tokens * input_stride);
  const auto activations = make_scratch<float>(choices * inner_stride);
  const auto outputs = make_scratch<float>(choices * hidden);
  const auto rows = make_scratch<const float*>(2 * choices);
  const auto sums = make_scratch<float>(workers * hidden);
  const auto scratch = make_scratch<float>(workers * worker_floats);
  if (!inputs || !activations || !outputs || !rows || !sums || !scratch) {
    return kOutOfMemory;
  }
  const VectorOps& ops = vector_ops();
  const char* bytes = static_cast<const char*>(x.data);
  for (int64_t t = 0; t < shape.tokens; ++t) {
    prepare_input(gate_up.format, bytes + t * hidden * size_of(x.dtype), x.dtype, hidden,
                  inputs.get() + t * input_stride);
  }
  const float** input_rows = rows.get();
  const float** activation_rows = rows.get() + choices;
  for (int64_t c = 0; c < choices; ++c) {
    input_rows[c] = inputs.get() + groups.token[c] * input_stride;
    activation_rows[c] = activations.get() + c * inner_stride;
  }

  parallel_for(groups.num_active * inner_blocks, workers, [&](int64_t item, int worker) {
    const int64_t e = groups.active[item / inner_blocks], column = item % inner_blocks * kBlock;
    const int64_t first = groups.begin[e], count = groups.begin[e + 1] - first;
    const int64_t width = std::min(kBlock, inner - column);
    float* gate = scratch.get() + worker * worker_floats;
    float* up = gate + products;
    float* dequantized = up + products;
    const int64_t gate_row = e * 2 * inner + column, up_row = gate_row + inner;
    multiply(gate_up, gate_row, gate_row + width, input_rows + first, count, gate, width, dequantized);
    multiply(gate_up, up_row, up_row + width, input_rows + first, count, up, width, dequantized);
    ops.swiglu(gate, up, count * width, gate);
    for (int64_t i = 0; i < count; ++i) {
      prepare_input(down.format, gate + i * width, DType::kFloat32, width,
                    activations.get() + (first + i) * inner_stride + column);
    }
  });
  parallel_for(groups.num_active * hidden_blocks, workers, [&](int64_t item, int worker) {
    const int64_t e = groups.active[item / hidden_blocks], row = item % hidden_blocks * kBlock;
    const int64_t first = groups.begin[e], count = groups.begin[e + 1] - first;
    multiply(down, e * hidden + row, e * hidden + std::min(hidden, row + kBlock), activation_rows + first,
             count, outputs.get() + first * hidden + row, hidden, scratch.get() + worker * worker_floats);
  });
  parallel_for(shape.tokens, worker_count(shape.tokens, choices * hidden), [&](int64_t t, int worker) {
    const bool wide = x.dtype == DType::kFloat32;
    float* sum = wide ? static_cast<float*>(out) + t * hidden : sums.get() + worker * hidden;
    std::fill_n(sum, hidden, 0.0f);
    for (int64_t c = t * shape.top_k; c < (t + 1) * shape.top_k; ++c) {
      ops.add_scaled(outputs.get() + groups.position[c] * hidden, weights[c], hidden, sum);
    }
    if (!wide) {
      ops.float_to_bf16(sum, hidden, static_cast<uint16_t*>(out) + t * hidden);
    }
  });
  return kOk;
}

// Writes the `top_k` largest of logits [E], largest first, the lowest index first of equals, and marks them
// in `taken`.
void select(const float* logits, int64_t experts, int64_t top_k, bool* taken, int64_t* ids) {
  std::fill_n(taken, experts, false);
  for (int64_t a = 0; a < top_k; ++a) {
    int64_t best = -1;
    for (int64_t e = 0; e < experts; ++e) {
      if (!taken[e] && (best < 0 || logits[e] > logits[best])) {
        best = e;
      }
    }
    taken[best] = true;
    ids[a] = best;
  }
}

}  // namespace

int router(const Array& x, const Array& weight, int64_t* ids, float* weights, const RouterShape& shape) {
  if (shape.tokens < 0 || shape.top_k <= 0 || shape.top_k > shape.experts) {
    return kBadShape;
  }
  const auto logits = make_scratch<float>(shape.tokens * shape.experts);
  const auto taken = make_scratch<bool>(shape.experts);
  if (!logits || !taken) {
    return kOutOfMemory;
  }
  const Matrix w = float_matrix(weight, shape.experts, shape.hidden);
  if (const int status = multiply_all(x, w, shape.tokens, logits.get()); status != kOk) {
    return status;
  }
  const auto round = [&](float value) {
    return x.dtype == DType::kFloat32 ? value : bf16_to_float(float_to_bf16(value));
  };
  for (int64_t t = 0; t < shape.tokens; ++t, ids += shape.top_k, weights += shape.top_k) {
    float* row = logits.get() + t * shape.experts;
    std::transform(row, row + shape.experts, row, round);
    select(row, shape.experts, shape.top_k, taken.get(), ids);
    float sum = 0;
    for (int64_t a = 0; a < shape.top_k; ++a) {
      weights[a] = std::exp(row[ids[a]] - row[ids[0]]);
      sum += weights[a];
    }
    for (int64_t a = 0; a < shape.top_k; ++a) {
      weights[a] = round(weights[a] / sum);
    }
  }
  return kOk;
}

int float_moe(const Array& x, const int64_t* ids, const float* weights, const Array& gate_up,
              const Array& down, void* out, const MoeShape& shape) {
  return moe(x, ids, weights, float_matrix(gate_up, shape.experts * 2 * shape.intermediate, shape.hidden),
             float_matrix(down, shape.experts * shape.hidden, shape.intermediate), out, shape);
}

int int4_moe(const Array& x, const int64_t* ids, const float* weights, const Int4Experts& experts, void* out,
             const MoeShape& shape) {
  const Matrix gate_up = {Format::kInt4,          experts.gate_up_qweight,
                          experts.gate_up_scales, shape.experts * 2 * shape.intermediate,
                          shape.hidden,           experts.gate_up_groups};
  const Matrix down = {Format::kInt4,       experts.down_qweight,
                       experts.down_scales, shape.experts * shape.hidden,
                       shape.intermediate,  experts.down_groups};
  return moe(x, ids, weights, gate_up, down, out, shape);
}

}  // namespace qwen::cpu
