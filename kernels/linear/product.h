// Rows of a weight matrix in any format times float inputs: what linear and moe are made of. Thread-safe.
#pragma once

#include <cstdint>

#include "kernels/cpu_types.h"

namespace qwen::cpu {

enum class Format { kFloat32, kBFloat16, kInt8, kInt4 };

// A view of weights [rows, columns]; codes and scales as linear/cpu.h tells.
struct Matrix {
  Format format = Format::kFloat32;
  const void* data = nullptr;
  const uint16_t* scales = nullptr;  // [rows, groups], of int8 and int4
  int64_t rows = 0;
  int64_t columns = 0;
  int64_t groups = 1;

  bool valid() const;
};

Matrix float_matrix(const Array& weight, int64_t rows, int64_t columns);

// Inputs are padded with zeros to this many columns.
int64_t padded(int64_t columns);

// Writes `columns` elements of x as padded(columns) floats, in the order in which `format` is multiplied. A
// row may be prepared in pieces whose lengths, but the last, are multiples of 32.
void prepare_input(Format format, const void* x, DType dtype, int64_t columns, float* out);

// The scratch that multiply() wants, in floats.
int64_t multiply_scratch(const Matrix& w);

// out[t * out_stride + row - row_begin] = w[row] . x[t] for the rows [row_begin, row_end) and every token;
// x[t] points to a prepared input. A result is bit-identical however rows and tokens are split over calls.
void multiply(const Matrix& w, int64_t row_begin, int64_t row_end, const float* const* x, int64_t tokens,
              float* out, int64_t out_stride, float* scratch);

// out f32 [tokens, w.rows] = x [tokens, w.columns] times w transposed, on all threads. Returns a status code.
int multiply_all(const Array& x, const Matrix& w, int64_t tokens, float* out);

}  // namespace qwen::cpu
