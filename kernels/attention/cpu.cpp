#include "kernels/attention/cpu.h"

#include <algorithm>
#include <cmath>
#include <cstring>

#include "kernels/linear/product.h"
#include "kernels/parallel.h"
#include "kernels/vector.h"

namespace qwen::cpu {
namespace {

// Cached values that are summed at a time, so that they stay in cache from one block of columns to the next:
// 64 of 256 dimensions are 64 KiB.
constexpr int64_t kBlockValues = 64;

class Attention {
 public:
  Attention(const AttentionInputs& inputs, void* key_cache, void* value_cache, void* out,
            const AttentionShape& shape)
      : in_(inputs),
        key_cache_(static_cast<char*>(key_cache)),
        value_cache_(static_cast<char*>(value_cache)),
        out_(static_cast<char*>(out)),
        s_(shape),
        group_(shape.query_heads / shape.key_heads),
        element_(size_of(inputs.dtype)),
        row_bytes_(shape.head_dim * element_) {}

  int run();

 private:
  int64_t slot_of(int64_t row) const { return in_.slot[s_.slot_ids == 1 ? 0 : row]; }
  int64_t position_of(int64_t row) const {
    return s_.slot_ids == 1 ? in_.position[0] + row : in_.position[row];
  }
  // Bytes from the start of a cache to position 0 of a head of a row's slot.
  int64_t cache_offset(int64_t row, int64_t key_head) const {
    return (slot_of(row) * s_.key_heads + key_head) * s_.cache_length * row_bytes_;
  }

  void remember(int64_t row);
  void attend(int64_t row, int64_t key_head, float* scratch);

