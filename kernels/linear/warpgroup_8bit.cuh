// Warpgroup matrix products of 8-bit operands, int8 and e4m3: four warps' 64 rows by 32 columns from
// registers with a tile of shared memory, at twice bfloat16's rate.
#pragma once

#include "kernels/linear/warpgroup.cuh"

#if QWEN_WGMMA

namespace qwen::cuda {

// Column tiles of c as operands.
#define QWEN_SUMS(type, j) "+" type(c[j][0]), "+" type(c[j][1]), "+" type(c[j][2]), "+" type(c[j][3])
#define QWEN_SUMS_2(type, j) QWEN_SUMS(type, j), QWEN_SUMS(type, (j) + 1)
#define QWEN_SUMS_4(type, j) QWEN_SUMS_2(type, j), QWEN_SUMS_2(type, (j) + 2)
#define QWEN_SUMS_8(type, j) QWEN_SUMS_4(type, j), QWEN_SUMS_4(type, (j) + 4)

// c [64, 8 J] = a [64, 32] b [32, 8 J], plus c where accumulate is true: c and a of each warp as of mma_s8,
// the warp's 16 rows by the J column tiles; b is k-major, [8 J][32], at a descriptor of swizzled_tile. int32
// of int8, or float32 of e4m3.
__device__ __forceinline__ void warpgroup_mma_8bit(int32_t (&c)[8][4], const uint32_t (&a)[4], uint64_t b,
                                                   bool accumulate) {
  asm volatile(
      "{\n.reg .pred accumulate;\nsetp.ne.u32 accumulate, %37, 0;\n"
      "wgmma.mma_async.sync.aligned.m64n64k32.s32.s8.s8 {"
      "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, %16, %17, "
      "%18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31}, "
      "{%32, %33, %34, %35}, %36, accumulate;\n}"
      : QWEN_SUMS_8("r", 0)
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "r"(static_cast<uint32_t>(accumulate)));
}
__device__ __forceinline__ void warpgroup_mma_8bit(int32_t (&c)[12][4], const uint32_t (&a)[4], uint64_t b,
                                                   bool accumulate) {
  asm volatile(
      "{\n.reg .pred accumulate;\nsetp.ne.u32 accumulate, %53, 0;\n"
      "wgmma.mma_async.sync.aligned.m64n96k32.s32.s8.s8 {"
      "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, %16, %17, "
      "%18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31, %32, %33, "
      "%34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47}, "
      "{%48, %49, %50, %51}, %52, accumulate;\n}"
      : QWEN_SUMS_8("r", 0), QWEN_SUMS_4("r", 8)
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "r"(static_cast<uint32_t>(accumulate)));
}
__device__ __forceinline__ void warpgroup_mma_8bit(int32_t (&c)[16][4], const uint32_t (&a)[4], uint64_t b,
                                                   bool accumulate) {
  asm volatile(
      "{\n.reg .pred accumulate;\nsetp.ne.u32 accumulate, %69, 0;\n"
      "wgmma.mma_async.sync.aligned.m64n128k32.s32.s8.s8 {"
      "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, %16, %17, "
      "%18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31, %32, %33, "
      "%34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47, %48, %49, "
      "%50, %51, %52, %53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63}, "
      "{%64, %65, %66, %67}, %68, accumulate;\n}"
      : QWEN_SUMS_8("r", 0), QWEN_SUMS_8("r", 8)
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "r"(static_cast<uint32_t>(accumulate)));
}
__device__ __forceinline__ void warpgroup_mma_8bit(float (&c)[8][4], const uint32_t (&a)[4], uint64_t b,
                                                   bool accumulate) {
  asm volatile(
      "{\n.reg .pred accumulate;\nsetp.ne.u32 accumulate, %37, 0;\n"
      "wgmma.mma_async.sync.aligned.m64n64k32.f32.e4m3.e4m3 {"
      "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, %16, %17, "
      "%18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31}, "
      "{%32, %33, %34, %35}, %36, accumulate, 1, 1;\n}"
      : QWEN_SUMS_8("f", 0)
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "r"(static_cast<uint32_t>(accumulate)));
}
__device__ __forceinline__ void warpgroup_mma_8bit(float (&c)[12][4], const uint32_t (&a)[4], uint64_t b,
                                                   bool accumulate) {
  asm volatile(
      "{\n.reg .pred accumulate;\nsetp.ne.u32 accumulate, %53, 0;\n"
      "wgmma.mma_async.sync.aligned.m64n96k32.f32.e4m3.e4m3 {"
      "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, %16, %17, "
      "%18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31, %32, %33, "
      "%34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47}, "
      "{%48, %49, %50, %51}, %52, accumulate, 1, 1;\n}"
      : QWEN_SUMS_8("f", 0), QWEN_SUMS_4("f", 8)
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "r"(static_cast<uint32_t>(accumulate)));
}
__device__ __forceinline__ void warpgroup_mma_8bit(float (&c)[16][4], const uint32_t (&a)[4], uint64_t b,
                                                   bool accumulate) {
  asm volatile(
      "{\n.reg .pred accumulate;\nsetp.ne.u32 accumulate, %69, 0;\n"
      "wgmma.mma_async.sync.aligned.m64n128k32.f32.e4m3.e4m3 {"
      "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, %16, %17, "
      "%18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31, %32, %33, "
      "%34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47, %48, %49, "
      "%50, %51, %52, %53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63}, "
      "{%64, %65, %66, %67}, %68, accumulate, 1, 1;\n}"
      : QWEN_SUMS_8("f", 0), QWEN_SUMS_8("f", 8)
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "r"(static_cast<uint32_t>(accumulate)));
}

#undef QWEN_SUMS_8
#undef QWEN_SUMS_4
#undef QWEN_SUMS_2
#undef QWEN_SUMS

}  // namespace qwen::cuda

#endif  // QWEN_WGMMA
