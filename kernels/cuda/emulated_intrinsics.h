// CUDA's built-in functions for emulation: those that cuda_bf16.h and cuda_fp16.h do not give a host
// compiler.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <math.h>
#include <string.h>

#include <algorithm>
#include <bit>
#include <concepts>
#include <cstdint>
#include <limits>
#include <type_traits>

#include "kernels/cuda/emulation.h"

// Barriers and fences.

inline void __syncthreads() { qwen::cuda::emulated::block_barrier(qwen::cuda::emulated::Vote::kCount, 0); }
inline int __syncthreads_count(int predicate) {
  return qwen::cuda::emulated::block_barrier(qwen::cuda::emulated::Vote::kCount, predicate);
}
inline int __syncthreads_and(int predicate) {
  return qwen::cuda::emulated::block_barrier(qwen::cuda::emulated::Vote::kAnd, predicate);
}
inline int __syncthreads_or(int predicate) {
  return qwen::cuda::emulated::block_barrier(qwen::cuda::emulated::Vote::kOr, predicate);
}
inline void __syncwarp(unsigned mask = ~0U) {
  qwen::cuda::emulated::warp_operation("__syncwarp", mask, nullptr, nullptr);
}
inline void __threadfence() {}
inline void __threadfence_block() {}
inline void __threadfence_system() {}

// Warp operations.

namespace qwen::cuda::emulated {

template <typename T>
struct Exchange {
  T value;
  unsigned source;  // lane
  T result;
};

template <typename T>
T exchange(const char* name, unsigned mask, T value, unsigned source) {
  Exchange<T> own = {value, source, value};
  warp_operation(
      name, mask,
      [](void* const(&arguments)[32], uint32_t lanes) {
        for (unsigned l = 0; l < 32; ++l) {
          if ((lanes >> l & 1) == 0) continue;
          auto& to = *static_cast<Exchange<T>*>(arguments[l]);
          if (to.source >= 32 || (lanes >> to.source & 1) == 0)
            fail("a shuffle from a lane outside its mask");
          to.result = static_cast<Exchange<T>*>(arguments[to.source])->value;
        }
      },
      &own);
  return own.result;
}

// All lanes of the mask get combine(a, b) over their values, from the lowest lane on.
template <auto kCombine, typename T>
T reduce(const char* name, unsigned mask, T value) {
  T own = value;
  warp_operation(
      name, mask,
      [](void* const(&arguments)[32], uint32_t lanes) {
        T result = *static_cast<T*>(arguments[std::countr_zero(lanes)]);
        for (unsigned l = std::countr_zero(lanes) + 1; l < 32; ++l) {
          if ((lanes >> l & 1) != 0) result = kCombine(result, *static_cast<T*>(arguments[l]));
        }
        for (unsigned l = 0; l < 32; ++l) {
          if ((lanes >> l & 1) != 0) *static_cast<T*>(arguments[l]) = result;
        }
      },
      &own);
  return own;
}

}  // namespace qwen::cuda::emulated

