#include "kernels/cuda/emulated_machine.h"

#include <algorithm>
#include <bit>
#include <cstdio>
#include <cstring>

namespace qwen::cuda::emulated {
namespace {

constexpr size_t kSharedAlignment = 1024;
constexpr size_t kCanaryBytes = 256;
constexpr unsigned char kCanary = 0xa5;

}  // namespace

Machine& machine() {
  static Machine* const machine = new Machine;  // never destroyed: its stacks outlive static destructors
  return *machine;
}

cudaError_t Machine::run(dim3 grid, dim3 block, size_t shared_bytes, unsigned cluster,
                         const std::function<void()>& kernel) {
  const char* const order = std::getenv("QWEN_EMULATION_ORDER");
  reverse_ = order != nullptr && std::strcmp(order, "reverse") == 0;
  threads_ = block.x * block.y * block.z;
  shared_bytes_ = shared_bytes;
  kernel_ = &kernel;
  error_.clear();
  gridDim = grid;
  blockDim = block;
  const uint64_t blocks = uint64_t{grid.x} * grid.y * grid.z;
  cluster_ = cluster;
  reserve();
  for (uint64_t i = 0; i < blocks && error_.empty(); i += cluster) {
    run_cluster(reverse_ ? blocks - cluster - i : i);
  }
  if (error_.empty()) return cudaSuccess;
  std::fprintf(stderr, "emulated GPU: block (%u, %u, %u): %s\n", blockIdx.x, blockIdx.y, blockIdx.z,
               error_.c_str());
  return cudaErrorUnknown;
}

void Machine::reserve() {
  const unsigned threads = cluster_ * threads_;
  if (fibers_.size() < threads) {
    stacks_.reserve(threads);
    fibers_.resize(threads);
    ready_.resize(std::bit_ceil(threads));
  }
  const size_t stride =
      (shared_bytes_ + kCanaryBytes + kSharedAlignment - 1) / kSharedAlignment * kSharedAlignment;
  if (shared_capacity_ < cluster_ * stride) {
    shared_capacity_ = cluster_ * stride;
    shared_.reset(static_cast<unsigned char*>(std::aligned_alloc(kSharedAlignment, shared_capacity_)));
    if (shared_ == nullptr) {
      std::perror("emulated GPU: no memory for shared memory");
      std::abort();
    }
  }
  blocks_.resize(std::max<size_t>(blocks_.size(), cluster_));
  for (unsigned b = 0; b < cluster_; ++b) {
    blocks_[b].fibers = &fibers_[b * threads_];
    blocks_[b].shared = shared_.get() + b * stride;
  }
}

void Machine::run_cluster(uint64_t first) {
  for (unsigned b = 0; b < cluster_; ++b) {
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
  cluster_waiters_.clear();
  cluster_arrived_ = 0;
  in_order(cluster_ * threads_, [&](unsigned f) {
    const unsigned i = f % threads_;
    Fiber& fiber = fibers_[f];
    fiber.block = &blocks_[f / threads_];
    fiber.index = {i % blockDim.x, i / blockDim.x % blockDim.y, i / blockDim.x / blockDim.y};
    fiber.number = i;
    fiber.waited = fiber.ended = false;
    fiber.at_cluster_barrier = false;
    fiber.copies.clear();
    fiber.committed_groups = 0;
    stacks_.begin(&fiber.context, f, &Machine::fiber_main);
    wake(&fiber);
  });
  leave();
  if (error_.empty()) check_cluster();
}

void Machine::check_cluster() {
  constexpr unsigned kShown = 4;
  unsigned waiting = 0;
  for (unsigned b = 0; b < cluster_; ++b) {
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
  for (unsigned b = 0; b < cluster_ && error_.empty(); ++b) check_end(blocks_[b]);
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

}  // namespace qwen::cuda::emulated
