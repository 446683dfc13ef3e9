#include "kernels/vector.h"

#include <cstdlib>
#include <cstring>

#if defined(__x86_64__)
#include <immintrin.h>
#elif defined(__aarch64__)
#include <arm_neon.h>
#endif

#if defined(__x86_64__)

// The unmasked conversions read an undefined vector in GCC 12's headers, and it warns of that.
static constexpr __mmask16 kAllLanes = 0xFFFF;

#define QWEN_ISA v4
#define QWEN_ISA_NAME "v4"
#define QWEN_LANES 16
#define QWEN_TARGET __attribute__((target("avx512f,avx512bw,avx512dq,avx512vl,avx2,fma")))
#define QWEN_FMA(a, b, c) ((Vec)_mm512_fmadd_ps((__m512)(a), (__m512)(b), (__m512)(c)))
#define QWEN_LOAD_U8(p) ((Ints)_mm512_maskz_cvtepu8_epi32(kAllLanes, _mm_loadu_si128((const __m128i*)(p))))
#define QWEN_LOAD_I8(p) ((Ints)_mm512_maskz_cvtepi8_epi32(kAllLanes, _mm_loadu_si128((const __m128i*)(p))))
#define QWEN_WIDEN_U16(h) ((Words)_mm512_maskz_cvtepu16_epi32(kAllLanes, (__m256i)(h)))
#include "kernels/vector_loops.inc"

#define QWEN_ISA v3
#define QWEN_ISA_NAME "v3"
#define QWEN_LANES 8
#define QWEN_TARGET __attribute__((target("avx2,fma")))
#define QWEN_FMA(a, b, c) ((Vec)_mm256_fmadd_ps((__m256)(a), (__m256)(b), (__m256)(c)))
#define QWEN_LOAD_U8(p) ((Ints)_mm256_cvtepu8_epi32(_mm_loadl_epi64((const __m128i*)(p))))
#define QWEN_LOAD_I8(p) ((Ints)_mm256_cvtepi8_epi32(_mm_loadl_epi64((const __m128i*)(p))))
#define QWEN_WIDEN_U16(h) ((Words)_mm256_cvtepu16_epi32((__m128i)(h)))
#include "kernels/vector_loops.inc"

#endif

#define QWEN_ISA base
#define QWEN_ISA_NAME "base"
#define QWEN_LANES 4
#define QWEN_TARGET
#if defined(__aarch64__)
#define QWEN_FMA(a, b, c) ((Vec)vfmaq_f32((float32x4_t)(c), (float32x4_t)(a), (float32x4_t)(b)))
#else
#define QWEN_FMA(a, b, c) ((a) * (b) + (c))
#endif
#define QWEN_LOAD_U8(p) __builtin_convertvector(load<Bytes>(p), Ints)
#define QWEN_LOAD_I8(p) __builtin_convertvector(load<SignedBytes>(p), Ints)
#define QWEN_WIDEN_U16(h) __builtin_convertvector(h, Words)
#include "kernels/vector_loops.inc"

namespace qwen::cpu {
namespace {

const VectorOps& choose() {
#if defined(__x86_64__)
  const char* wanted = std::getenv("QWEN_CPU_ISA");
  const bool only_base = wanted != nullptr && std::strcmp(wanted, "base") == 0;
  const bool at_most_v3 = only_base || (wanted != nullptr && std::strcmp(wanted, "v3") == 0);
  __builtin_cpu_init();
  const bool has_v3 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
  const bool has_v4 = has_v3 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                      __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
  if (has_v4 && !at_most_v3) {
    return v4::kOps;
  }
  if (has_v3 && !only_base) {
    return v3::kOps;
  }
#endif
  return base::kOps;
}

}  // namespace

const VectorOps& vector_ops() {
  static const VectorOps& chosen = choose();
  return chosen;
}

}  // namespace qwen::cpu
