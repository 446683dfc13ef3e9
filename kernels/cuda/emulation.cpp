#include "kernels/cuda/emulation.h"

#include <algorithm>
#include <array>
#include <bit>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <mutex>
#include <string>
#include <utility>
#include <vector>

#include "kernels/cuda/emulated_fiber.h"

namespace qwen::cuda::emulated {
namespace {

constexpr size_t kSharedAlignment = 1024;
constexpr size_t kCanaryBytes = 256;
constexpr unsigned char kPoison = 0xff;
constexpr unsigned char kCanary = 0xa5;
constexpr uint32_t kAbsent = 0xffffffffU;  // of exchange.cuh

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
  const void* awaits = nullptr;     // at an exchange
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

// Runs some blocks at once: one, a cluster, or all of the grid.
class Machine {
 public:
  cudaError_t run(dim3 grid, dim3 block, size_t shared_bytes, unsigned at_once,
                  const std::function<void()>& kernel);

  int barrier(Vote vote, int predicate);
  void warp_operation(const char* name, uint32_t mask, Combine combine, void* arguments);
  [[noreturn]] void fail(const std::string& reason);
  void cluster_arrive();
  void cluster_wait();
  void* of_block(void* p, unsigned rank);
  void poll_again(const void* from);
  void published() { published_ = true; }

  Fiber& current() { return *current_; }
  uint32_t warp_lanes() const;

 private:
  static void fiber_main();
  void reserve(unsigned blocks);
  void run_blocks(uint64_t first, unsigned count);
  void check_blocks(unsigned count);
  void check_end(const Block& block);
  std::string describe_waiting(const Block& block) const;
  // Goes on with the next fiber that can, or with run_blocks when none can.
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
  std::vector<Fiber> fibers_;    // those of a block side by side
  std::vector<Fiber*> ready_;    // a ring: a power of two
  std::vector<Fiber*> pollers_;  // found no word since...
  unsigned ready_begin_ = 0;
  unsigned ready_count_ = 0;
  bool published_ = false;  // ...something was published

  unsigned at_once_ = 1;  // blocks
  std::vector<Fiber*> cluster_waiters_;
  unsigned cluster_arrived_ = 0;
  unsigned cluster_barrier_ = 0;  // counts them

  Context host_ = {};
  Fiber* current_ = nullptr;  // none: run_blocks
  const std::function<void()>* kernel_ = nullptr;
  std::string error_;

