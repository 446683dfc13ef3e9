// Warpgroup matrix products (wgmma), which only code compiled for sm_90a has: four warps multiply 64 rows
// that lie in their registers with a tile of shared memory, at twice the rate of mma.sync and without loading
// fragments of the tile. QWEN_WGMMA says whether this compilation has them.
#pragma once

#include "kernels/cuda/primitives.cuh"

#if defined(__CUDA_ARCH_FEAT_SM90_ALL) && !defined(QWEN_CUDA_EMULATION)
#define QWEN_WGMMA 1
#else
#define QWEN_WGMMA 0
#endif

#if QWEN_WGMMA

namespace qwen::cuda {

// A tile [tokens][64 k] bf16 as wgmma's B operand: rows of 128 bytes, whose 16-byte chunk i lies at i ^ (row
// % 8); `p` is a multiple of 1024. Columns further along k are at the descriptor plus their offset in bytes
// / 16. Its low word, which is all that changes, and the whole.
__device__ __forceinline__ uint32_t swizzled_tile_low(const void* p) {
  return uint32_t{1} << 16 | ((shared_address(p) & 0x3ffffU) >> 4);
}
__device__ __forceinline__ uint64_t swizzled_tile(uint32_t low) {
  constexpr uint32_t kSwizzle128 = uint32_t{1} << 30;
  constexpr uint32_t kEightRows = 1024 / 16;
  return static_cast<uint64_t>(kSwizzle128 | kEightRows) << 32 | low;
}
__device__ __forceinline__ uint64_t swizzled_tile(const void* p) {
  return swizzled_tile(swizzled_tile_low(p));
}

// A tile [kRows k][columns] bf16, blocks of 64 columns one after the other, as the operand of
// warpgroup_mma<true>: swizzled as above. k 16 further is at the descriptor plus 128.
template <int kRows>
__device__ __forceinline__ uint64_t swizzled_columns(const void* p) {
  constexpr uint64_t kBlock = uint64_t{kRows * 128 / 16} << 16;
  return (swizzled_tile(p) & ~(uint64_t{0x3fff} << 16)) | kBlock;
}

// Orders this thread's accesses of the registers before those of the products that follow.
__device__ __forceinline__ void warpgroup_fence() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }
__device__ __forceinline__ void warpgroup_commit() {
  asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory");
}
// Waits until at most `kPending` groups of products run.
template <int kPending>
__device__ __forceinline__ void warpgroup_wait() {
  asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(kPending) : "memory");
}
// Makes this thread's writes of shared memory visible to products that come after the next barrier.
__device__ __forceinline__ void fence_shared_for_products() {
  asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
}

// Column tiles of c as operands.
#define QWEN_SUMS(j) "+f"(c[j][0]), "+f"(c[j][1]), "+f"(c[j][2]), "+f"(c[j][3])
#define QWEN_SUMS_2(j) QWEN_SUMS(j), QWEN_SUMS((j) + 1)
#define QWEN_SUMS_4(j) QWEN_SUMS_2(j), QWEN_SUMS_2((j) + 2)
#define QWEN_SUMS_8(j) QWEN_SUMS_4(j), QWEN_SUMS_4((j) + 4)
#define QWEN_SUMS_16(j) QWEN_SUMS_8(j), QWEN_SUMS_8((j) + 8)

