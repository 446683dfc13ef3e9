// Fibers' stacks and contexts: what emulation.cpp runs threads on.
#pragma once

#ifndef __x86_64__
#include <ucontext.h>
#endif

#include <vector>

namespace qwen::cuda::emulated {

// Where a suspended fiber goes on.
#ifdef __x86_64__
using Context = void*;  // its stack pointer
#else
using Context = ucontext_t;
#endif

// Goes on at `to`, and keeps in `from` where this was.
void switch_context(Context* from, Context* to);

// Stacks with a guard page below each.
class Stacks {
 public:
  // Memory that runs out ends the process.
  void reserve(unsigned count);
  // Makes `context` begin with `entry`, which never returns, on a stack.
  void begin(Context* context, unsigned stack, void (*entry)());

 private:
  std::vector<char*> chunks_;
};

}  // namespace qwen::cuda::emulated
