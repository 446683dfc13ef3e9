// The machine that emulation runs kernels on: blocks, their threads as fibers, and what these wait for.
#pragma once

#include <array>
#include <cstdint>
#include <cstdlib>
#include <functional>
#include <memory>
#include <string>
#include <vector>

#include "kernels/cuda/emulated_fiber.h"
#include "kernels/cuda/emulation.h"

namespace qwen::cuda::emulated {

inline constexpr unsigned char kPoison = 0xff;  // memory that nobody has written

struct Copy {
  void* to;
  const void* from;
  bool valid;
  int group;
};

struct Block;

struct Fiber {
  Context context = {};
  Block* block = nullptr;
  uint3 index = {};
  unsigned number = 0;  // in the block
  bool waited = false;  // called wait_for_previous_kernel
  bool ended = false;
  const char* waits_at = nullptr;
  bool at_cluster_barrier = false;  // arrived, and has not waited since
  unsigned cluster_barrier = 0;     // the one it arrived at

  // The warp operation it waits in.
  uint32_t mask = 0;
  Combine combine = nullptr;
  void* arguments = nullptr;

  std::vector<Copy> copies;
  int committed_groups = 0;
};

struct Block {
  uint3 index = {};
  Fiber* fibers = nullptr;
  unsigned char* shared = nullptr;
  unsigned ended = 0;
  unsigned at_barrier = 0;
  unsigned predicates = 0;
  unsigned barrier_result = 0;
  std::array<uint32_t, kMaxThreads / 32> at_warp_operation = {};
};

// Runs the blocks of a grid: those of a cluster at once, the clusters one after the other.
class Machine {
 public:
  cudaError_t run(dim3 grid, dim3 block, size_t shared_bytes, unsigned cluster,
                  const std::function<void()>& kernel);

  int barrier(Vote vote, int predicate);
  void warp_operation(const char* name, uint32_t mask, Combine combine, void* arguments);
  [[noreturn]] void fail(const std::string& reason);
  void cluster_arrive();
  void cluster_wait();
  void* of_block(void* p, unsigned rank);

  Fiber& current() { return *current_; }
  uint32_t warp_lanes() const;

 private:
  static void fiber_main();
  void reserve();
  void run_cluster(uint64_t first);  // that begins with this block
  void check_cluster();
  void check_end(const Block& block);
  std::string describe_waiting(const Block& block) const;
  // Goes on with the next fiber that can, or with run_cluster when none can.
  void leave();
  void suspend(const char* at) {
    current_->waits_at = at;
    leave();
  }
  void wake(Fiber* fiber) { ready_[(ready_begin_ + ready_count_++) & (ready_.size() - 1)] = fiber; }
  template <typename Visit>
  void in_order(unsigned count, Visit visit) const {
    for (unsigned i = 0; i < count; ++i) visit(reverse_ ? count - 1 - i : i);
  }

  bool reverse_ = false;
  Stacks stacks_;
  std::vector<Fiber> fibers_;  // those of a block side by side
  std::vector<Fiber*> ready_;  // a ring: a power of two
  unsigned ready_begin_ = 0;
  unsigned ready_count_ = 0;

  unsigned cluster_ = 1;  // blocks
  std::vector<Fiber*> cluster_waiters_;
  unsigned cluster_arrived_ = 0;
  unsigned cluster_barrier_ = 0;  // counts them

  Context host_ = {};
  Fiber* current_ = nullptr;  // none: run_cluster
  const std::function<void()>* kernel_ = nullptr;
  std::string error_;

  std::vector<Block> blocks_;  // of the cluster
  unsigned threads_ = 0;       // of a block
  size_t shared_bytes_ = 0;
  size_t shared_capacity_ = 0;
  std::unique_ptr<unsigned char, decltype(&std::free)> shared_ = {nullptr, &std::free};
};

// The only one: who runs a kernel on it keeps others off.
Machine& machine();

}  // namespace qwen::cuda::emulated
