// CudaLane: the steps of one compiled method with one number of rows, enqueued on the GPU one after another.
//
// The method's inputs lie at fixed addresses there. A decode step writes its tokens and positions over its
// own inputs, so that the next step of the same sessions needs nothing from the host: it can be enqueued
// before the tokens are known here. The host reads tokens from a ring in its own memory as they come. A step
// of other sessions first overwrites the inputs, in stream order; so one CUDA graph serves every session. Not
// thread-safe.
#pragma once

#include <cstdint>
#include <memory>
#include <optional>
#include <span>
#include <string>
#include <vector>

#include "cuda_device.h"
#include "cuda_graph.h"
#include "delegate.h"
#include "kernels/moe/cuda.h"
#include "sampling.h"

namespace qwen {

class CudaLane {
 public:
  // What a program's lanes share.
  struct Context {
    CudaDevice& device;
    size_t vocab_size = 0;
    bool use_graph = false;  // off from the first capture that fails
    cuda::ExpertActivations expert_activations = cuda::ExpertActivations::kBfloat16;
    std::vector<std::string> warnings = {};
  };

  // What a step takes for one session.
  struct Row {
    int64_t position = 0;
    int64_t slot = 0;
    SamplingOptions sampling;
    int64_t generated_from = 0;
    // Without one: that which the lane's last step sampled in this row.
    std::optional<int64_t> token = std::nullopt;
  };

  // Lanes of a prefill, with one row of at most `chunk` tokens, and of decode steps of `rows` rows. Context
  // and method must outlive them; lanes may share a method. Errors: kOutOfMemory, kInternal.
  static Result<std::unique_ptr<CudaLane>> for_prefill(Context& context, CompiledMethod& method,
                                                       size_t chunk);
  static Result<std::unique_ptr<CudaLane>> for_decode(Context& context, CompiledMethod& method, size_t rows);

  // Both enqueue a step and return its number: the lane's first is 1.
  Result<uint64_t> prefill(const Row& row, std::span<const int64_t> tokens);
  // REQUIRES: as many rows as the lane has; with a token each, or follows() them.
  Result<uint64_t> decode(std::span<const Row> rows);

  // Whether the GPU itself goes on with these rows after the last step, their tokens being those it samples.
  bool follows(std::span<const Row> rows) const;
  uint64_t last() const { return enqueued_; }      // number of the last step
  uint64_t finished() const { return finished_; }  // number of the last one that was seen to end

  // Waits for the step and returns the token of this row. REQUIRES: at most kRingSteps were enqueued since.
  Result<int64_t> wait(uint64_t number, size_t row);
  // Copies the logits [V] of this row of the last step. REQUIRES: nothing ran the method since.
  Status copy_logits(size_t row, std::vector<float>& logits);

  // After a failure, when nothing is known of what is on the GPU: the next step writes all its inputs, and
  // takes memory again if it was given back, which no capture may.
  void forget();
  // Kernels and copies of a decode step; 0 where there is no graph yet.
  int64_t graph_nodes() const { return graph_.nodes(); }

 private:
  static constexpr size_t kColumns = 10;

  CudaLane(Context& context, CompiledMethod& method, size_t rows, size_t tokens, bool is_decode);
  static Result<std::unique_ptr<CudaLane>> make(Context& context, CompiledMethod& method, size_t rows,
                                                size_t tokens, bool is_decode);

  void fill(std::byte* block, size_t row, const Row& values) const;
  // A pinned block that can be written, and the copy of `bytes` of it to the GPU.
  Result<std::byte*> next_block();
  Status send_block(size_t bytes);
  Status launch_decode();
  Status launch(size_t tokens);
  Status capture();
  bool is_on_device(std::span<const Row> rows) const;

  Context& context_;
  CompiledMethod& method_;
  const size_t rows_;
  const bool is_decode_;
  // The inputs: a column for each after the first, a value a row; then the tokens.
  const size_t column_bytes_;
  const size_t tokens_begin_;
  const size_t block_bytes_;

  DeviceBuffer inputs_;  // a block, then u32 [1]: steps that ended, counted by the GPU
  // Blocks from which the inputs are written in turn: one is free again when the step that read it has been
  // seen to end.
  PinnedBuffer blocks_;
  std::vector<uint64_t> last_step_;  // that read a block
  size_t turn_ = 0;
  PinnedBuffer ring_;  // u64 [kRingSteps, rows]
  void* ring_on_device_ = nullptr;
  uint64_t enqueued_ = 0;
  uint64_t finished_ = 0;

  // What the next decode step would take; tokens only if the host knows them.
  std::vector<Row> on_device_;
  // The arena's changes after a decode step that made none: while they stay the same nor will the next.
  std::optional<uint64_t> warm_;
  CudaGraph graph_;
  const float* launched_logits_ = nullptr;  // of the last launch or capture, on the GPU
  const float* graph_logits_ = nullptr;     // of the graph
  const float* logits_ = nullptr;           // of the last step
};

}  // namespace qwen