  std::vector<Block> blocks_;
  unsigned threads_ = 0;  // of a block
  size_t shared_bytes_ = 0;
  size_t shared_capacity_ = 0;
  std::unique_ptr<unsigned char, decltype(&std::free)> shared_ = {nullptr, &std::free};
};

Machine& machine() {
  static Machine* const machine = new Machine;  // never destroyed: its stacks outlive static destructors
  return *machine;
}

uint64_t blocks_of(dim3 grid) { return uint64_t{grid.x} * grid.y * grid.z; }

bool is_valid(dim3 grid, dim3 block, size_t shared_bytes, uint64_t at_once) {
  const uint64_t threads = uint64_t{block.x} * block.y * block.z;
  return threads > 0 && threads <= kMaxThreads && block.z <= 64 && grid.x > 0 && grid.y > 0 && grid.z > 0 &&
         grid.x <= 0x7fffffffU && grid.y <= 65535 && grid.z <= 65535 && shared_bytes <= kMaxSharedBytes &&
         at_once > 0 && at_once <= kMaxThreadsTogether / threads && blocks_of(grid) % at_once == 0;
}

cudaError_t Machine::run(dim3 grid, dim3 block, size_t shared_bytes, unsigned at_once,
                         const std::function<void()>& kernel) {
  const char* const order = std::getenv("QWEN_EMULATION_ORDER");
  reverse_ = order != nullptr && std::strcmp(order, "reverse") == 0;
  threads_ = block.x * block.y * block.z;
  shared_bytes_ = shared_bytes;
  kernel_ = &kernel;
  error_.clear();
  gridDim = grid;
  blockDim = block;
  const uint64_t blocks = blocks_of(grid);
  at_once_ = at_once;
  reserve(at_once);
  for (uint64_t i = 0; i < blocks && error_.empty(); i += at_once) {
    run_blocks(reverse_ ? blocks - at_once - i : i, at_once);
  }
  if (error_.empty()) return cudaSuccess;
  std::fprintf(stderr, "emulated GPU: block (%u, %u, %u): %s\n", blockIdx.x, blockIdx.y, blockIdx.z,
               error_.c_str());
  return cudaErrorUnknown;
}

void Machine::reserve(unsigned blocks) {
  const unsigned threads = blocks * threads_;
  if (fibers_.size() < threads) {
    stacks_.reserve(threads);
    fibers_.resize(threads);
    ready_.resize(std::bit_ceil(threads));
  }
  const size_t stride =
      (shared_bytes_ + kCanaryBytes + kSharedAlignment - 1) / kSharedAlignment * kSharedAlignment;
  if (shared_capacity_ < blocks * stride) {
    shared_capacity_ = blocks * stride;
    shared_.reset(static_cast<unsigned char*>(std::aligned_alloc(kSharedAlignment, shared_capacity_)));
    if (shared_ == nullptr) {
      std::perror("emulated GPU: no memory for shared memory");
      std::abort();
    }
  }
  blocks_.resize(std::max<size_t>(blocks_.size(), blocks));
  for (unsigned b = 0; b < blocks; ++b) {
    blocks_[b].fibers = &fibers_[b * threads_];
    blocks_[b].shared = shared_.get() + b * stride;
  }
}

void Machine::run_blocks(uint64_t first, unsigned count) {
  for (unsigned b = 0; b < count; ++b) {
    Block& block = blocks_[b];
    const uint64_t i = first + b;
    block.index = {static_cast<unsigned>(i % gridDim.x), static_cast<unsigned>(i / gridDim.x % gridDim.y),
                   static_cast<unsigned>(i / gridDim.x / gridDim.y)};
    std::memset(block.shared, kPoison, shared_bytes_);
    std::memset(block.shared + shared_bytes_, kCanary, kCanaryBytes);
    block.ended = block.at_barrier = block.predicates = 0;
    block.at_warp_operation.fill(0);
  }
  ready_begin_ = ready_count_ = 0;
  pollers_.clear();
  published_ = false;
  cluster_waiters_.clear();
  cluster_arrived_ = 0;
  in_order(count * threads_, [&](unsigned f) {
    const unsigned i = f % threads_;
    Fiber& fiber = fibers_[f];
    fiber.block = &blocks_[f / threads_];
    fiber.index = {i % blockDim.x, i / blockDim.x % blockDim.y, i / blockDim.x / blockDim.y};
    fiber.number = i;
    fiber.waited = fiber.ended = false;
    fiber.awaits = nullptr;
    fiber.at_cluster_barrier = false;
    fiber.copies.clear();
    fiber.committed_groups = 0;
    stacks_.begin(&fiber.context, f, &Machine::fiber_main);
    wake(&fiber);
  });
  leave();
  if (error_.empty()) check_blocks(count);
}

void Machine::check_blocks(unsigned count) {
  constexpr unsigned kShown = 4;
  unsigned waiting = 0;
  for (unsigned b = 0; b < count; ++b) {
    const Block& block = blocks_[b];
    if (block.ended == threads_ || ++waiting > kShown) continue;
    if (waiting == 1) {
      blockIdx = block.index;
    } else {
      error_ += "; block (" + std::to_string(block.index.x) + ", " + std::to_string(block.index.y) + ", " +
                std::to_string(block.index.z) + "): ";
    }
    error_ += describe_waiting(block);
  }
  if (waiting > kShown) error_ += "; and " + std::to_string(waiting - kShown) + " more blocks";
  for (unsigned b = 0; b < count && error_.empty(); ++b) check_end(blocks_[b]);
}

// Of a block that no fiber can go on in.
std::string Machine::describe_waiting(const Block& block) const {
  constexpr int kShown = 8;
  std::string text = std::to_string(block.ended) + " of " + std::to_string(threads_) +
                     " threads ended, the others wait for what never comes:";
  int shown = 0;
  for (unsigned i = 0, end = 0; i < threads_ && shown < kShown; i = end) {
    const Fiber& fiber = block.fibers[i];
    const auto alike = [&](const Fiber& other) {
      return other.ended == fiber.ended && (fiber.ended || other.waits_at == fiber.waits_at);
    };
    for (end = i + 1; end < threads_ && alike(block.fibers[end]);) ++end;
    if (fiber.ended) continue;
    text += shown++ == 0 ? " thread" : ", thread";
    text += end == i + 1 ? " " : "s ";
    text +=
        std::to_string(i) + (end == i + 1 ? "" : " to " + std::to_string(end - 1)) + " at " + fiber.waits_at;
    if (fiber.awaits != nullptr) {
      std::array<char, 32> address = {};
      std::snprintf(address.data(), address.size(), " (%p)", fiber.awaits);
      text += address.data();
    }
  }
  return text;
}

// Of a block whose threads have all ended.
void Machine::check_end(const Block& block) {
  blockIdx = block.index;
  for (unsigned i = 0; i < threads_; ++i) {
    if (!block.fibers[i].waited) {
      error_ = "thread " + std::to_string(i) + " ended without wait_for_previous_kernel()";
      return;
    }
  }
  const unsigned char* const canary = block.shared + shared_bytes_;
  if (std::any_of(canary, canary + kCanaryBytes, [](unsigned char byte) { return byte != kCanary; })) {
    error_ = "wrote past its " + std::to_string(shared_bytes_) + " bytes of dynamic shared memory";
  }
}

void Machine::fiber_main() {
  Machine& m = machine();
  (*m.kernel_)();
  m.current_->ended = true;
  ++m.current_->block->ended;
  m.leave();
  std::abort();
}

void Machine::leave() {
  Context* const from = current_ == nullptr ? &host_ : &current_->context;
  Context* to = &host_;
  current_ = nullptr;
  if (ready_count_ == 0 && published_) {
    published_ = false;
    for (Fiber* const fiber : pollers_) {
      fiber->awaits = nullptr;
      wake(fiber);
    }
    pollers_.clear();
  }
  if (ready_count_ > 0 && error_.empty()) {
    current_ = ready_[ready_begin_];
    ready_begin_ = static_cast<unsigned>((ready_begin_ + 1) & (ready_.size() - 1));
    --ready_count_;
    threadIdx = current_->index;
    blockIdx = current_->block->index;
    to = &current_->context;
  }
  if (from != to) switch_context(from, to);
}

void Machine::fail(const std::string& reason) {
  error_ = "thread " + std::to_string(current_->number) + ": " + reason;
  leave();
  std::abort();
}

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
  if (++cluster_arrived_ < at_once_ * threads_) return;
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
  if (rank >= at_once_) fail("of_block of a block that is not in the cluster");
  return blocks_[rank].shared + offset;
}

void Machine::poll_again(const void* from) {
  current_->awaits = from;
  pollers_.push_back(current_);
  suspend("an exchange");
}

cudaError_t run(dim3 grid, dim3 block, size_t shared_bytes, uint64_t at_once, cudaStream_t stream,
                std::function<void()> kernel) {
  if (!is_valid(grid, block, shared_bytes, at_once)) return cudaErrorInvalidConfiguration;
  const std::function<cudaError_t()> operation = [=, kernel = std::move(kernel)] {
    static std::mutex mutex;
    const std::lock_guard lock(mutex);
    return machine().run(grid, block, shared_bytes, static_cast<unsigned>(at_once), kernel);
  };
  return capture != nullptr && capture(stream, operation) ? cudaSuccess : operation();
}

}  // namespace

