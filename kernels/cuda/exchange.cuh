// Words that blocks of one kernel hand each other through L2, without flags, fences or barriers of the grid.
//
// A word that is not there yet is all ones: as float32 a NaN that arithmetic never makes, as a pair of
// bfloat16 two NaNs that rounding never makes. Who makes a word publishes it, once; who needs it polls it
// until it is there. So all blocks must be resident at once (launch_together), and an area of words must be
// cleared by an earlier kernel.
//
// Nothing else is ordered: a word that is there says nothing of other words, nor of plain stores before it.
// Both sides first call wait_for_previous_kernel(). Emulation finds a word that is published twice between
// two clears, words used before that wait, and words that are awaited and never published.
#pragma once

#include <cstdint>

#include "kernels/cuda/primitives.cuh"

namespace qwen::cuda {

inline constexpr uint32_t kAbsent = 0xffffffffU;

namespace exchange {

// Stores may not write kAbsent, or who awaits the word would hang: a NaN stays one, with another payload.
__device__ __forceinline__ uint32_t present(uint32_t v) { return v < kAbsent ? v : kAbsent - 1; }

__device__ __forceinline__ bool is_absent(uint32_t v) { return v == kAbsent; }
__device__ __forceinline__ bool is_absent(const uint4& v) {
  return v.x == kAbsent || v.y == kAbsent || v.z == kAbsent || v.w == kAbsent;
}

#ifdef QWEN_CUDA_EMULATION

inline void store(uint32_t* to, uint32_t v) { emulated::publish(to, &v, 1); }
inline void store(uint2* to, uint2 v) { emulated::publish(to, &v, 2); }
inline void store(uint4* to, uint4 v) { emulated::publish(to, &v, 4); }

// v = *from, if `wanted`.
inline void load(uint32_t& v, const uint32_t* from, bool wanted) {
  if (wanted) emulated::load_published(&v, from, 1);
}
inline void load(uint4& v, const uint4* from, bool wanted) {
  if (wanted) emulated::load_published(&v, from, 4);
}

#else

// No "memory" clobbers: relaxed accesses order nothing, and volatile keeps them in order among themselves and
// with wait_for_previous_kernel().
__device__ __forceinline__ void store(uint32_t* to, uint32_t v) {
  asm volatile("st.relaxed.gpu.global.b32 [%0], %1;" ::"l"(to), "r"(v));
}
__device__ __forceinline__ void store(uint2* to, uint2 v) {
  asm volatile("st.relaxed.gpu.global.v2.b32 [%0], {%1, %2};" ::"l"(to), "r"(v.x), "r"(v.y));
}
__device__ __forceinline__ void store(uint4* to, uint4 v) {
  asm volatile("st.relaxed.gpu.global.v4.b32 [%0], {%1, %2, %3, %4};" ::"l"(to), "r"(v.x), "r"(v.y), "r"(v.z),
               "r"(v.w));
}

// v = *from, if `wanted`: a predicate and not a branch, so that many are in flight.
__device__ __forceinline__ void load(uint32_t& v, const uint32_t* from, bool wanted) {
  asm volatile(
      "{\n"
      ".reg .pred wanted;\n"
      "setp.ne.b32 wanted, %2, 0;\n"
      "@wanted ld.relaxed.gpu.global.b32 %0, [%1];\n"
      "}"
      : "+r"(v)
      : "l"(from), "r"(static_cast<int>(wanted)));
}
__device__ __forceinline__ void load(uint4& v, const uint4* from, bool wanted) {
  asm volatile(
      "{\n"
      ".reg .pred wanted;\n"
      "setp.ne.b32 wanted, %5, 0;\n"
      "@wanted ld.relaxed.gpu.global.v4.b32 {%0, %1, %2, %3}, [%4];\n"
      "}"
      : "+r"(v.x), "+r"(v.y), "+r"(v.z), "+r"(v.w)
      : "l"(from), "r"(static_cast<int>(wanted)));
}

#endif

template <typename T, int N>
__device__ __forceinline__ void await(T (&v)[N], const T* const (&from)[N]) {
#pragma unroll
  for (int i = 0; i < N; ++i) {
    v[i] = {};
    load(v[i], from[i], true);
  }
  while (true) {
    bool absent[N];
    bool any = false;
#pragma unroll
    for (int i = 0; i < N; ++i) {
      absent[i] = is_absent(v[i]);
      any |= absent[i];
    }
    if (!any) return;
#ifdef QWEN_CUDA_EMULATION
    int i = 0;
    while (!absent[i]) ++i;
    emulated::poll_again(from[i]);
#endif
#pragma unroll
    for (int i = 0; i < N; ++i) load(v[i], from[i], absent[i]);
  }
}

__device__ __forceinline__ float4 as_floats(const uint4& v) {
  return make_float4(__uint_as_float(v.x), __uint_as_float(v.y), __uint_as_float(v.z), __uint_as_float(v.w));
}

}  // namespace exchange

// Each word of a vector becomes visible on its own.
__device__ __forceinline__ void publish(uint32_t* to, uint32_t v) {
  exchange::store(to, exchange::present(v));
}
__device__ __forceinline__ void publish(uint2* to, uint2 v) {
  exchange::store(to, make_uint2(exchange::present(v.x), exchange::present(v.y)));
}
__device__ __forceinline__ void publish(uint4* to, uint4 v) {
  exchange::store(to, make_uint4(exchange::present(v.x), exchange::present(v.y), exchange::present(v.z),
                                 exchange::present(v.w)));
}
__device__ __forceinline__ void publish(float* to, float v) {
  publish(reinterpret_cast<uint32_t*>(to), __float_as_uint(v));
}
__device__ __forceinline__ void publish(float4* to, float4 v) {
  publish(reinterpret_cast<uint4*>(to),
          make_uint4(__float_as_uint(v.x), __float_as_uint(v.y), __float_as_uint(v.z), __float_as_uint(v.w)));
}

// Waits until all words are there: all N loads in flight, then again those that lacked a word. Each thread
// for itself: before an operation of the whole warp, __syncwarp().
template <int N>
__device__ __forceinline__ void await(uint4 (&v)[N], const uint4* const (&from)[N]) {
  exchange::await(v, from);
}
template <int N>
__device__ __forceinline__ void await(uint32_t (&v)[N], const uint32_t* const (&from)[N]) {
  exchange::await(v, from);
}
__device__ __forceinline__ uint4 await(const uint4* from) {
  const uint4* const all[1] = {from};
  uint4 v[1];
  exchange::await(v, all);
  return v[0];
}
__device__ __forceinline__ uint32_t await(const uint32_t* from) {
  const uint32_t* const all[1] = {from};
  uint32_t v[1];
  exchange::await(v, all);
  return v[0];
}
__device__ __forceinline__ float await(const float* from) {
  return __uint_as_float(await(reinterpret_cast<const uint32_t*>(from)));
}
__device__ __forceinline__ float4 await(const float4* from) {
  return exchange::as_floats(await(reinterpret_cast<const uint4*>(from)));
}

// Makes all words of an area absent, for the next kernel of the stream: called by all threads (blockDim.x) of
// `blocks` blocks after wait_for_previous_kernel(). area: [words16] of 16 bytes.
__device__ __forceinline__ void clear_exchange(uint4* area, int words16, int block, int blocks) {
#ifdef QWEN_CUDA_EMULATION
  emulated::require_wait("clear_exchange");
#endif
  const uint4 absent = make_uint4(kAbsent, kAbsent, kAbsent, kAbsent);
  const int threads = static_cast<int>(blockDim.x);
#pragma unroll 1  // else it divides to know how often
  for (int i = block * threads + static_cast<int>(threadIdx.x); i < words16; i += blocks * threads) {
    area[i] = absent;
  }
}

}  // namespace qwen::cuda
