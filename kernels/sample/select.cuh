// Where the filters cut among the candidates: exact selection in a list of distinct keys, by rank or by mass.
#pragma once

#include "kernels/sample/histogram.cuh"

namespace qwen::cuda::sampling {

// A list that fits is sorted; a longer one is narrowed first.
inline constexpr int kSorted = 4 * kThreads;

struct SelectMemory {
  Histogram histogram;
  uint64_t keys[kSorted];
  uint32_t count;
};

// Sorts keys[0, size), size a power of two.
__device__ inline void bitonic_sort(uint64_t* keys, uint32_t size) {
  for (uint32_t run = 2; run <= size; run *= 2) {
    for (uint32_t stride = run / 2; stride > 0; stride /= 2) {
      for (uint32_t pair = threadIdx.x; pair < size / 2; pair += kThreads) {
        const uint32_t i = 2 * pair - pair % stride, j = i + stride;
        const uint64_t a = keys[i], b = keys[j];
        if ((a > b) == ((i & run) == 0)) {
          keys[i] = b;
          keys[j] = a;
        }
      }
      __syncthreads();
    }
  }
}

// Of keys[0, n) in [low, high], in order: the last for which `base` and the weights of those before it sum to
// less than `target`. There is such a key. weight(key) gives a key's weight.
template <typename Weight>
__device__ uint64_t select_key(const uint64_t* keys, uint32_t n, uint64_t low, uint64_t high, uint64_t base,
                               double target, Weight weight, SelectMemory& memory) {
  uint32_t count = n;  // at least as many as are in [low, high]
  while (count > kSorted) {
    uint64_t complement = 0, largest = 0;
    count = 0;
    for (uint32_t i = threadIdx.x; i < n; i += kThreads) {
      const uint64_t key = __ldcg(keys + i);
      if (key < low || key > high) continue;
      complement = max(complement, ~key);
      largest = max(largest, key);
      ++count;
    }
    count = block_sum(count);
    low = ~block_max(complement);
    high = block_max(largest);
    if (count <= kSorted) break;

    // The bits above are the same in all keys.
    const int shift = max(0, 64 - __clzll(static_cast<long long>(low ^ high)) - 11);
    static_assert(kBins == 1 << 11);
    memory.histogram.clear();
    __syncthreads();
    for (uint32_t i = threadIdx.x; i < n; i += kThreads) {
      const uint64_t key = __ldcg(keys + i);
      if (key < low || key > high) continue;
      memory.histogram.add(static_cast<uint32_t>((key >> shift) - (low >> shift)), weight(key));
    }
    __syncthreads();
    const RunningSums sums([&](int bin) { return memory.histogram.counts[bin]; },
                           [&](int bin) { return memory.histogram.mass(bin); });
    const Bin bin =
        sums.last([&](const Bin& b) { return static_cast<double>(base + b.mass_before) < target; });
    base += bin.mass_before;
    count = bin.count;
    const uint64_t begin = ((low >> shift) + bin.index) << shift;
    high = min(high, begin + (uint64_t{1} << shift) - 1);
    low = max(low, begin);
  }

  uint32_t size = 2;
  while (size < count) size *= 2;
  if (threadIdx.x == 0) memory.count = 0;
  for (uint32_t i = threadIdx.x; i < size; i += kThreads) memory.keys[i] = ~uint64_t{0};
  __syncthreads();
  for (uint32_t i = threadIdx.x; i < n; i += kThreads) {
    const uint64_t key = __ldcg(keys + i);
    if (key >= low && key <= high) memory.keys[atomicAdd(&memory.count, 1U)] = key;
  }
  __syncthreads();
  bitonic_sort(memory.keys, size);

  count = memory.count;
  const uint32_t share = (size + kThreads - 1) / kThreads, first = threadIdx.x * share;
  const uint32_t end = min(first + share, count);
  uint64_t sum = 0;
  for (uint32_t i = first; i < end; ++i) sum += weight(memory.keys[i]);
  uint64_t before = base + inclusive_scan(sum) - sum;
  uint32_t last = 0;
  for (uint32_t i = first; i < end; ++i) {
    if (static_cast<double>(before) < target) last = i;
    before += weight(memory.keys[i]);
  }
  const uint64_t result = memory.keys[block_max(last)];
  __syncthreads();
  return result;
}

// The last key that top-k and top-p keep among the candidates keys[0, n).
__device__ inline uint64_t last_kept_key(const uint64_t* keys, uint32_t n, const State& state, int64_t top_k,
                                         float top_p, double unit, SelectMemory& memory) {
  const auto mass = [unit](uint64_t key) { return mass_of(static_cast<uint32_t>(key >> 32), unit); };
  uint64_t last = token_key(kInfinity - 1, -1);
  uint64_t total = state.total;
  if (state.bins.rank < kBins) {
    const uint64_t begin = token_key(bin_begin(state.bins.rank), 0);
    const uint64_t ranked = select_key(
        keys, n, begin, token_key(bin_end(state.bins.rank), -1), state.before_rank,
        static_cast<double>(top_k), [](uint64_t) { return uint64_t{1}; }, memory);
    // With all that equal it.
    last = token_key(static_cast<uint32_t>(ranked >> 32), -1);
    if (top_p < 1.0F) {
      uint64_t sum = 0;
      for (uint32_t i = threadIdx.x; i < n; i += kThreads) {
        const uint64_t key = __ldcg(keys + i);
        if (key >= begin && key <= last) sum += mass(key);
      }
      total = state.mass_before_rank + block_sum(sum);
    }
  }
  if (!(top_p < 1.0F)) return last;
  return select_key(keys, n, token_key(bin_begin(state.bins.first), 0),
                    min(last, token_key(bin_end(state.bins.last), -1)), state.mass_before_first,
                    mass_target(top_p, total), mass, memory);
}

}  // namespace qwen::cuda::sampling
