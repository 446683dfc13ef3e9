// CPU kernels of qwen::float_linear, int8_linear, int4_linear and int8_embedding. Thread-safe.
//
// T tokens, K in-features, N out-features, G = K / groups in-features that share a scale, V vocabulary, D
// hidden size. Scales are bfloat16 bits. Products accumulate in float32.
#pragma once

#include <cstdint>

#include "kernels/cpu_types.h"

namespace qwen::cpu {

struct LinearShape {
  int64_t tokens = 0;        // T
  int64_t in_features = 0;   // K
  int64_t out_features = 0;  // N
};

// out [T, N] in x.dtype = x [T, K] times weight [N, K] transposed.
int float_linear(const Array& x, const Array& weight, void* out, const LinearShape& shape);

// As above with weight[n, k] = qweight[n, k] * scales[n, k / G]; qweight i8 [N, K], scales [N, groups].
// Returns kBadShape unless `groups` divides K.
int int8_linear(const Array& x, const int8_t* qweight, const uint16_t* scales, int64_t groups, void* out,
                const LinearShape& shape);

// As above with two codes a byte: weight[n, k] = (code - 8) * scales[n, k / G]; qweight u8 [N, K/2], the low
// half is the even k. Returns kBadShape if K is odd or `groups` does not divide it.
int int4_linear(const Array& x, const uint8_t* qweight, const uint16_t* scales, int64_t groups, void* out,
                const LinearShape& shape);

struct EmbeddingShape {
  int64_t tokens = 0;      // T
  int64_t vocabulary = 0;  // V
  int64_t hidden = 0;      // D
};

// out f32 [T, D] = the dequantized rows `ids` [T] of qweight i8 [V, D], scales [V, groups].
// Returns kOutOfRange unless every id is in [0, V), kBadShape unless `groups` divides D.
int int8_embedding(const int64_t* ids, const int8_t* qweight, const uint16_t* scales, int64_t groups,
                   float* out, const EmbeddingShape& shape);

}  // namespace qwen::cpu
