// The machine's own operations, one function each: tensor cores, asynchronous copies, warp reductions, launch
// order. What PTX several kernels need is here and in cluster.cuh, and the CPU emulation (emulation.h) puts
// C++ in its place.
#pragma once

#include <cuda_bf16.h>

#include <cstdint>

#include "kernels/cuda/launch.h"
#include "kernels/cuda/types.h"

#ifdef QWEN_CUDA_EMULATION
#include "kernels/cuda/emulated_primitives.h"
#else

// The block's dynamic shared memory, as bytes called `name`.
#define QWEN_DYNAMIC_SHARED(name) extern __shared__ __align__(128) unsigned char name[]

namespace qwen::cuda {

// See launch.h.
__device__ __forceinline__ void wait_for_previous_kernel() {
#if __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
}
__device__ __forceinline__ void let_next_kernel_start() {
#if __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
#endif
}

// Has the compiler compute a value here, as before a wait, not where it is used.
template <typename T>
__device__ __forceinline__ void settle(T*& v) {
  asm volatile("" : "+l"(v));
}
__device__ __forceinline__ void settle(int& v) { asm volatile("" : "+r"(v)); }
__device__ __forceinline__ void settle(float& v) { asm volatile("" : "+f"(v)); }

// 16 bytes read once: past L1, first out of L2.
__device__ __forceinline__ uint4 load_streaming(const uint4* p) {
  uint4 v;
  asm volatile("ld.global.nc.L1::no_allocate.L2::128B.v4.u32 {%0, %1, %2, %3}, [%4];"
               : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w)
               : "l"(p));
  return v;
}

__device__ __forceinline__ uint32_t shared_address(const void* p) {
  return static_cast<uint32_t>(__cvta_generic_to_shared(p));
}

// 16 bytes from global to shared memory, zeros where `valid` is false (then `from` is not read, but must be a
// pointer into an allocation).
__device__ __forceinline__ void copy_async_16(void* to_shared, const void* from, bool valid = true) {
  const int bytes = valid ? 16 : 0;
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(shared_address(to_shared)), "l"(from),
               "r"(bytes)
               : "memory");
}
__device__ __forceinline__ void copy_async_commit() { asm volatile("cp.async.commit_group;" ::: "memory"); }
// Waits until at most `kPending` of this thread's groups are unfinished; a barrier makes the others' visible.
template <int kPending>
__device__ __forceinline__ void copy_async_wait() {
  asm volatile("cp.async.wait_group %0;" ::"n"(kPending) : "memory");
}

// Four 8x8 matrices of 16-bit elements; lane l gives the address of row l % 8 of matrix l / 8 (16 bytes).
__device__ __forceinline__ void load_matrix_x4(uint32_t (&r)[4], const void* row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
               : "r"(shared_address(row))
               : "memory");
}
__device__ __forceinline__ void load_matrix_x4_transposed(uint32_t (&r)[4], const void* row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
               : "r"(shared_address(row))
               : "memory");
}

// c [16, 8] += a [16, 16] b [16, 8], float32 += bfloat16 pairs. Lane l = 4 r + q holds
// c: (r, 2q), (r, 2q+1), (r+8, 2q), (r+8, 2q+1); a: pairs at (r, 2q), (r+8, 2q), (r, 2q+8), (r+8, 2q+8) along
// k; b: pairs at (2q, r), (2q+8, r) along k.
__device__ __forceinline__ void mma_bf16(float (&c)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
  asm volatile(
      "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
      "{%0, %1, %2, %3};"
      : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}
// c [16, 8] += a [16, 8] b [8, 8], float32 += tf32 (float32 bits, low 13 ignored). c as above; a: (r, q),
// (r+8, q), (r, q+4), (r+8, q+4); b: (q, r), (q+4, r).
__device__ __forceinline__ void mma_tf32(float (&c)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
  asm volatile(
      "mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
      "{%0, %1, %2, %3};"
      : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}
// c [16, 8] += a [16, 32] b [32, 8], int32 += int8. c as above; a: fours along k at (r, 4q), (r+8, 4q), (r,
// 4q+16), (r+8, 4q+16); b: fours at (4q, r), (4q+16, r).
__device__ __forceinline__ void mma_s8(int32_t (&c)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
  asm volatile(
      "mma.sync.aligned.m16n8k32.row.col.s32.s8.s8.s32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
      "{%0, %1, %2, %3};"
      : "+r"(c[0]), "+r"(c[1]), "+r"(c[2]), "+r"(c[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}

// (a & b) ^ c in one instruction.
__device__ __forceinline__ uint32_t and_xor(uint32_t a, uint32_t b, uint32_t c) {
  uint32_t d;
  asm("lop3.b32 %0, %1, %2, %3, 0x6a;" : "=r"(d) : "r"(a), "r"(b), "r"(c));
  return d;
}

}  // namespace qwen::cuda

#endif  // QWEN_CUDA_EMULATION

namespace qwen::cuda {

// Butterflies over groups of `width` lanes (a power of two): every lane gets the result.
__device__ __forceinline__ float warp_sum(float v, int width = 32) {
  for (int offset = width / 2; offset > 0; offset /= 2) v += __shfl_xor_sync(~0U, v, offset);
  return v;
}
__device__ __forceinline__ float warp_max(float v, int width = 32) {
  for (int offset = width / 2; offset > 0; offset /= 2) v = fmaxf(v, __shfl_xor_sync(~0U, v, offset));
  return v;
}

__device__ __forceinline__ uint32_t pack_bf16(float low, float high) {
  const __nv_bfloat162 pair = __floats2bfloat162_rn(low, high);
  return *reinterpret_cast<const uint32_t*>(&pair);
}
// Both by the conversion of a pair: that of one value takes eight times as long.
__device__ __forceinline__ bf16 to_bf16(float v) {
  return __ushort_as_bfloat16(static_cast<unsigned short>(pack_bf16(v, 0.0F)));
}
__device__ __forceinline__ float round_bf16(float v) { return __uint_as_float(pack_bf16(0.0F, v)); }
__device__ __forceinline__ float low_bf16(uint32_t pair) { return __uint_as_float(pair << 16); }
__device__ __forceinline__ float high_bf16(uint32_t pair) { return __uint_as_float(pair & 0xffff0000U); }

// Two codes of an int4 word as exact bfloat16 136 + code: nibble p low, nibble p + 4 high. A product with
// them is the product with the codes plus 136 times the sum of the other side.
__device__ __forceinline__ uint32_t biased_codes(uint32_t word, int p) {
  return and_xor(word >> (4 * p), 0x000f000fU, 0x43084308U);
}

}  // namespace qwen::cuda
