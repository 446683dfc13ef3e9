#include "kernels/cuda/emulation.h"

#include <sys/mman.h>

#include <algorithm>
#include <array>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <mutex>
#include <string>
#include <utility>
#include <vector>

#ifndef __x86_64__
#include <ucontext.h>
#endif

namespace qwen::cuda::emulated {
namespace {

constexpr size_t kStackBytes = 64 * 1024;
constexpr size_t kGuardBytes = 4096;
constexpr size_t kCanaryBytes = 256;
constexpr unsigned char kPoison = 0xff;
constexpr unsigned char kCanary = 0xa5;

// Contexts: where a suspended fiber goes on.

#ifdef __x86_64__

using Context = void*;  // its stack pointer

extern "C" void qwen_emulation_switch_context(Context* from, Context* to);

// Keeps the registers that a call preserves on the stack, and takes those of `to`.
asm(R"(
    .text
    .hidden qwen_emulation_switch_context
    .globl qwen_emulation_switch_context
    .type qwen_emulation_switch_context, @function
qwen_emulation_switch_context:
    pushq %rbp
    pushq %rbx
    pushq %r12
    pushq %r13
    pushq %r14
    pushq %r15
    movq %rsp, (%rdi)
    movq (%rsi), %rsp
    popq %r15
    popq %r14
    popq %r13
    popq %r12
    popq %rbx
    popq %rbp
    ret
    .size qwen_emulation_switch_context, . - qwen_emulation_switch_context
)");

void switch_context(Context* from, Context* to) { qwen_emulation_switch_context(from, to); }

void begin_context(Context* context, char* stack, size_t size, void (*entry)()) {
  // Six registers, the entry as return address, and none for the entry itself; it begins as if called, 8
  // bytes off 16.
  void** top = reinterpret_cast<void**>(stack + size) - 1;
  top[0] = nullptr;
  *--top = reinterpret_cast<void*>(entry);
  top -= 6;
  std::fill_n(top, 6, nullptr);
  *context = static_cast<void*>(top);
}

#else

using Context = ucontext_t;

void switch_context(Context* from, Context* to) { swapcontext(from, to); }

void begin_context(Context* context, char* stack, size_t size, void (*entry)()) {
  getcontext(context);
  context->uc_stack.ss_sp = stack;
  context->uc_stack.ss_size = size;
  context->uc_link = nullptr;
  makecontext(context, entry, 0);
}

#endif

// The machine: one block at a time.

struct Copy {
  void* to;
  const void* from;
  bool valid;
  int group;
};

struct Fiber {
  Context context = {};
  uint3 index = {};
  unsigned number = 0;  // in the block
  bool waited = false;  // called wait_for_previous_kernel
  bool ended = false;
  const char* waits_at = nullptr;

  // The warp operation it waits in.
  uint32_t mask = 0;
  Combine combine = nullptr;
  void* arguments = nullptr;

  std::vector<Copy> copies;
  int committed_groups = 0;
};

class Machine {
 public:
  Machine();
  Machine(const Machine&) = delete;
  Machine& operator=(const Machine&) = delete;

  cudaError_t run(dim3 grid, dim3 block, size_t shared_bytes, const std::function<void()>& kernel);

  int barrier(Vote vote, int predicate);
  void warp_operation(const char* name, uint32_t mask, Combine combine, void* arguments);
  [[noreturn]] void fail(const std::string& reason);

  Fiber& current() { return *current_; }
  unsigned char* shared() { return shared_.data(); }
  uint32_t warp_lanes() const;

 private:
  static void fiber_main();
  void run_block();
  void check_block();
  // Goes on with the next fiber that can, or with run_block when none can.
  void leave();
  void suspend(const char* at) {
    current_->waits_at = at;
    leave();
  }
  void wake(Fiber* fiber) { ready_[(ready_begin_ + ready_count_++) % kMaxThreads] = fiber; }
  template <typename Visit>
  void in_order(unsigned count, Visit visit) const {
    for (unsigned i = 0; i < count; ++i) visit(reverse_ ? count - 1 - i : i);
  }

  const bool reverse_;
  char* stacks_;
  std::vector<Fiber> fibers_ = std::vector<Fiber>(kMaxThreads);
  std::array<Fiber*, kMaxThreads> ready_ = {};  // a ring
  unsigned ready_begin_ = 0;
  unsigned ready_count_ = 0;