template <typename T>
T __shfl_sync(unsigned mask, T value, int source, int width = 32) {
  const unsigned l = qwen::cuda::emulated::lane();
  return qwen::cuda::emulated::exchange("__shfl_sync", mask, value, (l & -width) + (source & (width - 1)));
}
template <typename T>
T __shfl_up_sync(unsigned mask, T value, unsigned delta, int width = 32) {
  const unsigned l = qwen::cuda::emulated::lane();
  const unsigned within = l & (width - 1);
  return qwen::cuda::emulated::exchange("__shfl_up_sync", mask, value, within < delta ? l : l - delta);
}
template <typename T>
T __shfl_down_sync(unsigned mask, T value, unsigned delta, int width = 32) {
  const unsigned l = qwen::cuda::emulated::lane();
  const unsigned within = l & (width - 1);
  return qwen::cuda::emulated::exchange("__shfl_down_sync", mask, value,
                                        within + delta >= static_cast<unsigned>(width) ? l : l + delta);
}
template <typename T>
T __shfl_xor_sync(unsigned mask, T value, int lanes, int width = 32) {
  const unsigned l = qwen::cuda::emulated::lane();
  const unsigned source = l ^ static_cast<unsigned>(lanes);
  // A source in a later segment is out of range; one in an earlier is not.
  const unsigned end = (l & -width) + width;
  return qwen::cuda::emulated::exchange("__shfl_xor_sync", mask, value, source >= end ? l : source);
}
inline unsigned __ballot_sync(unsigned mask, int predicate) {
  const unsigned own = predicate != 0 ? 1U << qwen::cuda::emulated::lane() : 0;
  return qwen::cuda::emulated::reduce<[](unsigned a, unsigned b) { return a | b; }>("__ballot_sync", mask,
                                                                                    own);
}
inline int __any_sync(unsigned mask, int predicate) {
  return qwen::cuda::emulated::reduce<[](int a, int b) { return a | b; }>("__any_sync", mask,
                                                                          predicate != 0 ? 1 : 0);
}
inline int __all_sync(unsigned mask, int predicate) {
  return qwen::cuda::emulated::reduce<[](int a, int b) { return a & b; }>("__all_sync", mask,
                                                                          predicate != 0 ? 1 : 0);
}
template <typename T>
unsigned __match_any_sync(unsigned mask, T value) {
  unsigned same = 0;
  for (unsigned l = 0; l < 32; ++l) {
    const unsigned lanes = mask & qwen::cuda::emulated::warp_lanes();
    if ((lanes >> l & 1) != 0 && __shfl_sync(mask, value, static_cast<int>(l)) == value) same |= 1U << l;
  }
  return same;
}
template <typename T>
T __reduce_add_sync(unsigned mask, T value) {
  return qwen::cuda::emulated::reduce<[](T a, T b) { return static_cast<T>(a + b); }>("__reduce_add_sync",
                                                                                      mask, value);
}
template <typename T>
T __reduce_min_sync(unsigned mask, T value) {
  return qwen::cuda::emulated::reduce<[](T a, T b) { return b < a ? b : a; }>("__reduce_min_sync", mask,
                                                                              value);
}
template <typename T>
T __reduce_max_sync(unsigned mask, T value) {
  return qwen::cuda::emulated::reduce<[](T a, T b) { return a < b ? b : a; }>("__reduce_max_sync", mask,
                                                                              value);
}
inline unsigned __reduce_and_sync(unsigned mask, unsigned value) {
  return qwen::cuda::emulated::reduce<[](unsigned a, unsigned b) { return a & b; }>("__reduce_and_sync", mask,
                                                                                    value);
}
inline unsigned __reduce_or_sync(unsigned mask, unsigned value) {
  return qwen::cuda::emulated::reduce<[](unsigned a, unsigned b) { return a | b; }>("__reduce_or_sync", mask,
                                                                                    value);
}
inline unsigned __reduce_xor_sync(unsigned mask, unsigned value) {
  return qwen::cuda::emulated::reduce<[](unsigned a, unsigned b) { return a ^ b; }>("__reduce_xor_sync", mask,
                                                                                    value);
}

// Memory.

// Fibers switch only where they wait, so that plain operations are atomic.
template <typename T, typename Change>
T qwen_emulated_atomic(T* p, Change change) {
  const T old = *p;
  *p = change(old);
  return old;
}
template <typename T>
T atomicAdd(T* p, std::type_identity_t<T> v) {
  return qwen_emulated_atomic(p, [&](T old) { return static_cast<T>(old + v); });
}
template <typename T>
T atomicSub(T* p, std::type_identity_t<T> v) {
  return qwen_emulated_atomic(p, [&](T old) { return static_cast<T>(old - v); });
}
template <typename T>
T atomicExch(T* p, std::type_identity_t<T> v) {
  return qwen_emulated_atomic(p, [&](T) { return v; });
}
template <typename T>
T atomicMin(T* p, std::type_identity_t<T> v) {
  return qwen_emulated_atomic(p, [&](T old) { return v < old ? v : old; });
}
template <typename T>
T atomicMax(T* p, std::type_identity_t<T> v) {
  return qwen_emulated_atomic(p, [&](T old) { return old < v ? v : old; });
}
template <typename T>
T atomicAnd(T* p, std::type_identity_t<T> v) {
  return qwen_emulated_atomic(p, [&](T old) { return old & v; });
}
template <typename T>
T atomicOr(T* p, std::type_identity_t<T> v) {
  return qwen_emulated_atomic(p, [&](T old) { return old | v; });
}
template <typename T>
T atomicXor(T* p, std::type_identity_t<T> v) {
  return qwen_emulated_atomic(p, [&](T old) { return old ^ v; });
}
template <typename T>
T atomicCAS(T* p, std::type_identity_t<T> expected, std::type_identity_t<T> v) {
  return qwen_emulated_atomic(p, [&](T old) { return old == expected ? v : old; });
}
inline unsigned atomicInc(unsigned* p, unsigned limit) {
  return qwen_emulated_atomic(p, [&](unsigned old) { return old >= limit ? 0 : old + 1; });
}
inline unsigned atomicDec(unsigned* p, unsigned limit) {
  return qwen_emulated_atomic(p, [&](unsigned old) { return old == 0 || old > limit ? limit : old - 1; });
}

