// Work over OpenMP threads and scratch memory that does not throw.
#pragma once

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <memory>
#include <new>

// clang-tidy follows GCC's -fopenmp without having its header.
#if defined(_OPENMP) && __has_include(<omp.h>)
#include <omp.h>
#define QWEN_OPENMP 1
#endif

namespace qwen::cpu {

// Below this many multiply-adds (about 50 us of one core) waking the other threads and waiting for them costs
// more than they save, the more so where other processes want the cores.
inline constexpr int64_t kParallelWork = 1 << 19;

// Threads of a call that is worth them all.
inline int max_threads() {
#if defined(QWEN_OPENMP)
  return omp_get_max_threads();
#else
  return 1;
#endif
}

// Sets max_threads() for calls from this thread.
inline void set_max_threads(int threads) {
#if defined(QWEN_OPENMP)
  omp_set_num_threads(threads);
#else
  (void)threads;
#endif
}

// How many workers to give `parallel_for` for `work` multiply-adds in `items` pieces: one or all, because
// OpenMP makes and ends threads whenever the number changes.
inline int worker_count(int64_t items, int64_t work) {
  return work < kParallelWork || items < 2 ? 1 : max_threads();
}

// Calls body(item, worker) for every item in [0, items), worker in [0, workers), in any order. `body` must
// not throw.
template <typename Body>
void parallel_for(int64_t items, [[maybe_unused]] int workers, const Body& body) {
#if defined(QWEN_OPENMP)
  if (workers > 1) {
    const int64_t chunk = std::max<int64_t>(1, items / (int64_t{8} * workers));
#pragma omp parallel for num_threads(workers) schedule(dynamic, chunk)
    for (int64_t item = 0; item < items; ++item) {
      body(item, omp_get_thread_num());
    }
    return;
  }
#endif
  for (int64_t item = 0; item < items; ++item) {
    body(item, 0);
  }
}

struct AlignedDelete {
  void operator()(void* p) const { ::operator delete(p, std::align_val_t{64}); }
};

// An uninitialized array of trivial elements on its own cache lines.
template <typename T>
using Scratch = std::unique_ptr<T[], AlignedDelete>;

// Returns null if there is no memory for `count` elements.
template <typename T>
Scratch<T> make_scratch(int64_t count) {
  const size_t bytes = static_cast<size_t>(count) * sizeof(T);
  return Scratch<T>(static_cast<T*>(::operator new(bytes, std::align_val_t{64}, std::nothrow)));
}

}  // namespace qwen::cpu
