// How scan_chunks' warps get a chunk's inputs and wait for each other: a warp of their own copies a ring of
// kStages chunks for the state's warps and one for the outputs', and a state's warp leaves for an output's
// what that needs, in one of two places.
#pragma once

#include "kernels/gated_delta/prefill_tiles.cuh"

namespace qwen::cuda {

// Shared memory of scan_chunks, in bytes.
template <int kKeyDim, int kColumns>
struct ScanLayout {
  static constexpr int kPanels = kColumns / 16;
  static constexpr int kKeys = kChunk * kKeyDim * 2;
  static constexpr int kPanel = kChunk * 16 * 2;  // of v

  static constexpr int kV = kKeys;
  static constexpr int kStateGates = kV + kPanels * kPanel;
  static constexpr int kStateStage = (kStateGates + static_cast<int>(sizeof(StateGates)) + 127) / 128 * 128;
  static constexpr int kOutputGates = kKeys;
  static constexpr int kOutputStage =
      (kOutputGates + static_cast<int>(sizeof(OutputGates)) + 127) / 128 * 128;

  // What a state's warp leaves for the outputs', of two chunks, as operands: a uint4 a lane.
  static constexpr int kStateTiles = kKeyDim / 16;
  static constexpr int kAddedTiles = kChunk / 16;
  static constexpr int kHandover = (kStateTiles + kAddedTiles) * 32 * 16;

  static constexpr int output_stages(int stages) { return stages * kStateStage; }
  static constexpr int handovers(int stages) { return output_stages(stages) + stages * kOutputStage; }
  static constexpr int barriers(int stages) { return handovers(stages) + 2 * kPanels * kHandover; }
  static constexpr size_t bytes(int stages) { return barriers(stages) + 4 * stages * 8; }
};

// Where a block's part of the chunks' inputs is.
template <int kKeyDim>
struct ScanInputs {
  const uint16_t *k, *q, *v;
  const StateGates* state;
  const OutputGates* output;
  int64_t key_stride, value_stride;  // of chunks
  int heads;
  int chunks;

  __device__ __forceinline__ ScanInputs(const PrefillChunks& in, const DeltaShape& shape, int head,
                                        int first_column, int chunks)
      : heads(shape.value_heads), chunks(chunks) {
    const int key_head = head / (shape.value_heads / shape.key_heads);
    k = in.k + key_head * kChunk * kKeyDim;
    q = in.q + key_head * kChunk * kKeyDim;
    v = in.v + (head * shape.value_dim + first_column) * kChunk;
    state = in.state + head;
    output = in.output + head;
    key_stride = static_cast<int64_t>(shape.key_heads) * kChunk * kKeyDim;
    value_stride = static_cast<int64_t>(shape.value_heads) * kChunk * shape.value_dim;
  }
  __device__ __forceinline__ const uint16_t* k_of(int chunk) const { return k + chunk * key_stride; }
  __device__ __forceinline__ const uint16_t* q_of(int chunk) const { return q + chunk * key_stride; }
  __device__ __forceinline__ const uint16_t* v_of(int chunk) const { return v + chunk * value_stride; }
  __device__ __forceinline__ const StateGates* state_of(int chunk) const {
    return state + static_cast<int64_t>(chunk) * heads;
  }
  __device__ __forceinline__ const OutputGates* output_of(int chunk) const {
    return output + static_cast<int64_t>(chunk) * heads;
  }
};

}  // namespace qwen::cuda

#if !defined(QWEN_CUDA_EMULATION) && __CUDA_ARCH__ >= 900
#include "kernels/gated_delta/prefill_pipeline_bulk.cuh"
#else
#include "kernels/gated_delta/prefill_pipeline_plain.cuh"
#endif
