#include "kernels/linear/product.h"

#include <algorithm>
#include <cstring>

#include "kernels/parallel.h"
#include "kernels/vector.h"

namespace qwen::cpu {
namespace {

// Dequantized at a time: 16 rows of 2048 columns are 128 KiB, an eighth of a common L2 cache.
constexpr int64_t kBlockRows = 16;

// Where column k of a block of 32 stands in interleaved order.
int64_t interleaved(int64_t k) { return k / 32 * 32 + (k % 2) * 16 + k % 32 / 2; }

bool vector_groups(const Matrix& w) { return (w.columns / w.groups) % kColumnBlock == 0; }

// Whether a row can be used, or dequantized in registers, where it lies.
bool whole_blocks(const Matrix& w) {
  return w.format == Format::kFloat32 || w.format == Format::kBFloat16 ? w.columns % kColumnBlock == 0
                                                                       : vector_groups(w);
}

const uint16_t* scales_of(const Matrix& w, int64_t row) { return w.scales + row * w.groups; }

template <typename T>
const T* row_of(const Matrix& w, int64_t row, int64_t elements) {
  return static_cast<const T*>(w.data) + row * elements;
}

// Writes a row as padded floats in the order of prepare_input().
void dequantize_row(const Matrix& w, int64_t row, float* out) {
  const VectorOps& ops = vector_ops();
  const int64_t columns = w.columns, group = columns / w.groups;
  switch (w.format) {
    case Format::kFloat32:
      std::memcpy(out, row_of<float>(w, row, columns), static_cast<size_t>(columns) * sizeof(float));
      break;
    case Format::kBFloat16:
      ops.bf16_to_float(row_of<uint16_t>(w, row, columns), columns, out);
      break;
    case Format::kInt8: {
      const int8_t* q = row_of<int8_t>(w, row, columns);
      if (vector_groups(w)) {
        ops.dequantize_int8(q, scales_of(w, row), columns, group, out);
        break;
      }
      for (int64_t k = 0; k < columns; ++k) {
        out[k] = static_cast<float>(q[k]) * bf16_to_float(scales_of(w, row)[k / group]);
      }
      break;
    }
    case Format::kInt4: {
      const uint8_t* q = row_of<uint8_t>(w, row, columns / 2);
      if (vector_groups(w)) {
        ops.dequantize_int4(q, scales_of(w, row), columns, group, out);
        return;
      }
      std::fill_n(out, padded(columns), 0.0f);
      for (int64_t k = 0; k < columns; ++k) {
        const int code = (k % 2 == 0 ? q[k / 2] & 15 : q[k / 2] >> 4) - 8;
        out[interleaved(k)] = static_cast<float>(code) * bf16_to_float(scales_of(w, row)[k / group]);
      }
      return;
    }
  }
  std::fill(out + columns, out + padded(columns), 0.0f);
}

// One token: dequantizes in registers. REQUIRES: whole_blocks(w).
void multiply_one(const Matrix& w, int64_t row_begin, int64_t row_end, const float* x, float* out) {
  const VectorOps& ops = vector_ops();
  const int64_t columns = w.columns, group = columns / w.groups;
  for (int64_t row = row_begin; row < row_end; row += kTileRows) {
    int64_t rows[kTileRows];
    const uint16_t* scales[kTileRows];
    for (int r = 0; r < kTileRows; ++r) {
      rows[r] = std::min(row + r, row_end - 1);
      scales[r] = w.scales == nullptr ? nullptr : scales_of(w, rows[r]);
    }
    float sums[kTileRows];
    const auto pointers = [&]<typename T>(int64_t elements, const T** result) {
      for (int r = 0; r < kTileRows; ++r) {
        result[r] = row_of<T>(w, rows[r], elements);
      }
    };
    switch (w.format) {
      case Format::kFloat32: {
        const float* q[kTileRows];
        pointers(columns, q);
        ops.dot(q, &x, 1, columns, sums, kTileRows);
        break;
      }
      case Format::kBFloat16: {
        const uint16_t* q[kTileRows];
        pointers(columns, q);
        ops.dot_bf16(q, x, columns, sums);
        break;
      }
      case Format::kInt8: {
        const int8_t* q[kTileRows];
        pointers(columns, q);
        ops.dot_int8(q, scales, x, columns, group, sums);
        break;
      }
      case Format::kInt4: {
        const uint8_t* q[kTileRows];
        pointers(columns / 2, q);
        ops.dot_int4(q, scales, x, columns, group, sums);
        break;
      }
    }
    std::copy_n(sums, std::min<int64_t>(kTileRows, row_end - row), out + row - row_begin);
  }
}

}  // namespace

bool Matrix::valid() const {
  return rows >= 0 && columns > 0 && groups > 0 && columns % groups == 0 &&
         (format != Format::kInt4 || columns % 2 == 0);
}

Matrix float_matrix(const Array& weight, int64_t rows, int64_t columns) {
  Matrix w;
  w.format = weight.dtype == DType::kFloat32 ? Format::kFloat32 : Format::kBFloat16;
  w.data = weight.data;
  w.rows = rows;
  w.columns = columns;
  return w;
}

int64_t padded(int64_t columns) { return (columns + kColumnBlock - 1) / kColumnBlock * kColumnBlock; }

void prepare_input(Format format, const void* x, DType dtype, int64_t columns, float* out) {
  const VectorOps& ops = vector_ops();
  if (format != Format::kInt4) {
    if (dtype == DType::kFloat32) {
      std::memcpy(out, x, static_cast<size_t>(columns) * sizeof(float));
    } else {
      ops.bf16_to_float(static_cast<const uint16_t*>(x), columns, out);
    }
    std::fill(out + columns, out + padded(columns), 0.0f);
    return;
  }
  for (int64_t begin = 0; begin < columns; begin += kColumnBlock) {
    const int64_t n = std::min(kColumnBlock, columns - begin);
    float block[kColumnBlock] = {};
    if (dtype == DType::kFloat32) {
      std::memcpy(block, static_cast<const float*>(x) + begin, static_cast<size_t>(n) * sizeof(float));
    } else {
      ops.bf16_to_float(static_cast<const uint16_t*>(x) + begin, n, block);
    }
    for (int64_t i = 0; i < kColumnBlock / 2; ++i) {
      out[begin + i] = block[2 * i];
      out[begin + kColumnBlock / 2 + i] = block[2 * i + 1];
    }
  }
}

int64_t multiply_scratch(const Matrix& w) { return kBlockRows * padded(w.columns); }

void multiply(const Matrix& w, int64_t row_begin, int64_t row_end, const float* const* x, int64_t tokens,
              float* out, int64_t out_stride, float* scratch) {
  if (tokens == 1 && whole_blocks(w)) {
    multiply_one(w, row_begin, row_end, x[0], out);
    return;
  }
  const VectorOps& ops = vector_ops();
  const int64_t columns = padded(w.columns);
  const bool in_place = w.format == Format::kFloat32 && whole_blocks(w);
  for (int64_t block = row_begin; block < row_end; block += kBlockRows) {
    const int64_t rows = std::min(kBlockRows, row_end - block);
    const float* pointers[kBlockRows];
    for (int64_t r = 0; r < kBlockRows; ++r) {
      if (r >= rows) {
        pointers[r] = pointers[rows - 1];
      } else if (in_place) {
        pointers[r] = row_of<float>(w, block + r, w.columns);
      } else {
        dequantize_row(w, block + r, scratch + r * columns);
        pointers[r] = scratch + r * columns;
      }
    }
    for (int64_t t = 0; t < tokens; t += kTileTokens) {
      const int tile = static_cast<int>(std::min<int64_t>(kTileTokens, tokens - t));
      for (int64_t r = 0; r < rows; r += kTileRows) {
        float sums[kTileTokens * kTileRows];
        ops.dot(pointers + r, x + t, tile, columns, sums, kTileRows);
        float* target = out + t * out_stride + block - row_begin + r;
        const int64_t count = std::min<int64_t>(kTileRows, rows - r);
        for (int i = 0; i < tile; ++i) {
          std::copy_n(sums + i * kTileRows, count, target + i * out_stride);
        }
      }
    }
  }
}

int multiply_all(const Array& x, const Matrix& w, int64_t tokens, float* out) {
  if (!w.valid() || tokens < 0) {
    return kBadShape;
  }
  if (tokens == 0 || w.rows == 0) {
    return kOk;
  }
  const int64_t blocks = (w.rows + kBlockRows - 1) / kBlockRows;
  const int workers = worker_count(blocks, tokens * w.rows * w.columns);
  const bool as_is = x.dtype == DType::kFloat32 && w.format != Format::kInt4 && w.columns % kColumnBlock == 0;
  const int64_t stride = padded(w.columns), scratch_floats = multiply_scratch(w);
  const bool needs_scratch = tokens > 1 || !whole_blocks(w);
  const auto inputs = make_scratch<float>(as_is ? 1 : tokens * stride);
  const auto rows = make_scratch<const float*>(tokens);
  const auto scratch = make_scratch<float>(needs_scratch ? workers * scratch_floats : 1);
  if (!inputs || !rows || !scratch) {
    return kOutOfMemory;
  }
  const char* bytes = static_cast<const char*>(x.data);
  for (int64_t t = 0; t < tokens; ++t) {
    const char* row = bytes + t * w.columns * size_of(x.dtype);
    if (as_is) {
      rows[t] = reinterpret_cast<const float*>(row);
    } else {
      prepare_input(w.format, row, x.dtype, w.columns, inputs.get() + t * stride);
      rows[t] = inputs.get() + t * stride;
    }
  }
  parallel_for(blocks, workers, [&](int64_t block, int worker) {
    const int64_t begin = block * kBlockRows, end = std::min(w.rows, begin + kBlockRows);
    multiply(w, begin, end, rows.get(), tokens, out + begin, w.rows,
             scratch.get() + (needs_scratch ? worker * scratch_floats : 0));
  });
  return kOk;
}

}  // namespace qwen::cpu