  const AttentionInputs& in_;
  char* key_cache_;
  char* value_cache_;
  char* out_;
  const AttentionShape& s_;
  const int64_t group_;  // query heads of a key-value head
  const int64_t element_, row_bytes_;
  int64_t context_ = 0;  // most positions a row of this call attends to, rounded up to whole tiles
};

void Attention::remember(int64_t row) {
  for (int64_t head = 0; head < s_.key_heads; ++head) {
    const int64_t source = (row * s_.key_heads + head) * row_bytes_;
    const int64_t target = cache_offset(row, head) + position_of(row) * row_bytes_;
    std::memcpy(key_cache_ + target, static_cast<const char*>(in_.k) + source,
                static_cast<size_t>(row_bytes_));
    std::memcpy(value_cache_ + target, static_cast<const char*>(in_.v) + source,
                static_cast<size_t>(row_bytes_));
  }
}

// The query heads of one row that read `key_head`.
void Attention::attend(int64_t row, int64_t key_head, float* scratch) {
  const VectorOps& ops = vector_ops();
  const int64_t length = position_of(row) + 1, dim = s_.head_dim, stride = padded(dim);
  const int64_t first_head = row * s_.query_heads + key_head * group_;
  float* queries = scratch;                    // [group, padded dim]
  float* sums = queries + group_ * stride;     // [group, padded dim]
  float* scores = sums + group_ * stride;      // [group, context]
  float* values = scores + group_ * context_;  // [kBlockValues, dim], then multiply()'s scratch in its place
  const Matrix keys = float_matrix({key_cache_ + cache_offset(row, key_head), in_.dtype}, length, dim);
  const float scale = 1.0f / std::sqrt(static_cast<float>(dim));
  const float* query_rows[kWeightedSumHeads];
  const float* score_rows[kWeightedSumHeads];
  float* sum_rows[kWeightedSumHeads];
  for (int64_t begin = 0; begin < group_; begin += kWeightedSumHeads) {
    const int64_t heads = std::min<int64_t>(kWeightedSumHeads, group_ - begin);
    for (int64_t h = 0; h < heads; ++h) {
      float* query = queries + (begin + h) * stride;
      prepare_input(keys.format, static_cast<const char*>(in_.q) + (first_head + begin + h) * row_bytes_,
                    in_.dtype, dim, query);
      for (int64_t i = 0; i < dim; ++i) {
        query[i] *= scale;
      }
      query_rows[h] = query;
      score_rows[h] = scores + (begin + h) * context_;
      sum_rows[h] = sums + (begin + h) * stride;
      std::fill_n(sum_rows[h], dim, 0.0f);
    }
    multiply(keys, 0, length, query_rows, heads, scores + begin * context_, context_, values);
    float totals[kWeightedSumHeads];
    for (int64_t h = 0; h < heads; ++h) {
      totals[h] = ops.exp_shifted(scores + (begin + h) * context_, length);
    }
    const char* cached = value_cache_ + cache_offset(row, key_head);
    for (int64_t j = 0; j < length; j += kBlockValues) {
      const int64_t count = std::min(kBlockValues, length - j);
      const float* block = reinterpret_cast<const float*>(cached) + j * dim;
      if (in_.dtype == DType::kBFloat16) {
        ops.bf16_to_float(reinterpret_cast<const uint16_t*>(cached) + j * dim, count * dim, values);
        block = values;
      }
      ops.weighted_sum(score_rows, static_cast<int>(heads), block, dim, count, dim, sum_rows);
      for (int64_t h = 0; h < heads; ++h) {
        score_rows[h] += count;
      }
    }
    for (int64_t h = 0; h < heads; ++h) {
      for (int64_t i = 0; i < dim; ++i) {
        sum_rows[h][i] /= totals[h];
      }
      char* target = out_ + (first_head + begin + h) * row_bytes_;
      if (in_.dtype == DType::kFloat32) {
        std::memcpy(target, sum_rows[h], static_cast<size_t>(row_bytes_));
      } else {
        ops.float_to_bf16(sum_rows[h], dim, reinterpret_cast<uint16_t*>(target));
      }
    }
  }
}

int Attention::run() {
  int64_t total = 0;
  for (int64_t row = 0; row < s_.rows; ++row) {
    total += position_of(row) + 1;
    context_ = std::max(context_, (position_of(row) / kTileRows + 1) * kTileRows);
  }
  const int64_t items = s_.rows * s_.key_heads;
  const int workers = worker_count(items, total * 2 * s_.query_heads * s_.head_dim);
  const int64_t stride = padded(s_.head_dim);
  const Matrix keys = float_matrix({nullptr, in_.dtype}, 0, s_.head_dim);
  const int64_t worker_floats =
      group_ * (2 * stride + context_) + std::max(multiply_scratch(keys), kBlockValues * s_.head_dim);
  const auto scratch = make_scratch<float>(workers * worker_floats);
  if (!scratch) {
    return kOutOfMemory;
  }
  for (int64_t row = 0; row < s_.rows; ++row) {
    remember(row);
  }
  parallel_for(items, workers, [&](int64_t item, int worker) {
    attend(item / s_.key_heads, item % s_.key_heads, scratch.get() + worker * worker_floats);
  });
  return kOk;
}

}  // namespace

int attention(const AttentionInputs& inputs, void* key_cache, void* value_cache, void* out,
              const AttentionShape& shape) {
  if (shape.rows < 0 || (shape.slot_ids != 1 && shape.slot_ids != shape.rows) || shape.key_heads <= 0 ||
      shape.query_heads <= 0 || shape.query_heads % shape.key_heads != 0 || shape.head_dim <= 0) {
    return kBadShape;
  }
  for (int64_t i = 0; i < shape.slot_ids; ++i) {
    const int64_t last = shape.slot_ids == 1 ? shape.rows - 1 : 0;
    if (inputs.slot[i] < 0 || inputs.slot[i] >= shape.num_slots || inputs.position[i] < 0 ||
        inputs.position[i] >= shape.cache_length - last) {
      return kOutOfRange;
    }
  }
  return shape.rows == 0 ? kOk : Attention(inputs, key_cache, value_cache, out, shape).run();
}

}  // namespace qwen::cpu
