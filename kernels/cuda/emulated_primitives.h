// What emulation has in place of the PTX of primitives.cuh, where it is described.
#pragma once

#include <cuda_bf16.h>

#include <bit>
#include <cstdint>

#include "kernels/cuda/emulation.h"

namespace qwen::cuda {

template <typename T>
void settle(T& /*v*/) {}
inline void wait_for_previous_kernel() { emulated::previous_kernel_waited_for(); }
inline void let_next_kernel_start() {}

inline uint4 load_streaming(const uint4* p) { return *p; }

inline void copy_async_16(void* to_shared, const void* from, bool valid = true) {
  emulated::copy_async(to_shared, from, valid);
}
inline void copy_async_commit() { emulated::copy_async_commit(); }
template <int kPending>
void copy_async_wait() {
  emulated::copy_async_wait(kPending);
}

namespace emulated {

struct MatrixLoad {
  uint32_t (&r)[4];
  const void* row;
};

template <bool kTransposed>
void combine_matrix_loads(void* const (&arguments)[32], uint32_t mask) {
  if (mask != ~0U) fail("load_matrix_x4 without a full warp");
  for (unsigned l = 0; l < 32; ++l) {
    for (unsigned m = 0; m < 4; ++m) {
      const auto element = [&](unsigned i, unsigned j) -> uint32_t {
        return static_cast<const uint16_t*>(static_cast<MatrixLoad*>(arguments[8 * m + i])->row)[j];
      };
      const unsigned i = l / 4;
      const unsigned j = l % 4 * 2;
      static_cast<MatrixLoad*>(arguments[l])->r[m] =
          kTransposed ? element(j, i) | element(j + 1, i) << 16 : element(i, j) | element(i, j + 1) << 16;
    }
  }
}

template <bool kTransposed>
void load_matrix_x4(uint32_t (&r)[4], const void* row) {
  if (reinterpret_cast<uintptr_t>(row) % 16 != 0)
    fail("load_matrix_x4 of an address that is no multiple of 16");
  MatrixLoad load = {r, row};
  warp_operation("load_matrix_x4", ~0U, &combine_matrix_loads<kTransposed>, &load);
}

template <typename C>
struct Product {
  C (&c)[4];
  const uint32_t (&a)[4];
  const uint32_t (&b)[2];
};

// kPacked elements along k in a 32-bit word; element(word, i) is the i-th.
template <typename C, typename Sum, int kPacked, auto kElement>
void combine_products(void* const (&arguments)[32], uint32_t mask) {
  if (mask != ~0U) fail("mma without a full warp");
  constexpr int kDepth = 8 * kPacked;
  Sum a[16][kDepth];
  Sum b[kDepth][8];
  for (int l = 0; l < 32; ++l) {
    const auto& p = *static_cast<Product<C>*>(arguments[l]);
    const int r = l / 4;
    const int q = l % 4;
    for (int i = 0; i < kPacked; ++i) {
      const int k = kPacked * q + i;
      a[r][k] = kElement(p.a[0], i);
      a[r + 8][k] = kElement(p.a[1], i);
      a[r][k + 4 * kPacked] = kElement(p.a[2], i);
      a[r + 8][k + 4 * kPacked] = kElement(p.a[3], i);
      b[k][r] = kElement(p.b[0], i);
      b[k + 4 * kPacked][r] = kElement(p.b[1], i);
    }
  }
  Sum c[16][8] = {};
  for (int i = 0; i < 16; ++i) {
    for (int k = 0; k < kDepth; ++k) {
      for (int j = 0; j < 8; ++j) c[i][j] += a[i][k] * b[k][j];
    }
  }
  for (int l = 0; l < 32; ++l) {
    const auto& p = *static_cast<Product<C>*>(arguments[l]);
    for (int i = 0; i < 4; ++i) {
      p.c[i] = static_cast<C>(p.c[i] + c[l / 4 + i / 2 * 8][l % 4 * 2 + i % 2]);
    }
  }
}

inline double bf16_element(uint32_t word, int i) {
  return std::bit_cast<float>(i == 0 ? word << 16 : word & 0xffff0000U);
}
inline double tf32_element(uint32_t word, int /*i*/) { return std::bit_cast<float>(word & 0xffffe000U); }
inline int32_t s8_element(uint32_t word, int i) { return static_cast<int8_t>(word >> (8 * i)); }

}  // namespace emulated

inline void load_matrix_x4(uint32_t (&r)[4], const void* row) { emulated::load_matrix_x4<false>(r, row); }
inline void load_matrix_x4_transposed(uint32_t (&r)[4], const void* row) {
  emulated::load_matrix_x4<true>(r, row);
}

inline void mma_bf16(float (&c)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
  emulated::Product<float> product = {c, a, b};
  emulated::warp_operation("mma_bf16", ~0U,
                           &emulated::combine_products<float, double, 2, emulated::bf16_element>, &product);
}
inline void mma_tf32(float (&c)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
  emulated::Product<float> product = {c, a, b};
  emulated::warp_operation("mma_tf32", ~0U,
                           &emulated::combine_products<float, double, 1, emulated::tf32_element>, &product);
}
inline void mma_s8(int32_t (&c)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
  emulated::Product<int32_t> product = {c, a, b};
  emulated::warp_operation("mma_s8", ~0U,
                           &emulated::combine_products<int32_t, int32_t, 4, emulated::s8_element>, &product);
}

inline uint32_t and_xor(uint32_t a, uint32_t b, uint32_t c) { return (a & b) ^ c; }

}  // namespace qwen::cuda