cudaError_t run(dim3 grid, dim3 block, size_t shared_bytes, cudaStream_t stream,
                std::function<void()> kernel) {
  return run(grid, block, shared_bytes, 1, stream, std::move(kernel));
}
cudaError_t run_clusters(dim3 grid, dim3 block, size_t shared_bytes, unsigned cluster, cudaStream_t stream,
                         std::function<void()> kernel) {
  if (cluster == 0 || grid.x % cluster != 0) return cudaErrorInvalidClusterSize;
  return run(grid, block, shared_bytes, cluster, stream, std::move(kernel));
}
cudaError_t run_together(dim3 grid, dim3 block, size_t shared_bytes, cudaStream_t stream,
                         std::function<void()> kernel) {
  return run(grid, block, shared_bytes, blocks_of(grid), stream, std::move(kernel));
}

int multiprocessors() {
  const char* const variable = std::getenv("QWEN_EMULATED_MULTIPROCESSORS");
  return variable == nullptr ? 3 : std::max(1, std::atoi(variable));
}

int max_cluster_blocks() {
  const char* const variable = std::getenv("QWEN_EMULATED_CLUSTER");
  return variable == nullptr ? 8 : std::max(1, std::atoi(variable));
}

int blocks_that_fit_together(int threads, size_t shared_bytes) {
  constexpr size_t kThreads = 2048;  // of a multiprocessor; each block takes 1 KiB of shared memory more
  if (threads < 1 || threads > static_cast<int>(kMaxThreads) || shared_bytes > kMaxSharedBytes) return 0;
  const size_t each = std::min(kThreads / threads, (kMaxSharedBytes + 1024) / (shared_bytes + 1024));
  return static_cast<int>(std::min(multiprocessors() * each, size_t{kMaxThreadsTogether} / threads));
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
void require_wait(const char* name) {
  if (!machine().current().waited) machine().fail(std::string(name) + " before wait_for_previous_kernel()");
}

void publish(void* to, const void* words, unsigned count) {
  require_wait("publish");
  if (reinterpret_cast<uintptr_t>(to) % (4 * count) != 0) fail("publish at an address that is not aligned");
  for (unsigned i = 0; i < count; ++i) {
    uint32_t word = 0;
    std::memcpy(&word, static_cast<const uint32_t*>(to) + i, sizeof(word));
    if (word != kAbsent) fail("publish of a word that is there already: twice, or in an area not cleared");
  }
  std::memcpy(to, words, 4 * count);
  machine().published();
}

void load_published(void* words, const void* from, unsigned count) {
  require_wait("await");
  if (reinterpret_cast<uintptr_t>(from) % (4 * count) != 0) fail("await at an address that is not aligned");
  std::memcpy(words, from, 4 * count);
}

void poll_again(const void* from) { machine().poll_again(from); }

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
