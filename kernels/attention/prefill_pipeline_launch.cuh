// How prefill's attention on Hopper is launched, and where it can be.
#pragma once

#include <cmath>

#include "kernels/attention/prefill_pipeline.cuh"

namespace qwen::cuda::prefill_attention {

// Whether this GPU runs code that has products of warpgroups.
template <typename P>
bool is_pipelined() {
  static const bool is = [] {
    cudaFuncAttributes attributes;
    return cudaFuncGetAttributes(&attributes, reinterpret_cast<const void*>(attend_pipelined<P>)) ==
               cudaSuccess &&
           attributes.maxThreadsPerBlock >= P::kThreads;
  }();
  return is;
}

template <typename P>
cudaError_t launch_pipelined(const Arguments& a, cudaStream_t stream) {
  const AttentionShape& shape = a.shape;
  const int64_t rows = int64_t{a.tokens} * (shape.query_heads / shape.key_heads);
  const int64_t blocks = (rows + P::kRows - 1) / P::kRows * shape.key_heads;
  PipelineArguments p;
  p.a = a;
  p.part_bits = 0;
  p.score_scale = kLog2E / std::sqrt(static_cast<float>(shape.head_dim));
  while (2 << p.part_bits <= P::kMostParts && blocks * (2 << p.part_bits) <= multiprocessors()) ++p.part_bits;
  if (!map_matrices(p.keys, a.key_cache, shape.cache_length, shape.head_dim, P::kKeys) ||
      !map_matrices(p.values, a.value_cache, shape.cache_length, shape.head_dim, P::kKeys)) {
    return cudaErrorNotSupported;
  }
  return launch(attend_pipelined<P>,
                {dim3(static_cast<unsigned>(blocks << p.part_bits)), dim3(P::kThreads), P::kSharedBytes,
                 1U << p.part_bits},
                stream, p);
}

}  // namespace qwen::cuda::prefill_attention
