// What prefill's attention on Hopper computes with, besides what others do, too.
#pragma once

#include "kernels/linear/warpgroup.cuh"

#if QWEN_WGMMA

namespace qwen::cuda::prefill_attention {

// c [64, 80] = or += a [64, 16] b [80, 16]^T, both as swizzled_tile().
#define QWEN_SUMS(j) "+f"(c[j][0]), "+f"(c[j][1]), "+f"(c[j][2]), "+f"(c[j][3])
__device__ __forceinline__ void multiply_tiles(float (&c)[10][4], uint64_t a, uint64_t b, bool accumulate) {
  asm volatile(
      "{\n.reg .pred accumulate;\nsetp.ne.u32 accumulate, %42, 0;\n"
      "wgmma.mma_async.sync.aligned.m64n80k16.f32.bf16.bf16 {"
      "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, "
      "%16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31, "
      "%32, %33, %34, %35, %36, %37, %38, %39}, "
      "%40, %41, accumulate, 1, 1, 0, 0;\n}"
      : QWEN_SUMS(0), QWEN_SUMS(1), QWEN_SUMS(2), QWEN_SUMS(3), QWEN_SUMS(4), QWEN_SUMS(5), QWEN_SUMS(6),
        QWEN_SUMS(7), QWEN_SUMS(8), QWEN_SUMS(9)
      : "l"(a), "l"(b), "r"(static_cast<uint32_t>(accumulate)));
}
#undef QWEN_SUMS

__device__ __forceinline__ float power_of_2(float v) {
  float p;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(p) : "f"(v));
  return p;
}

}  // namespace qwen::cuda::prefill_attention

#endif  // QWEN_WGMMA
