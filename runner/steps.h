// Steps: how the methods of a loaded program are run on its device, one call at a time. Not thread-safe.
#pragma once

#include <cstdint>
#include <memory>
#include <span>
#include <string>
#include <vector>

#include "result.h"
#include "sampling.h"

namespace qwen {

class Method;

struct Step {
  std::span<const int64_t> tokens;  // [T]: prefill for 2 <= T <= chunk, decode for T = 1
  int64_t position = 0;             // of the first
  int64_t slot = 0;
  SamplingOptions sampling;
  int64_t generated_from = 0;
  // Of a decode step on a GPU: begin the one after it too, which takes the token that this one samples, so
  // that the GPU does not wait for the caller. The slot's state is then a token further than this step says.
  // The next step of the slot must be that one, or discard() must come before it.
  bool ahead = false;
  std::vector<float>* logits = nullptr;  // where to keep them, [V], if at all; not together with `ahead`
};

class Steps {
 public:
  virtual ~Steps() = default;

  // Runs a step, or decode steps of different slots together: at least one, and at most the program's batch.
  // Returns the token that each samples. Steps that keep logits and steps that run ahead do not go together.
  virtual Result<std::vector<int64_t>> run(std::span<const Step> steps) = 0;
  // Forgets a step of `slot` that ran ahead.
  virtual void discard(int64_t slot) = 0;
  // Kernels and copies of the last decode step, where it is replayed from a CUDA graph; else 0.
  virtual int64_t graph_nodes() const { return 0; }
  // What is slower than it could be, a line each for a person, since the last call.
  virtual std::vector<std::string> take_warnings() { return {}; }
};

// In this process's memory, by ExecuTorch. The methods must outlive it.
std::unique_ptr<Steps> make_host_steps(Method& prefill, Method& decode);

}  // namespace qwen
