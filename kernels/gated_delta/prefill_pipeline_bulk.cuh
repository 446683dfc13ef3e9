// ScanPipeline from Hopper on: the copy engine fills the rings, and says so at barriers in shared memory; at
// others it learns that a stage is empty. A state's warp and its outputs' hand over at named barriers.
#pragma once

namespace qwen::cuda {

__device__ __forceinline__ void barrier_init(uint32_t barrier, int count) {
  asm volatile("mbarrier.init.shared.b64 [%0], %1;" ::"r"(barrier), "r"(count) : "memory");
}
__device__ __forceinline__ void barrier_expect(uint32_t barrier, int bytes) {
  asm volatile("mbarrier.arrive.expect_tx.shared.b64 _, [%0], %1;" ::"r"(barrier), "r"(bytes) : "memory");
}
__device__ __forceinline__ void barrier_arrive(uint32_t barrier) {
  asm volatile("mbarrier.arrive.shared.b64 _, [%0];" ::"r"(barrier) : "memory");
}
__device__ __forceinline__ void barrier_wait(uint32_t barrier, int parity) {
  asm volatile(
      "{\n"
      ".reg .pred done;\n"
      "again:\n"
      "mbarrier.try_wait.parity.acquire.cluster.shared::cta.b64 done, [%0], %1;\n"
      "@!done bra again;\n"
      "}\n" ::"r"(barrier),
      "r"(parity)
      : "memory");
}
__device__ __forceinline__ void copy_bulk(uint32_t to, const void* from, int bytes, uint32_t barrier) {
  asm volatile(
      "cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];" ::"r"(to),
      "l"(from), "r"(bytes), "r"(barrier)
      : "memory");
}
// Two warps meet, one of which need not wait for the other.
__device__ __forceinline__ void pair_sync(int barrier) {
  asm volatile("bar.sync %0, 64;" ::"r"(barrier) : "memory");
}
__device__ __forceinline__ void pair_arrive(int barrier) {
  asm volatile("bar.arrive %0, 64;" ::"r"(barrier) : "memory");
}

template <int kKeyDim, int kColumns, int kStages>
class ScanPipeline {
 public:
  __device__ __forceinline__ ScanPipeline(const ScanInputs<kKeyDim>& in, unsigned char* shared, unsigned lane)
      : in_(in), shared_(shared_address(shared)), lane_(lane) {
    if (threadIdx.x == 0) {
      for (int i = 0; i < kStages; ++i) {
        barrier_init(full_state(i), 1);
        barrier_init(full_outputs(i), 1);
        barrier_init(empty_state(i), L::kPanels);
        barrier_init(empty_outputs(i), L::kPanels);
      }
      asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
    }
    __syncthreads();
  }

  // By a warp.
  __device__ __forceinline__ void copy_all() const {
    if (lane_ != 0) return;
    for (int chunk = 0; chunk < in_.chunks; ++chunk) {
      const int slot = chunk % kStages;
      const int parity = (chunk / kStages + 1) % 2;
      constexpr int kStateGates = static_cast<int>(sizeof(StateGates));
      constexpr int kOutputGates = static_cast<int>(sizeof(OutputGates));
      if (chunk >= kStages) barrier_wait(empty_state(slot), parity);
      uint32_t to = shared_ + slot * L::kStateStage;
      uint32_t full = full_state(slot);
      barrier_expect(full, L::kKeys + L::kPanels * L::kPanel + kStateGates);
      copy_bulk(to, in_.k_of(chunk), L::kKeys, full);
      copy_bulk(to + L::kV, in_.v_of(chunk), L::kPanels * L::kPanel, full);
      copy_bulk(to + L::kStateGates, in_.state_of(chunk), kStateGates, full);

      if (chunk >= kStages) barrier_wait(empty_outputs(slot), parity);
      to = shared_ + L::output_stages(kStages) + slot * L::kOutputStage;
      full = full_outputs(slot);
      barrier_expect(full, L::kKeys + kOutputGates);
      copy_bulk(to, in_.q_of(chunk), L::kKeys, full);
      copy_bulk(to + L::kOutputGates, in_.output_of(chunk), kOutputGates, full);
    }
  }

  // By a panel's warp, of the state or the outputs: before a chunk, and after it.
  __device__ __forceinline__ void wait_for_state(int chunk, unsigned panel) const {
    if (chunk >= 2) pair_sync(taken(chunk % 2, panel));
    barrier_wait(full_state(chunk % kStages), chunk / kStages % 2);
  }
  __device__ __forceinline__ void state_is_done(int chunk, unsigned panel) const {
    pair_arrive(handed_over(chunk % 2, panel));
    release(empty_state(chunk % kStages));
  }
  __device__ __forceinline__ void wait_for_outputs(int chunk, unsigned panel) const {
    barrier_wait(full_outputs(chunk % kStages), chunk / kStages % 2);
    pair_sync(handed_over(chunk % 2, panel));
  }
  __device__ __forceinline__ void outputs_are_done(int chunk, unsigned panel) const {
    if (chunk + 2 < in_.chunks) pair_arrive(taken(chunk % 2, panel));  // somebody waits for it
    release(empty_outputs(chunk % kStages));
  }

 private:
  using L = ScanLayout<kKeyDim, kColumns>;
  __device__ __forceinline__ uint32_t barrier(int i) const { return shared_ + L::barriers(kStages) + i * 8; }
  __device__ __forceinline__ uint32_t full_state(int i) const { return barrier(i); }
  __device__ __forceinline__ uint32_t full_outputs(int i) const { return barrier(kStages + i); }
  __device__ __forceinline__ uint32_t empty_state(int i) const { return barrier(2 * kStages + i); }
  __device__ __forceinline__ uint32_t empty_outputs(int i) const { return barrier(3 * kStages + i); }
  // Named barriers, of which 0 is the block's.
  __device__ __forceinline__ static int handed_over(int i, unsigned panel) {
    static_assert(4 * L::kPanels < 16);
    return 1 + i * L::kPanels + static_cast<int>(panel);
  }
  __device__ __forceinline__ static int taken(int i, unsigned panel) { return handed_over(2 + i, panel); }
  __device__ __forceinline__ void release(uint32_t stage) const {
    __syncwarp();
    if (lane_ == 0) barrier_arrive(stage);
  }

  ScanInputs<kKeyDim> in_;
  uint32_t shared_;
  unsigned lane_;
};

}  // namespace qwen::cuda
