#include "kernels/cuda/emulated_fiber.h"

#include <sys/mman.h>

#include <algorithm>
#include <cstddef>
#include <cstdio>
#include <cstdlib>

namespace qwen::cuda::emulated {
namespace {

constexpr size_t kStackBytes = 64 * 1024;
constexpr size_t kGuardBytes = 4096;
constexpr size_t kStride = kStackBytes + kGuardBytes;
constexpr unsigned kChunk = 1024;  // stacks that are mapped together

#ifdef __x86_64__

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

void begin_context(Context* context, char* stack, void (*entry)()) {
  // Six registers, the entry as return address, and none for the entry itself; it begins as if called, 8
  // bytes off 16.
  void** top = reinterpret_cast<void**>(stack + kStackBytes) - 1;
  top[0] = nullptr;
  *--top = reinterpret_cast<void*>(entry);
  top -= 6;
  std::fill_n(top, 6, nullptr);
  *context = static_cast<void*>(top);
}

#else

void begin_context(Context* context, char* stack, void (*entry)()) {
  getcontext(context);
  context->uc_stack.ss_sp = stack;
  context->uc_stack.ss_size = kStackBytes;
  context->uc_link = nullptr;
  makecontext(context, entry, 0);
}

#endif

char* map_chunk() {
  void* const mapped = mmap(nullptr, kStride * kChunk, PROT_READ | PROT_WRITE,
                            MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  bool guarded = mapped != MAP_FAILED;
  char* const chunk = static_cast<char*>(mapped);
  for (unsigned i = 0; i < kChunk && guarded; ++i) {
    guarded = mprotect(chunk + i * kStride, kGuardBytes, PROT_NONE) == 0;
  }
  if (!guarded) {
    std::perror("emulated GPU: no memory for stacks");
    std::abort();
  }
  return chunk;
}

}  // namespace

#ifdef __x86_64__
void switch_context(Context* from, Context* to) { qwen_emulation_switch_context(from, to); }
#else
void switch_context(Context* from, Context* to) { swapcontext(from, to); }
#endif

void Stacks::reserve(unsigned count) {
  while (chunks_.size() * kChunk < count) chunks_.push_back(map_chunk());
}

void Stacks::begin(Context* context, unsigned stack, void (*entry)()) {
  begin_context(context, chunks_[stack / kChunk] + stack % kChunk * kStride + kGuardBytes, entry);
}

}  // namespace qwen::cuda::emulated
