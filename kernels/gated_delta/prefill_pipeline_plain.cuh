// ScanPipeline with what every GPU has: asynchronous copies, and one barrier for all, once a chunk: there the
// state's warps get the next chunk, and the outputs' the one that those have done.
#pragma once

namespace qwen::cuda {

template <int kKeyDim, int kColumns, int kStages>
class ScanPipeline {
 public:
  __device__ __forceinline__ ScanPipeline(const ScanInputs<kKeyDim>& in, unsigned char* shared, unsigned lane)
      : in_(in), shared_(shared), lane_(lane) {}

  // By a warp.
  __device__ __forceinline__ void copy_all() const {
    for (int chunk = 0; chunk < kStages - 1; ++chunk) copy(chunk, chunk);
    for (int chunk = 0; chunk <= in_.chunks; ++chunk) {
      if constexpr (kStages == 1) {
        __syncthreads();  // no one reads the chunk before any more
        copy(chunk, chunk - 1);
        copy_async_wait<0>();
        __syncthreads();
      } else {
        copy_async_wait<kStages - 2>();
        __syncthreads();
        copy(chunk + kStages - 1, chunk == 0 ? -1 : chunk + kStages - 2);
      }
    }
  }
  __device__ __forceinline__ void wait_for_state(int /*chunk*/, unsigned /*panel*/) const { wait(); }
  __device__ __forceinline__ void state_is_done(int chunk, unsigned /*panel*/) const {
    if (chunk + 1 == in_.chunks) wait();
  }
  __device__ __forceinline__ void wait_for_outputs(int chunk, unsigned /*panel*/) const {
    if (chunk == 0) wait();
    wait();
  }
  __device__ __forceinline__ void outputs_are_done(int /*chunk*/, unsigned /*panel*/) const {}

 private:
  using L = ScanLayout<kKeyDim, kColumns>;

  __device__ __forceinline__ static void wait() {
    if constexpr (kStages == 1) __syncthreads();
    __syncthreads();
  }
  __device__ __forceinline__ void copy(int state_chunk, int output_chunk) const {
    if (state_chunk < in_.chunks) {
      unsigned char* const to = shared_ + state_chunk % kStages * L::kStateStage;
      copy<L::kKeys>(to, in_.k_of(state_chunk));
      copy<L::kPanels * L::kPanel>(to + L::kV, in_.v_of(state_chunk));
      copy<sizeof(StateGates)>(to + L::kStateGates, in_.state_of(state_chunk));
    }
    if (output_chunk >= 0 && output_chunk < in_.chunks) {
      unsigned char* const to =
          shared_ + L::output_stages(kStages) + output_chunk % kStages * L::kOutputStage;
      copy<L::kKeys>(to, in_.q_of(output_chunk));
      copy<sizeof(OutputGates)>(to + L::kOutputGates, in_.output_of(output_chunk));
    }
    copy_async_commit();
  }
  template <int kBytes>
  __device__ __forceinline__ void copy(unsigned char* to, const void* from) const {
#pragma unroll 4
    for (unsigned at = lane_ * 16; at < kBytes; at += 32 * 16) {
      copy_async_16(to + at, static_cast<const unsigned char*>(from) + at);
    }
  }

  ScanInputs<kKeyDim> in_;
  unsigned char* shared_;
  unsigned lane_;
};

}  // namespace qwen::cuda
