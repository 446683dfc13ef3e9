// Program: an exported program's folder, checked, loaded and ready to step.
//
// It owns the mapped files, ExecuTorch's view of them, the compiled methods and (through the delegate) the
// one copy of weights and state. Not thread-safe: one step at a time; the engine sees to that.
#pragma once

#include <cstdint>
#include <memory>
#include <span>
#include <string>
#include <vector>

#include "constants.h"
#include "gpu_options.h"
#include "manifest.h"
#include "result.h"
#include "steps.h"

namespace qwen {

class Program {
 public:
  // Reads the manifest and loads what it describes. No file is read before what is read of it has been
  // checked against the manifest; weights that go to a GPU are checked on their way there, and before that
  // the table that says where they are. Errors: kNotFound, kCorrupt, kUnsupported, kOutOfMemory, kIo,
  // kInternal.
  static Result<std::unique_ptr<Program>> load(const std::string& path, const GpuOptions& options);
  ~Program();
  Program(const Program&) = delete;
  Program& operator=(const Program&) = delete;

  const Manifest& manifest() const;
  const std::string& tokenizer_json() const;
  ConstantStore& constants();
  const std::vector<BoundConstant>& bound_constants() const;

  const Device& device() const;

  // Steps::run(). REQUIRES: ids inside the vocabulary, slots inside the slots, position + T <= max_seq_len.
  Result<std::vector<int64_t>> run(std::span<const Step> steps);
  // Zero-fills a slot's state; a step of it that ran ahead is forgotten.
  Status clear_slot(int64_t slot);
  // Makes slot `to` a copy of slot `from`; a step of `to` that ran ahead is forgotten.
  Status copy_slot(int64_t from, int64_t to);
  double weights_ms() const;  // how long the weights took to be read and checked, and to reach a GPU
  // Of the last decode step's CUDA graph; 0 without one, as before the first few decode steps.
  int64_t graph_nodes() const;
  // What is slower than it could be, a line each for a person, since the last call.
  std::vector<std::string> take_warnings();

 private:
  struct Impl;
  explicit Program(std::unique_ptr<Impl> impl);
  std::unique_ptr<Impl> impl_;
};

}  // namespace qwen