template <typename T>
T __ldg(const T* p) {
  return *p;
}
template <typename T>
T __ldca(const T* p) {
  return *p;
}
template <typename T>
T __ldcg(const T* p) {
  return *p;
}
template <typename T>
T __ldcs(const T* p) {
  return *p;
}
template <typename T>
T __ldlu(const T* p) {
  return *p;
}
template <typename T>
T __ldcv(const T* p) {
  return *p;
}
template <typename T>
void __stcg(T* p, std::type_identity_t<T> v) {
  *p = v;
}
template <typename T>
void __stcs(T* p, std::type_identity_t<T> v) {
  *p = v;
}
template <typename T>
void __stwb(T* p, std::type_identity_t<T> v) {
  *p = v;
}
template <typename T>
void __stwt(T* p, std::type_identity_t<T> v) {
  *p = v;
}

// Integers and bits.

template <typename A, typename B>
  requires(std::is_arithmetic_v<A> && std::is_arithmetic_v<B>)
constexpr std::common_type_t<A, B> min(A a, B b) {
  using T = std::common_type_t<A, B>;
  if constexpr (std::floating_point<T>) {
    return static_cast<T>(__builtin_fmin(a, b));
  } else {
    return static_cast<T>(b) < static_cast<T>(a) ? static_cast<T>(b) : static_cast<T>(a);
  }
}
template <typename A, typename B>
  requires(std::is_arithmetic_v<A> && std::is_arithmetic_v<B>)
constexpr std::common_type_t<A, B> max(A a, B b) {
  using T = std::common_type_t<A, B>;
  if constexpr (std::floating_point<T>) {
    return static_cast<T>(__builtin_fmax(a, b));
  } else {
    return static_cast<T>(a) < static_cast<T>(b) ? static_cast<T>(b) : static_cast<T>(a);
  }
}

inline int __popc(unsigned x) { return std::popcount(x); }
inline int __popcll(unsigned long long x) { return std::popcount(x); }
inline int __clz(int x) { return std::countl_zero(static_cast<unsigned>(x)); }
inline int __clzll(long long x) { return std::countl_zero(static_cast<unsigned long long>(x)); }
inline int __ffs(int x) { return __builtin_ffs(x); }
inline int __ffsll(long long x) { return __builtin_ffsll(x); }
inline unsigned __brev(unsigned x) {
  unsigned y = 0;
  for (int i = 0; i < 32; ++i) y |= (x >> i & 1) << (31 - i);
  return y;
}
inline unsigned __umulhi(unsigned a, unsigned b) { return static_cast<unsigned>((uint64_t{a} * b) >> 32); }
inline int __mulhi(int a, int b) { return static_cast<int>((int64_t{a} * b) >> 32); }
inline unsigned long long __umul64hi(unsigned long long a, unsigned long long b) {
  return static_cast<unsigned long long>((static_cast<unsigned __int128>(a) * b) >> 64);
}
inline unsigned __funnelshift_l(unsigned low, unsigned high, unsigned shift) {
  return static_cast<unsigned>((uint64_t{high} << 32 | low) << (shift & 31) >> 32);
}
inline unsigned __funnelshift_r(unsigned low, unsigned high, unsigned shift) {
  return static_cast<unsigned>((uint64_t{high} << 32 | low) >> (shift & 31));
}
inline unsigned __byte_perm(unsigned x, unsigned y, unsigned selector) {
  const uint64_t bytes = uint64_t{y} << 32 | x;
  unsigned result = 0;
  for (int i = 0; i < 4; ++i) {
    const unsigned code = selector >> (4 * i) & 0xf;
    unsigned byte = bytes >> (8 * (code & 7)) & 0xff;
    if (code >= 8) byte = (byte & 0x80) != 0 ? 0xff : 0;
    result |= byte << (8 * i);
  }
  return result;
}
inline int __dp4a(int a, int b, int c) {
  for (int i = 0; i < 4; ++i) c += static_cast<int8_t>(a >> (8 * i)) * static_cast<int8_t>(b >> (8 * i));
  return c;
}
inline unsigned __dp4a(unsigned a, unsigned b, unsigned c) {
  for (int i = 0; i < 4; ++i) c += (a >> (8 * i) & 0xff) * (b >> (8 * i) & 0xff);
  return c;
}

// Floats.

