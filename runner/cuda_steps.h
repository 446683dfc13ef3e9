// CudaSteps: a program's steps on the GPU.
//
// The methods' inputs lie at fixed addresses there. A decode step writes its token and position over its own
// inputs, so that the next step of the same session needs nothing from the host: it can be enqueued before
// the token is known here. The host reads tokens from a ring in its own memory as they come. Another
// session's step first overwrites the inputs, in stream order; so one CUDA graph of the decode step serves
// every session. Not thread-safe.
#pragma once

#include <cstdint>
#include <map>
#include <memory>
#include <optional>
#include <span>
#include <string>
#include <utility>
#include <vector>

#include "cuda_device.h"
#include "cuda_graph.h"
#include "delegate.h"
#include "manifest.h"
#include "steps.h"

namespace qwen {

class CudaSteps final : public Steps {
 public:
  // Device and methods must outlive it. Without `graph`, decode steps are launched kernel by kernel. Errors:
  // kOutOfMemory, kInternal.
  static Result<std::unique_ptr<CudaSteps>> make(CudaDevice& device, const Manifest& manifest,
                                                 CompiledMethod& prefill, CompiledMethod& decode, bool graph);
  ~CudaSteps() override;

  Result<int64_t> run(const Step& step) override;
  std::span<const float> logits() const override { return logits_; }
  void discard(int64_t slot) override { ahead_.erase(slot); }
  int64_t graph_nodes() const override { return graph_.nodes(); }
  std::vector<std::string> take_warnings() override { return std::exchange(warnings_, {}); }

 private:
  // One row's inputs on the GPU, each aligned for vector loads; the tokens follow.
  struct alignas(16) Cell {
    union {
      int64_t integer;
      float number;
    };
  };
  static constexpr size_t kCells = 10;

  // What a decode step takes. Without a token: the one that the step before samples.
  struct Row {
    std::optional<int64_t> token;
    int64_t position = 0;
    int64_t slot = 0;
    SamplingOptions sampling;
    int64_t generated_from = 0;
  };

  // Inputs of a method on the GPU, and pinned blocks from which they are written in turn: a block is free
  // again when the step that read it has been seen to end.
  struct Inputs {
    DeviceBuffer device;
    PinnedBuffer pinned;
    size_t bytes = 0;  // of a block
    std::vector<uint64_t> last_step;
    size_t turn = 0;
  };

  // A step that was enqueued before it was asked for.
  struct Ahead {
    uint64_t number;
    int64_t position;
    std::optional<int64_t> token;
  };

  CudaSteps(CudaDevice& device, CompiledMethod& prefill, CompiledMethod& decode, bool graph)
      : device_(device), prefill_(prefill), decode_(decode), use_graph_(graph) {}

  static Result<Inputs> make_inputs(CudaDevice& device, size_t tokens);
  static void fill_cells(std::span<Cell> cells, const Row& row);

  Result<int64_t> prefill(const Step& step);
  Result<int64_t> decode(const Step& step);
  // Both return the step's number.
  Result<uint64_t> enqueue_prefill(const Step& step);
  Result<uint64_t> enqueue_decode(const Row& row);
  Status launch_decode();
  Status launch(CompiledMethod& method, const Inputs& inputs, int64_t tokens, bool feeds_next);
  Status capture_decode();
  bool is_on_device(const Row& row) const;
  // A pinned block that can be written, and the copy of `bytes` of it to the GPU.
  Result<std::byte*> next_block(Inputs& inputs);
  Status send_block(Inputs& inputs, size_t bytes);
  // Waits for the step and returns its token.
  Result<int64_t> wait(uint64_t number);
  // Takes from the ring the tokens of steps that ran ahead and ended before step `number` did.
  Status collect(uint64_t number);
  Status keep_logits(const float* from);
  Error abandon(Error error);

  CudaDevice& device_;
  CompiledMethod& prefill_;
  CompiledMethod& decode_;
  bool use_graph_;

  Inputs prefill_inputs_;
  Inputs decode_inputs_;
  DeviceBuffer published_;  // u32 [1]: steps that ended, counted by the GPU
  PinnedBuffer ring_;       // u64 [kRingSteps]
  void* ring_on_device_ = nullptr;
  uint64_t enqueued_ = 0;

  // What the next decode step would take; its token only if the host knows it.
  std::optional<Row> on_device_;
  std::map<int64_t, Ahead> ahead_;  // by slot

  bool warm_ = false;  // the last decode step took no memory, so the next will not
  CudaGraph graph_;
  const float* method_logits_ = nullptr;  // of the last launch, on the GPU
  const float* decode_logits_ = nullptr;  // of the decode step
  size_t vocab_size_ = 0;
  std::vector<float> logits_;
  std::vector<std::string> warnings_;
};

}  // namespace qwen
