// CudaSteps: a program's steps on the GPU, and what runs there before it is asked for.
//
// One lane is for prefills, one for each number of rows that decode steps have had: each keeps its inputs on
// the GPU, and has a graph of its own. Not thread-safe.
#pragma once

#include <cstdint>
#include <map>
#include <memory>
#include <optional>
#include <span>
#include <string>
#include <utility>
#include <vector>

#include "cuda_lane.h"
#include "gpu_options.h"
#include "manifest.h"
#include "steps.h"

namespace qwen {

class CudaSteps final : public Steps {
 public:
  // Compiled methods of a program. `decode_batch` takes two rows or more; null where its batch is 1.
  struct Methods {
    CompiledMethod& prefill;
    CompiledMethod& decode;
    CompiledMethod* decode_batch;
  };

  // Device and methods must outlive it. Errors: kUnsupported for what the GPU cannot compute with,
  // kOutOfMemory, kInternal.
  static Result<std::unique_ptr<CudaSteps>> make(CudaDevice& device, const Manifest& manifest,
                                                 const Methods& methods, const GpuOptions& options);
  ~CudaSteps() override;

  Result<std::vector<int64_t>> run(std::span<const Step> steps) override;
  void discard(int64_t slot) override { ahead_.erase(slot); }
  int64_t graph_nodes() const override;
  std::vector<std::string> take_warnings() override { return std::exchange(context_.warnings, {}); }

 private:
  // A token that the GPU samples in a step it was given.
  struct Sampled {
    CudaLane* lane;
    uint64_t number;  // of the step
    size_t row;
    int64_t position;  // of the token that the step runs
    std::optional<int64_t> token = std::nullopt;
  };

  CudaSteps(CudaDevice& device, const Methods& methods) : context_{device}, methods_(methods) {}

  Result<std::vector<int64_t>> prefill(const Step& step);
  Result<std::vector<int64_t>> decode(std::span<const Step> steps);
  // Enqueues a step of these rows, and says where their tokens will be.
  Result<std::vector<Sampled>> enqueue(std::span<const CudaLane::Row> rows);
  // Enqueues the steps after those of `sampled` that ask for it.
  Status run_ahead(std::span<const Step> steps, std::span<Sampled> sampled);
  // The lane of decode steps with so many rows, made when it is first asked for.
  Result<CudaLane*> lane(size_t rows);
  static Result<int64_t> token_of(Sampled& sampled);
  // Takes from the rings the tokens of steps that ran ahead and were seen to end, before later ones'
  // overwrite them.
  Status collect();
  Error abandon(Error error);

  CudaLane::Context context_;
  Methods methods_;
  std::unique_ptr<CudaLane> prefill_;
  std::map<size_t, std::unique_ptr<CudaLane>> lanes_;  // by rows
  const CudaLane* last_ = nullptr;                     // of a decode step
  std::map<int64_t, Sampled> ahead_;                   // by slot: what was enqueued before it was asked for
};

}  // namespace qwen
