// Blocks of a cluster (LaunchShape::cluster): they run at once, and write each other's shared memory.
#pragma once

#include "kernels/cuda/primitives.cuh"

namespace qwen::cuda {

// The cluster's barrier in two halves, both called by all threads of all its blocks in turn: what a thread
// wrote before it arrived, in whatever shared memory, all see after they waited. No block may write to
// another that may not have begun, or may have ended: arrive and wait before the first write, and after the
// last. To say that it has begun, cluster_begin() is a quicker cluster_arrive().
#ifdef QWEN_CUDA_EMULATION
inline void cluster_begin() { emulated::cluster_arrive(); }
inline void cluster_arrive() { emulated::cluster_arrive(); }
inline void cluster_wait() { emulated::cluster_wait(); }
#else
__device__ __forceinline__ void cluster_begin() {
#if __CUDA_ARCH__ >= 900
  asm volatile("barrier.cluster.arrive.relaxed;" ::: "memory");
#endif
}
__device__ __forceinline__ void cluster_arrive() {
#if __CUDA_ARCH__ >= 900
  asm volatile("barrier.cluster.arrive.release;" ::: "memory");
#endif
}
__device__ __forceinline__ void cluster_wait() {
#if __CUDA_ARCH__ >= 900
  asm volatile("barrier.cluster.wait.acquire;" ::: "memory");
#endif
}
#endif

#if __CUDA_ARCH__ >= 900
#define QWEN_OF_BLOCK ".shared::cluster"
#else
#define QWEN_OF_BLOCK ".shared"
#endif

// The shared memory of a block of the cluster, at an address in one's own; without a cluster, of block 0.
class BlockMemory {
 public:
#ifdef QWEN_CUDA_EMULATION
  BlockMemory(void* own, int rank)
      : p_(static_cast<unsigned char*>(emulated::of_block(own, static_cast<unsigned>(rank)))) {}
  template <typename T>
  void store(int offset, T v) const {
    *reinterpret_cast<T*>(p_ + offset) = v;
  }

 private:
  unsigned char* p_;
#else
  __device__ __forceinline__ BlockMemory(void* own, int rank) : address_(shared_address(own)) {
#if __CUDA_ARCH__ >= 900
    asm volatile("mapa.shared::cluster.u32 %0, %1, %2;"
                 : "=r"(address_)
                 : "r"(shared_address(own)), "r"(rank));
#endif
  }
  // offset: in bytes.
  __device__ __forceinline__ void store(int offset, float v) const {
    asm volatile("st" QWEN_OF_BLOCK ".f32 [%0], %1;" ::"r"(address_ + offset), "f"(v) : "memory");
  }
  __device__ __forceinline__ void store(int offset, float2 v) const {
    asm volatile("st" QWEN_OF_BLOCK ".v2.f32 [%0], {%1, %2};" ::"r"(address_ + offset), "f"(v.x), "f"(v.y)
                 : "memory");
  }

 private:
  uint32_t address_;
#endif
};

#undef QWEN_OF_BLOCK

}  // namespace qwen::cuda
