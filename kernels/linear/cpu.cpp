#include "kernels/linear/cpu.h"

#include "kernels/linear/product.h"
#include "kernels/parallel.h"
#include "kernels/vector.h"

namespace qwen::cpu {
namespace {

// multiply_all() with the output rounded to x.dtype.
int linear(const Array& x, const Matrix& w, void* out, int64_t tokens) {
  if (x.dtype == DType::kFloat32) {
    return multiply_all(x, w, tokens, static_cast<float*>(out));
  }
  if (tokens < 0 || w.rows < 0) {
    return kBadShape;
  }
  const auto wide = make_scratch<float>(tokens * w.rows);
  if (!wide) {
    return kOutOfMemory;
  }
  const int status = multiply_all(x, w, tokens, wide.get());
  if (status == kOk) {
    vector_ops().float_to_bf16(wide.get(), tokens * w.rows, static_cast<uint16_t*>(out));
  }
  return status;
}

}  // namespace

int float_linear(const Array& x, const Array& weight, void* out, const LinearShape& shape) {
  return linear(x, float_matrix(weight, shape.out_features, shape.in_features), out, shape.tokens);
}

int int8_linear(const Array& x, const int8_t* qweight, const uint16_t* scales, int64_t groups, void* out,
                const LinearShape& shape) {
  return linear(x, {Format::kInt8, qweight, scales, shape.out_features, shape.in_features, groups}, out,
                shape.tokens);
}

int int4_linear(const Array& x, const uint8_t* qweight, const uint16_t* scales, int64_t groups, void* out,
                const LinearShape& shape) {
  return linear(x, {Format::kInt4, qweight, scales, shape.out_features, shape.in_features, groups}, out,
                shape.tokens);
}

int int8_embedding(const int64_t* ids, const int8_t* qweight, const uint16_t* scales, int64_t groups,
                   float* out, const EmbeddingShape& shape) {
  if (groups <= 0 || shape.hidden <= 0 || shape.hidden % groups != 0) {
    return kBadShape;
  }
  for (int64_t t = 0; t < shape.tokens; ++t) {
    if (ids[t] < 0 || ids[t] >= shape.vocabulary) {
      return kOutOfRange;
    }
  }
  const int64_t group = shape.hidden / groups;
  for (int64_t t = 0; t < shape.tokens; ++t) {
    const int8_t* q = qweight + ids[t] * shape.hidden;
    const uint16_t* scale = scales + ids[t] * groups;
    for (int64_t k = 0; k < shape.hidden; ++k) {
      *out++ = static_cast<float>(q[k]) * bf16_to_float(scale[k / group]);
    }
  }
  return kOk;
}

}  // namespace qwen::cpu
