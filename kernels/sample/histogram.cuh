// Sums of counts and masses over kBins bins, in shared memory, and the bin in which a running sum reaches a
// target.
#pragma once

#include "kernels/sample/session.cuh"

namespace qwen::cuda::sampling {

// A 64-bit sum is two words with a carry: shared memory has no 64-bit atomic addition.
struct Histogram {
  uint32_t counts[kBins];
  uint32_t low[kBins];
  uint32_t high[kBins];

  __device__ void clear() {
    for (int bin = threadIdx.x; bin < kBins; bin += kThreads) counts[bin] = low[bin] = high[bin] = 0;
  }
  __device__ void add(uint32_t bin, uint64_t mass) {
    atomicAdd(&counts[bin], 1U);
    const uint32_t addend = static_cast<uint32_t>(mass);
    const uint32_t carry = atomicAdd(&low[bin], addend) > ~addend ? 1 : 0;
    const uint32_t upper = static_cast<uint32_t>(mass >> 32) + carry;
    if (upper != 0) atomicAdd(&high[bin], upper);
  }
  __device__ uint64_t mass(int bin) const { return static_cast<uint64_t>(high[bin]) << 32 | low[bin]; }
};

// A bin and what lies before it.
struct Bin {
  int index;
  uint32_t count;
  uint32_t count_before;
  uint64_t mass;
  uint64_t mass_before;
};

// The bins with their running sums, four a thread. Made and asked by all threads of the block together.
class RunningSums {
 public:
  // count(bin) and mass(bin) give a bin's sums.
  template <typename Count, typename Mass>
  __device__ RunningSums(Count count, Mass mass) {
    uint32_t counted = 0;
    uint64_t summed = 0;
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const int bin = 4 * threadIdx.x + i;
      bins_[i] = {bin, count(bin), counted, mass(bin), summed};
      counted += bins_[i].count;
      summed += bins_[i].mass;
    }
    const uint32_t count_before = inclusive_scan(counted) - counted;
    const uint64_t mass_before = inclusive_scan(summed) - summed;
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      bins_[i].count_before += count_before;
      bins_[i].mass_before += mass_before;
    }
  }

  // The last bin with a token and below(bin); below is true up to some bin, and of the first bin with a
  // token.
  template <typename Below>
  __device__ Bin last(Below below) const {
    __shared__ Bin found;
    int index = 0;
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      if (bins_[i].count != 0 && below(bins_[i])) index = bins_[i].index;
    }
    index = block_max(index);
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      if (bins_[i].index == index) found = bins_[i];
    }
    __syncthreads();
    const Bin result = found;
    __syncthreads();
    return result;
  }

 private:
  Bin bins_[4];
};

}  // namespace qwen::cuda::sampling