  Context host_ = {};
  Fiber* current_ = nullptr;  // none: run_block
  const std::function<void()>* kernel_ = nullptr;
  std::string error_;

  unsigned threads_ = 0;
  unsigned ended_ = 0;
  unsigned at_barrier_ = 0;
  unsigned predicates_ = 0;
  unsigned barrier_result_ = 0;
  std::array<uint32_t, kMaxThreads / 32> at_warp_operation_ = {};
  size_t shared_bytes_ = 0;
  struct alignas(1024) SharedBytes {
    std::array<unsigned char, kMaxSharedBytes + kCanaryBytes> bytes;
    unsigned char* data() { return bytes.data(); }
  } shared_ = {};
};

Machine& machine() {
  static Machine* const machine = new Machine;  // never destroyed: its stacks outlive static destructors
  return *machine;
}

Machine::Machine()
    : reverse_([] {
        const char* order = std::getenv("QWEN_EMULATION_ORDER");
        return order != nullptr && std::strcmp(order, "reverse") == 0;
      }()) {
  constexpr size_t kStride = kStackBytes + kGuardBytes;
  void* stacks = mmap(nullptr, kStride * kMaxThreads, PROT_READ | PROT_WRITE,
                      MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  if (stacks == MAP_FAILED) {
    std::perror("emulated GPU: no memory for stacks");
    std::abort();
  }
  stacks_ = static_cast<char*>(stacks);
  for (unsigned i = 0; i < kMaxThreads; ++i) mprotect(stacks_ + i * kStride, kGuardBytes, PROT_NONE);
}

bool valid(dim3 grid, dim3 block, size_t shared_bytes) {
  const uint64_t threads = uint64_t{block.x} * block.y * block.z;
  return threads > 0 && threads <= kMaxThreads && block.z <= 64 && grid.x > 0 && grid.y > 0 && grid.z > 0 &&
         grid.x <= 0x7fffffffU && grid.y <= 65535 && grid.z <= 65535 && shared_bytes <= kMaxSharedBytes;
}

cudaError_t Machine::run(dim3 grid, dim3 block, size_t shared_bytes, const std::function<void()>& kernel) {
  threads_ = block.x * block.y * block.z;
  shared_bytes_ = shared_bytes;
  kernel_ = &kernel;
  error_.clear();
  gridDim = grid;
  blockDim = block;
  const uint64_t blocks = uint64_t{grid.x} * grid.y * grid.z;
  for (uint64_t i = 0; i < blocks && error_.empty(); ++i) {
    const uint64_t b = reverse_ ? blocks - 1 - i : i;
    blockIdx = {static_cast<unsigned>(b % grid.x), static_cast<unsigned>(b / grid.x % grid.y),
                static_cast<unsigned>(b / grid.x / grid.y)};
    run_block();
  }
  if (error_.empty()) return cudaSuccess;
  std::fprintf(stderr, "emulated GPU: block (%u, %u, %u): %s\n", blockIdx.x, blockIdx.y, blockIdx.z,
               error_.c_str());
  return cudaErrorUnknown;
}

void Machine::run_block() {
  std::memset(shared(), kPoison, shared_bytes_);
  std::memset(shared() + shared_bytes_, kCanary, kCanaryBytes);
  ready_begin_ = ready_count_ = ended_ = at_barrier_ = predicates_ = 0;
  at_warp_operation_.fill(0);
  in_order(threads_, [&](unsigned i) {
    Fiber& fiber = fibers_[i];
    fiber.index = {i % blockDim.x, i / blockDim.x % blockDim.y, i / blockDim.x / blockDim.y};
    fiber.number = i;
    fiber.waited = fiber.ended = false;
    fiber.copies.clear();
    fiber.committed_groups = 0;
    char* const stack = stacks_ + i * (kStackBytes + kGuardBytes) + kGuardBytes;
    begin_context(&fiber.context, stack, kStackBytes, &Machine::fiber_main);
    wake(&fiber);
  });
  leave();
  if (error_.empty()) check_block();
}

void Machine::check_block() {
  if (ended_ < threads_) {
    error_ = std::to_string(ended_) + " of " + std::to_string(threads_) +
             " threads ended, the others wait for them:";
    int shown = 0;
    for (unsigned i = 0; i < threads_ && shown < 8; ++i) {
      if (fibers_[i].ended) continue;
      error_ +=
          std::string(shown++ == 0 ? " thread " : ", ") + std::to_string(i) + " at " + fibers_[i].waits_at;
    }
    return;
  }
  for (unsigned i = 0; i < threads_; ++i) {
    if (!fibers_[i].waited) {
      error_ = "thread " + std::to_string(i) + " ended without wait_for_previous_kernel()";
      return;
    }
  }
  const unsigned char* const canary = shared() + shared_bytes_;
  if (std::any_of(canary, canary + kCanaryBytes, [](unsigned char byte) { return byte != kCanary; })) {
    error_ = "wrote past its " + std::to_string(shared_bytes_) + " bytes of dynamic shared memory";
  }
}

void Machine::fiber_main() {
  Machine& m = machine();
  (*m.kernel_)();
  m.current_->ended = true;
  ++m.ended_;
  m.leave();
  std::abort();
}

void Machine::leave() {
  Context* const from = current_ == nullptr ? &host_ : &current_->context;
  Context* to = &host_;
  current_ = nullptr;
  if (ready_count_ > 0 && error_.empty()) {
    current_ = ready_[ready_begin_];
    ready_begin_ = (ready_begin_ + 1) % kMaxThreads;
    --ready_count_;
    threadIdx = current_->index;
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
  predicates_ += predicate != 0 ? 1 : 0;
  if (++at_barrier_ < threads_) {
    suspend("a block barrier");
  } else {
    barrier_result_ = predicates_;
    at_barrier_ = predicates_ = 0;
    in_order(threads_, [&](unsigned i) {
      if (&fibers_[i] != current_) wake(&fibers_[i]);
    });
  }
  switch (vote) {
    case Vote::kAnd:
      return barrier_result_ == threads_ ? 1 : 0;
    case Vote::kOr:
      return barrier_result_ != 0 ? 1 : 0;
    default:
      return static_cast<int>(barrier_result_);
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
  uint32_t& waiting = at_warp_operation_[warp];
  waiting |= own;
  if ((waiting & mask) != mask) {
    suspend(name);
    return;
  }
  void* all[32] = {};
  for (unsigned i = 0; i < 32; ++i) {
    if ((mask >> i & 1) == 0) continue;
    const Fiber& fiber = fibers_[warp * 32 + i];
    if (fiber.mask != mask || fiber.combine != combine) {
      fail(std::string(name) + " meets lane " + std::to_string(i) +
           (fiber.combine != combine ? std::string(" at ") + fiber.waits_at : " with another mask"));
    }
    all[i] = fiber.arguments;
  }
  if (combine != nullptr) combine(all, mask);
  waiting &= ~mask;
  in_order(32, [&](unsigned i) {
    Fiber* const fiber = &fibers_[warp * 32 + i % 32];
    if ((mask >> i & 1) != 0 && fiber != current_) wake(fiber);
  });
}

}  // namespace

cudaError_t run(dim3 grid, dim3 block, size_t shared_bytes, cudaStream_t stream,
                std::function<void()> kernel) {
  if (!valid(grid, block, shared_bytes)) return cudaErrorInvalidConfiguration;
  const std::function<cudaError_t()> operation = [=, kernel = std::move(kernel)] {
    static std::mutex mutex;
    const std::lock_guard lock(mutex);
    return machine().run(grid, block, shared_bytes, kernel);
  };
  return capture != nullptr && capture(stream, operation) ? cudaSuccess : operation();
}

unsigned char* dynamic_shared() { return machine().shared(); }
int block_barrier(Vote vote, int predicate) { return machine().barrier(vote, predicate); }
void warp_operation(const char* name, uint32_t mask, Combine combine, void* arguments) {
  machine().warp_operation(name, mask, combine, arguments);
}
unsigned lane() { return machine().current().number % 32; }
uint32_t warp_lanes() { return machine().warp_lanes(); }
void fail(const char* reason) { machine().fail(reason); }
void previous_kernel_waited_for() { machine().current().waited = true; }

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
