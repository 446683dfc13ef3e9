#include "kernels/cuda/emulation.h"

#include <algorithm>
#include <cstdlib>
#include <cstring>
#include <mutex>
#include <string>
#include <utility>

#include "kernels/cuda/emulated_machine.h"

namespace qwen::cuda::emulated {
namespace {

bool is_valid(dim3 grid, dim3 block, size_t shared_bytes) {
  const uint64_t threads = uint64_t{block.x} * block.y * block.z;
  return threads > 0 && threads <= kMaxThreads && block.z <= 64 && grid.x > 0 && grid.y > 0 && grid.z > 0 &&
         grid.x <= 0x7fffffffU && grid.y <= 65535 && grid.z <= 65535 && shared_bytes <= kMaxSharedBytes;
}

}  // namespace

int Machine::barrier(Vote vote, int predicate) {
  Block& block = *current_->block;
  block.predicates += predicate != 0 ? 1 : 0;
  if (++block.at_barrier < threads_) {
    suspend("a block barrier");
  } else {
    block.barrier_result = block.predicates;
    block.at_barrier = block.predicates = 0;
    in_order(threads_, [&](unsigned i) {
      if (&block.fibers[i] != current_) wake(&block.fibers[i]);
    });
  }
  switch (vote) {
    case Vote::kAnd:
      return block.barrier_result == threads_ ? 1 : 0;
    case Vote::kOr:
      return block.barrier_result != 0 ? 1 : 0;
    default:
      return static_cast<int>(block.barrier_result);
  }
}

uint32_t Machine::warp_lanes() const {
  const unsigned count = std::min(32U, threads_ - current_->number / 32 * 32);
  return count == 32 ? ~0U : (1U << count) - 1;
}

void Machine::warp_operation(const char* name, uint32_t mask, Combine combine, void* arguments) {
  const unsigned warp = current_->number / 32;
  const uint32_t own = 1U << (current_->number % 32);
  mask &= warp_lanes();
  if ((mask & own) == 0) fail(std::string(name) + " with a mask that lacks the caller");
  current_->mask = mask;
  current_->combine = combine;
  current_->arguments = arguments;
  uint32_t& waiting = current_->block->at_warp_operation[warp];
  waiting |= own;
  if ((waiting & mask) != mask) {
    suspend(name);
    return;
  }
  Fiber* const lanes = current_->block->fibers + warp * 32;
  void* all[32] = {};
  for (unsigned i = 0; i < 32; ++i) {
    if ((mask >> i & 1) == 0) continue;
    const Fiber& fiber = lanes[i];
    if (fiber.mask != mask || fiber.combine != combine) {
      fail(std::string(name) + " meets lane " + std::to_string(i) +
           (fiber.combine != combine ? std::string(" at ") + fiber.waits_at : " with another mask"));
    }
    all[i] = fiber.arguments;
  }
  if (combine != nullptr) combine(all, mask);
  waiting &= ~mask;
  in_order(32, [&](unsigned i) {
    if ((mask >> i & 1) != 0 && lanes + i != current_) wake(lanes + i);
  });
}

void Machine::cluster_arrive() {
  if (current_->at_cluster_barrier) fail("cluster_arrive twice without cluster_wait");
  current_->at_cluster_barrier = true;
  current_->cluster_barrier = cluster_barrier_;
  if (++cluster_arrived_ < cluster_ * threads_) return;
  cluster_arrived_ = 0;
  ++cluster_barrier_;
  for (Fiber* const fiber : cluster_waiters_) wake(fiber);
  cluster_waiters_.clear();
}

void Machine::cluster_wait() {
  if (!current_->at_cluster_barrier) fail("cluster_wait without cluster_arrive");
  current_->at_cluster_barrier = false;
  if (current_->cluster_barrier != cluster_barrier_) return;
  cluster_waiters_.push_back(current_);
  suspend("a cluster's barrier");
}

void* Machine::of_block(void* p, unsigned rank) {
  const auto offset = static_cast<unsigned char*>(p) - current_->block->shared;
  if (offset < 0 || static_cast<size_t>(offset) >= shared_bytes_) fail("of_block of no shared memory");
  if (rank >= cluster_) fail("of_block of a block that is not in the cluster");
  return blocks_[rank].shared + offset;
}

cudaError_t run_clusters(dim3 grid, dim3 block, size_t shared_bytes, unsigned cluster, cudaStream_t stream,
                         std::function<void()> kernel) {
  if (!is_valid(grid, block, shared_bytes)) return cudaErrorInvalidConfiguration;
  if (cluster == 0 || cluster > static_cast<unsigned>(max_cluster_blocks()) || grid.x % cluster != 0) {
    return cudaErrorInvalidClusterSize;
  }
  const std::function<cudaError_t()> operation = [=, kernel = std::move(kernel)] {
    static std::mutex mutex;
    const std::lock_guard lock(mutex);
    return machine().run(grid, block, shared_bytes, cluster, kernel);
  };
  return capture != nullptr && capture(stream, operation) ? cudaSuccess : operation();
}

int multiprocessors() {
  const char* const variable = std::getenv("QWEN_EMULATED_MULTIPROCESSORS");
  return variable == nullptr ? 3 : std::max(1, std::atoi(variable));
}

int max_cluster_blocks() {
  const char* const variable = std::getenv("QWEN_EMULATED_CLUSTER");
  return variable == nullptr ? 8 : std::max(1, std::atoi(variable));
}

unsigned char* dynamic_shared() { return machine().current().block->shared; }
int block_barrier(Vote vote, int predicate) { return machine().barrier(vote, predicate); }
void warp_operation(const char* name, uint32_t mask, Combine combine, void* arguments) {
  machine().warp_operation(name, mask, combine, arguments);
}
unsigned lane() { return machine().current().number % 32; }
uint32_t warp_lanes() { return machine().warp_lanes(); }
void fail(const char* reason) { machine().fail(reason); }
void previous_kernel_waited_for() { machine().current().waited = true; }
void cluster_arrive() { machine().cluster_arrive(); }
void cluster_wait() { machine().cluster_wait(); }
void* of_block(void* p, unsigned rank) { return machine().of_block(p, rank); }

void copy_async(void* to, const void* from, bool valid) {
  if ((reinterpret_cast<uintptr_t>(to) | reinterpret_cast<uintptr_t>(from)) % 16 != 0) {
    fail("copy_async_16 of an address that is no multiple of 16");
  }
  Fiber& fiber = machine().current();
  std::memset(to, kPoison, 16);
  fiber.copies.push_back({to, from, valid, fiber.committed_groups});
}

void copy_async_commit() { ++machine().current().committed_groups; }

void copy_async_wait(int pending) {
  Fiber& fiber = machine().current();
  const int finished = fiber.committed_groups - pending;
  auto copy = fiber.copies.begin();
  for (; copy != fiber.copies.end() && copy->group < finished; ++copy) {
    if (copy->valid) {
      std::memcpy(copy->to, copy->from, 16);
    } else {
      std::memset(copy->to, 0, 16);
    }
  }
  fiber.copies.erase(fiber.copies.begin(), copy);
}

}  // namespace qwen::cuda::emulated
