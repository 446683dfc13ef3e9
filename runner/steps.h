// Steps: how the two methods of a loaded program are run on its device, one call at a time. Not thread-safe.
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
  bool logits = false;  // keep them for logits(); not together with `ahead`
};

class Steps {
 public:
  virtual ~Steps() = default;

  // Runs the step and returns the token it samples.
  virtual Result<int64_t> run(const Step& step) = 0;
  // Logits [V] float32 of the last step, if it kept them; valid until the next.
  virtual std::span<const float> logits() const = 0;
  // Forgets a step of `slot` that ran ahead.
  virtual void discard(int64_t slot) = 0;
  // Kernels and copies of a decode step, where it is replayed from a CUDA graph; else 0.
  virtual int64_t graph_nodes() const { return 0; }
  // What is slower than it could be, a line each for a person, since the last call.
  virtual std::vector<std::string> take_warnings() { return {}; }
};

// In this process's memory, by ExecuTorch. The methods must outlive it.
std::unique_ptr<Steps> make_host_steps(Method& prefill, Method& decode);

}  // namespace qwen