// c [64, 8 J] += a [64, 16] b [16, 8 J]: c and a of each warp as of mma_bf16, the warp's 16 rows by the J
// column tiles; b is k-major, [8 J][16], or with kColumns that of swizzled_columns, [16][8 J].
__device__ __forceinline__ void warpgroup_mma(float (&c)[2][4], const uint32_t (&a)[4], uint64_t b) {
  asm volatile(
      "{\n.reg .pred accumulate;\nsetp.eq.u32 accumulate, 0, 0;\n"
      "wgmma.mma_async.sync.aligned.m64n16k16.f32.bf16.bf16 {"
      "%0, %1, %2, %3, %4, %5, %6, %7}, "
      "{%8, %9, %10, %11}, %12, accumulate, 1, 1, 0;\n}"
      : QWEN_SUMS_2(0)
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b));
}
__device__ __forceinline__ void warpgroup_mma(float (&c)[4][4], const uint32_t (&a)[4], uint64_t b) {
  asm volatile(
      "{\n.reg .pred accumulate;\nsetp.eq.u32 accumulate, 0, 0;\n"
      "wgmma.mma_async.sync.aligned.m64n32k16.f32.bf16.bf16 {"
      "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15}, "
      "{%16, %17, %18, %19}, %20, accumulate, 1, 1, 0;\n}"
      : QWEN_SUMS_4(0)
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b));
}
__device__ __forceinline__ void warpgroup_mma(float (&c)[6][4], const uint32_t (&a)[4], uint64_t b) {
  asm volatile(
      "{\n.reg .pred accumulate;\nsetp.eq.u32 accumulate, 0, 0;\n"
      "wgmma.mma_async.sync.aligned.m64n48k16.f32.bf16.bf16 {"
      "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, %16, %17, %18, "
      "%19, %20, %21, %22, %23}, "
      "{%24, %25, %26, %27}, %28, accumulate, 1, 1, 0;\n}"
      : QWEN_SUMS_4(0), QWEN_SUMS_2(4)
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b));
}
template <bool kColumns = false>
__device__ __forceinline__ void warpgroup_mma(float (&c)[8][4], const uint32_t (&a)[4], uint64_t b) {
  asm volatile(
      "{\n.reg .pred accumulate;\nsetp.eq.u32 accumulate, 0, 0;\n"
      "wgmma.mma_async.sync.aligned.m64n64k16.f32.bf16.bf16 {"
      "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, %16, %17, "
      "%18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31}, "
      "{%32, %33, %34, %35}, %36, accumulate, 1, 1, %37;\n}"
      : QWEN_SUMS_8(0)
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "n"(kColumns ? 1 : 0));
}
__device__ __forceinline__ void warpgroup_mma(float (&c)[10][4], const uint32_t (&a)[4], uint64_t b) {
  asm volatile(
      "{\n.reg .pred accumulate;\nsetp.eq.u32 accumulate, 0, 0;\n"
      "wgmma.mma_async.sync.aligned.m64n80k16.f32.bf16.bf16 {"
      "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, %16, %17, "
      "%18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31, %32, %33, "
      "%34, %35, %36, %37, %38, %39}, "
      "{%40, %41, %42, %43}, %44, accumulate, 1, 1, 0;\n}"
      : QWEN_SUMS_8(0), QWEN_SUMS_2(8)
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b));
}
__device__ __forceinline__ void warpgroup_mma(float (&c)[12][4], const uint32_t (&a)[4], uint64_t b) {
  asm volatile(
      "{\n.reg .pred accumulate;\nsetp.eq.u32 accumulate, 0, 0;\n"
      "wgmma.mma_async.sync.aligned.m64n96k16.f32.bf16.bf16 {"
      "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, %16, %17, "
      "%18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31, %32, %33, "
      "%34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47}, "
      "{%48, %49, %50, %51}, %52, accumulate, 1, 1, 0;\n}"
      : QWEN_SUMS_8(0), QWEN_SUMS_4(8)
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b));
}
__device__ __forceinline__ void warpgroup_mma(float (&c)[14][4], const uint32_t (&a)[4], uint64_t b) {
  asm volatile(
      "{\n.reg .pred accumulate;\nsetp.eq.u32 accumulate, 0, 0;\n"
      "wgmma.mma_async.sync.aligned.m64n112k16.f32.bf16.bf16 {"
      "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, %16, %17, %18, "
      "%19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31, %32, %33, %34, %35, "
      "%36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47, %48, %49, %50, %51, %52, "
      "%53, %54, %55}, "
      "{%56, %57, %58, %59}, %60, accumulate, 1, 1, 0;\n}"
      : QWEN_SUMS_8(0), QWEN_SUMS_4(8), QWEN_SUMS_2(12)
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b));
}
template <bool kColumns = false>
__device__ __forceinline__ void warpgroup_mma(float (&c)[16][4], const uint32_t (&a)[4], uint64_t b) {
  asm volatile(
      "{\n.reg .pred accumulate;\nsetp.eq.u32 accumulate, 0, 0;\n"
      "wgmma.mma_async.sync.aligned.m64n128k16.f32.bf16.bf16 {"
      "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, %16, %17, "
      "%18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31, %32, %33, "
      "%34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47, %48, %49, "
      "%50, %51, %52, %53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63}, "
      "{%64, %65, %66, %67}, %68, accumulate, 1, 1, %69;\n}"
      : QWEN_SUMS_16(0)
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "n"(kColumns ? 1 : 0));
}
template <bool kColumns = false>
__device__ __forceinline__ void warpgroup_mma(float (&c)[32][4], const uint32_t (&a)[4], uint64_t b) {
  asm volatile(
      "{\n.reg .pred accumulate;\nsetp.eq.u32 accumulate, 0, 0;\n"
      "wgmma.mma_async.sync.aligned.m64n256k16.f32.bf16.bf16 {"
      "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, %16, %17, "
      "%18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31, %32, %33, "
      "%34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47, %48, %49, "
      "%50, %51, %52, %53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63, %64, %65, "
      "%66, %67, %68, %69, %70, %71, %72, %73, %74, %75, %76, %77, %78, %79, %80, %81, "
      "%82, %83, %84, %85, %86, %87, %88, %89, %90, %91, %92, %93, %94, %95, %96, %97, "
      "%98, %99, %100, %101, %102, %103, %104, %105, %106, %107, %108, %109, %110, %111, "
      "%112, %113, %114, %115, %116, %117, %118, %119, %120, %121, %122, %123, %124, %125, "
      "%126, %127}, "
      "{%128, %129, %130, %131}, %132, accumulate, 1, 1, %133;\n}"
      : QWEN_SUMS_16(0), QWEN_SUMS_16(16)
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "n"(kColumns ? 1 : 0));
}

#undef QWEN_SUMS_16
#undef QWEN_SUMS_8
#undef QWEN_SUMS_4
#undef QWEN_SUMS_2
#undef QWEN_SUMS

}  // namespace qwen::cuda

#endif  // QWEN_WGMMA
