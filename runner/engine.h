// Engine: one loaded program, ready to run. It owns the compiled methods, the one copy of the weights that
// they share, and the state slots; sessions borrow a slot each.
//
// Thread-safe: any number of threads may open sessions and step them; steps of one engine run one at a time.
#pragma once

#include <cstdint>
#include <functional>
#include <memory>
#include <span>
#include <string>
#include <vector>

#include "chat.h"
#include "constants.h"
#include "gpu_options.h"
#include "manifest.h"
#include "result.h"
#include "sampling.h"
#include "tokenizer.h"

namespace qwen {

class Session;

// One line for a person, of what is slower than it could be.
using WarningCallback = std::function<void(const std::string&)>;

struct EngineOptions {
  enum class CudaGraph { kDefault, kOn, kOff };
  // Both without effect on a cpu program: the caller warns.
  CudaGraph cuda_graph = CudaGraph::kDefault;
  ExpertActivations expert_activations = ExpertActivations::kBfloat16;
  // Called by the thread that loads the engine or runs a step, while it holds no lock of the engine's: it may
  // wait for other threads that use the engine. It may be null.
  WarningCallback on_warning = {};
};

struct LoadStats {
  double load_ms = 0;         // folder to first possible step, digests included
  double weights_ms = 0;      // of that: reading and checking the weights, and copying them to a GPU
  uint64_t weight_bytes = 0;  // one copy, as bound
  uint64_t state_bytes = 0;   // all slots
};

// What a cuda program holds on its GPU; without a name for a cpu program.
struct DeviceStats {
  std::string name;              // of the GPU
  uint64_t allocated_bytes = 0;  // by this engine: weights, state, temporaries
  uint64_t used_bytes = 0;       // of the GPU, by every process
  uint64_t total_bytes = 0;
  int64_t graph_nodes = 0;  // kernels and copies of the last decode step's CUDA graph; 0
                            // without one, as before the first few decode steps
};

class Engine {
 public:
  // Loads and checks the program in the folder `path`. Errors: kNotFound, kCorrupt, kUnsupported,
  // kOutOfMemory.
  static Result<std::unique_ptr<Engine>> load(const std::string& path, const EngineOptions& options = {});
  ~Engine();
  Engine(const Engine&) = delete;
  Engine& operator=(const Engine&) = delete;

  const Manifest& manifest() const;
  const Tokenizer& tokenizer() const;
  const ChatFormat& chat() const;
  const LoadStats& load_stats() const;
  DeviceStats device_stats() const;

  // Every constant of every method with the address its container uses.
  std::vector<BoundConstant> bound_constants() const;

  // Takes a free slot, zero-filled. Fails with kInvalidArgument when all slots are in use. The engine must
  // outlive it.
  Result<Session> open_session();
  // Takes as many as are free, at least one and at most `most`. Errors as open_session().
  Result<std::vector<Session>> open_sessions(int64_t most);

 private:
  friend class Session;
  struct Impl;
  explicit Engine(std::unique_ptr<Impl> impl);
  std::unique_ptr<Impl> impl_;
};

}  // namespace qwen
