// Program: an exported program's folder, checked, loaded and ready to step.
//
// It owns the mapped files, ExecuTorch's view of them, both compiled methods and (through the delegate) the
// one copy of weights and state. Not thread-safe: one step at a time; the engine sees to that.
#pragma once

#include <cstdint>
#include <memory>
#include <span>
#include <string>
#include <vector>

#include "constants.h"
#include "manifest.h"
#include "result.h"
#include "sampling.h"

namespace qwen {

class Program {
 public:
  // Reads the manifest, checks every file against it, then loads. Errors: kNotFound, kCorrupt, kUnsupported,
  // kOutOfMemory, kIo.
  static Result<std::unique_ptr<Program>> load(const std::string& path);
  ~Program();
  Program(const Program&) = delete;
  Program& operator=(const Program&) = delete;

  const Manifest& manifest() const;
  const std::string& tokenizer_json() const;
  ConstantStore& constants();
  const std::vector<BoundConstant>& bound_constants() const;

  // Runs tokens [T] at `position` of `slot`: prefill for 2 <= T <= chunk, decode for T = 1. Returns the next
  // token. REQUIRES: ids inside the vocabulary, slot inside the slots, position + T <= max_seq_len.
  Result<int64_t> step(std::span<const int64_t> tokens, int64_t position, int64_t slot,
                       const SamplingOptions& sampling, int64_t generated_from);
  // Logits [V] float32 of the last step; valid until the next.
  std::span<const float> logits() const;

 private:
  struct Impl;
  explicit Program(std::unique_ptr<Impl> impl);
  std::unique_ptr<Impl> impl_;
};

}  // namespace qwen
