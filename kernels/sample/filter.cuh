// The second kernel: a greedy session's token; for sessions with top-k or top-p a histogram of the distances,
// and the bins in which the filters cut.
#pragma once

#include "kernels/sample/best.cuh"
#include "kernels/sample/histogram.cuh"

namespace qwen::cuda::sampling {

// The state from the histogram of all tokens.
__device__ inline void choose_bins(const Scratch& s, int64_t top_k, float top_p) {
  State state;
  const RunningSums sums([&](int bin) { return __ldcg(s.counts + bin); },
                         [&](int bin) { return static_cast<uint64_t>(__ldcg(s.masses + bin)); });
  const Bin end = sums.last([](const Bin&) { return true; });
  state.total = end.mass_before + end.mass;
  Bin rank = end;
  if (top_k > 0 && top_k < static_cast<int64_t>(end.count_before) + end.count) {
    rank = sums.last([&](const Bin& bin) { return bin.count_before < top_k; });
    state.bins.rank = rank.index;
    state.before_rank = rank.count_before;
    state.mass_before_rank = rank.mass_before;
  }
  if (top_p < 1.0F) {
    // What top-k leaves is known but for the tokens of the rank bin.
    const bool ranked = state.bins.rank < kBins;
    const double least = mass_target(top_p, ranked ? rank.mass_before : state.total);
    const double most = mass_target(top_p, rank.mass_before + rank.mass);
    const auto below = [&](double target) {
      return sums.last([&](const Bin& bin) {
        return bin.index <= rank.index && static_cast<double>(bin.mass_before) < target;
      });
    };
    const Bin first = below(least);
    state.bins.first = first.index;
    state.mass_before_first = first.mass_before;
    state.bins.last = below(most).index;
  } else if (state.bins.rank < kBins) {
    state.bins.first = state.bins.last = rank.index;
  }
  if (threadIdx.x == 0) *s.state = state;
}

__global__ void __launch_bounds__(kThreads, 2)
    filter_bins(SampleArguments in, void* scratch, uint32_t* counters) {
  __shared__ Histogram histogram;
  let_next_kernel_start();
  const int session = blockIdx.y, v = blockIdx.x * kChunk + 4 * threadIdx.x;
  const Scratch s = session_scratch(scratch, session, in.vocabulary);
  const Mode mode = session_mode(in, session);
  if (mode == Mode::kFilter) histogram.clear();
  wait_for_previous_kernel();
  if (mode == Mode::kDraw) return;
  if (mode == Mode::kGreedy) {
    if (blockIdx.x != 0) return;
    const Best best = session_best(s, gridDim.x);
    if (threadIdx.x == 0) in.next_token[session] = best.id;
    return;
  }

  const float4 logits = load_penalized(in, session, v);
  const Best best = session_best(s, gridDim.x);  // and a barrier
  if (!isfinite(best.logit)) return;
  const uint4 distances = distances_of(logits, best.logit, in.temperature[session]);
  const double unit = mass_unit(in.vocabulary);
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    const uint32_t distance = i == 0   ? distances.x
                              : i == 1 ? distances.y
                              : i == 2 ? distances.z
                                       : distances.w;
    if (distance < kInfinity) histogram.add(bin_of(distance), mass_of(distance, unit));
  }
  __syncthreads();
  for (int bin = threadIdx.x; bin < kBins; bin += kThreads) {
    const uint32_t count = histogram.counts[bin];
    if (count == 0) continue;
    atomicAdd(s.counts + bin, count);
    atomicAdd(reinterpret_cast<unsigned long long*>(s.masses + bin), histogram.mass(bin));
  }
  if (is_last_block(counters + session, gridDim.x)) choose_bins(s, in.top_k[session], in.top_p[session]);
}

}  // namespace qwen::cuda::sampling