inline unsigned __float_as_uint(float x) { return std::bit_cast<unsigned>(x); }
inline int __float_as_int(float x) { return std::bit_cast<int>(x); }
inline float __uint_as_float(unsigned x) { return std::bit_cast<float>(x); }
inline float __int_as_float(int x) { return std::bit_cast<float>(x); }
inline long long __double_as_longlong(double x) { return std::bit_cast<long long>(x); }
inline double __longlong_as_double(long long x) { return std::bit_cast<double>(x); }

inline float __expf(float x) { return expf(x); }
inline float __exp10f(float x) { return powf(10.0F, x); }
inline float __logf(float x) { return logf(x); }
inline float __log2f(float x) { return log2f(x); }
inline float __log10f(float x) { return log10f(x); }
inline float __powf(float x, float y) { return powf(x, y); }
inline float __sinf(float x) { return sinf(x); }
inline float __cosf(float x) { return cosf(x); }
inline void __sincosf(float x, float* s, float* c) {
  *s = sinf(x);
  *c = cosf(x);
}
inline float __tanf(float x) { return tanf(x); }
inline float __fdividef(float a, float b) { return a / b; }
inline float __fdiv_rn(float a, float b) { return a / b; }
inline float __frcp_rn(float x) { return 1.0F / x; }
inline float __fsqrt_rn(float x) { return sqrtf(x); }
inline float __frsqrt_rn(float x) { return static_cast<float>(1.0 / sqrt(static_cast<double>(x))); }
inline float __fadd_rn(float a, float b) { return a + b; }
inline float __fsub_rn(float a, float b) { return a - b; }
inline float __fmul_rn(float a, float b) { return a * b; }
inline float __fmaf_rn(float a, float b, float c) { return fmaf(a, b, c); }
inline float __saturatef(float x) { return x > 0 ? (x < 1 ? x : 1.0F) : 0.0F; }
inline float rsqrtf(float x) { return static_cast<float>(1.0 / sqrt(static_cast<double>(x))); }
inline double rsqrt(double x) { return 1.0 / sqrt(x); }
inline float sinpif(float x) { return static_cast<float>(sin(M_PI * static_cast<double>(x))); }
inline float cospif(float x) { return static_cast<float>(cos(M_PI * static_cast<double>(x))); }

// A conversion saturates, and takes NaN to zero.
template <typename T>
T qwen_emulated_convert(double x) {
  if (x != x) return 0;
  if (x <= static_cast<double>(std::numeric_limits<T>::min())) return std::numeric_limits<T>::min();
  if (x >= static_cast<double>(std::numeric_limits<T>::max())) return std::numeric_limits<T>::max();
  return static_cast<T>(x);
}
inline int __float2int_rn(float x) { return qwen_emulated_convert<int>(nearbyint(x)); }
inline int __float2int_rz(float x) { return qwen_emulated_convert<int>(trunc(x)); }
inline int __float2int_rd(float x) { return qwen_emulated_convert<int>(floor(x)); }
inline int __float2int_ru(float x) { return qwen_emulated_convert<int>(ceil(x)); }
inline unsigned __float2uint_rn(float x) { return qwen_emulated_convert<unsigned>(nearbyint(x)); }
inline unsigned __float2uint_rz(float x) { return qwen_emulated_convert<unsigned>(trunc(x)); }
inline float __int2float_rn(int x) { return static_cast<float>(x); }
inline float __uint2float_rn(unsigned x) { return static_cast<float>(x); }
inline float __ll2float_rn(long long x) { return static_cast<float>(x); }
inline float __ull2float_rn(unsigned long long x) { return static_cast<float>(x); }

// cuda_bf16.h and cuda_fp16.h give these to device code alone. A float product of two of their values is
// exact, a double holds the sum with the third.
inline __nv_bfloat16 __hfma(__nv_bfloat16 a, __nv_bfloat16 b, __nv_bfloat16 c) {
  return __double2bfloat16(static_cast<double>(__bfloat162float(a)) * __bfloat162float(b) +
                           __bfloat162float(c));
}
inline __half __hfma(__half a, __half b, __half c) {
  return __double2half(static_cast<double>(__half2float(a)) * __half2float(b) + __half2float(c));
}
inline __nv_bfloat162 __hfma2(__nv_bfloat162 a, __nv_bfloat162 b, __nv_bfloat162 c) {
  return {__hfma(a.x, b.x, c.x), __hfma(a.y, b.y, c.y)};
}
inline __half2 __hfma2(__half2 a, __half2 b, __half2 c) {
  return {__hfma(a.x, b.x, c.x), __hfma(a.y, b.y, c.y)};
}
