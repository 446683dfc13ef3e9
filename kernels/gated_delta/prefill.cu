// Prefill of the linear-attention mixer. Heads of 64 and more go chunk by chunk (prefill_prepare.cuh, then
// prefill_scan.cuh); smaller ones, which no known model has, token by token.
#include "kernels/gated_delta/prefill_prepare.cuh"
#include "kernels/gated_delta/prefill_scan.cuh"
#include "kernels/gated_delta/recurrence.h"

namespace qwen::cuda {
namespace {

constexpr int kConvolveThreads = 128;
constexpr int kScanColumns = 32;
constexpr int kScanStages = 3;

bool chunked(const DeltaShape& shape) {
  return (shape.key_dim == 64 || shape.key_dim == 128) && shape.value_dim % 32 == 0;
}

int64_t chunk_count(int64_t tokens) { return (tokens + kChunk - 1) / kChunk; }

// silu of the convolution, float32 [T, C], and the state after it; four channels a thread, through all
// tokens.
__global__ __launch_bounds__(kConvolveThreads) void convolve_all(Convolution in, float* mixed,
                                                                 DeltaShape shape) {
  constexpr int kRows = 8;
  const int channel = static_cast<int>(blockIdx.x * kConvolveThreads + threadIdx.x) * 4;
  wait_for_previous_kernel();
  let_next_kernel_start();
  if (channel >= shape.channels()) return;
  const ConvolutionWeights weights(in, shape, channel);
  for (int64_t begin = 0; begin < in.tokens; begin += kRows) {
    ConvolutionRows<kRows> rows;
    rows.load(in, shape, channel, begin);
    float4 x[kRows];
    convolve(rows, weights, in.tokens - begin, x);
#pragma unroll
    for (int i = 0; i < kRows; ++i) {
      if (begin + i >= in.tokens) continue;
      *reinterpret_cast<float4*>(mixed + (begin + i) * shape.channels() + channel) = x[i];
    }
  }
  for (int c = 0; c < 4; ++c) advance_convolution(in, shape, channel + c);
}

template <int kKeyDim, int kStages>
cudaError_t launch_scan(const PrefillChunks& chunks, const Convolution& convolution, float* recurrent_state,
                        float* core, const DeltaShape& shape, cudaStream_t stream) {
  const dim3 grid(shape.value_dim / kScanColumns, shape.value_heads);
  const size_t bytes = ScanLayout<kKeyDim, kScanColumns>::bytes(kStages);
  return launch(scan_chunks<kKeyDim, kScanColumns, kStages>, {grid, dim3(kScanColumns * 4 + 32), bytes},
                stream, chunks, convolution, recurrent_state, core, shape);
}

template <int kKeyDim>
cudaError_t prefill_chunks(const Convolution& convolution, const float* gates, const bf16* a_log,
                           const bf16* dt_bias, float* recurrent_state, float* core, void* scratch,
                           const DeltaShape& shape, cudaStream_t stream) {
  const int64_t chunk_number = chunk_count(convolution.tokens);
  const PrefillChunks chunks(scratch, shape, chunk_number);
  QWEN_RETURN_IF_CUDA_ERROR(
      launch(prepare_chunks<kKeyDim>,
             {dim3(shape.key_heads, static_cast<unsigned>(chunk_number), 2), dim3(kPrepareThreads),
              static_cast<size_t>(prepare_shared_bytes<kKeyDim>(shape))},
             stream, convolution, gates, a_log, dt_bias, chunks, shape));
  // GPUs with less shared memory than Hopper's take one chunk at a time.
  const bool has_room =
      static_cast<size_t>(max_shared_bytes()) >= ScanLayout<kKeyDim, kScanColumns>::bytes(kScanStages);
  const auto scan = has_room ? launch_scan<kKeyDim, kScanStages> : launch_scan<kKeyDim, 1>;
  return scan(chunks, convolution, recurrent_state, core, shape, stream);
}

}  // namespace

cudaError_t delta_prefill(const bf16* qkvz, const float* gates, const bf16* conv_weight, const bf16* a_log,
                          const bf16* dt_bias, bf16* conv_state, float* recurrent_state, const int64_t* slot,
                          float* core, void* scratch, DeltaShape shape, int64_t tokens, cudaStream_t stream) {
  if (!shape.has_valid_heads() || !shape.has_valid_taps() || tokens < 1) return cudaErrorInvalidValue;
  const Convolution convolution = {qkvz, conv_weight, conv_state, slot, tokens};
  if (chunked(shape)) {
    const auto prefill = shape.key_dim == 64 ? prefill_chunks<64> : prefill_chunks<128>;
    return prefill(convolution, gates, a_log, dt_bias, recurrent_state, core, scratch, shape, stream);
  }
  auto* const mixed = static_cast<float*>(scratch);
  const dim3 grid((shape.channels() / 4 + kConvolveThreads - 1) / kConvolveThreads);
  QWEN_RETURN_IF_CUDA_ERROR(
      launch(convolve_all, {grid, dim3(kConvolveThreads)}, stream, convolution, mixed, shape));
  return delta_recurrence(mixed, gates, a_log, dt_bias, recurrent_state, slot, core, shape, 1, tokens,
                          stream);
}

size_t delta_prefill_scratch(DeltaShape shape, int64_t tokens) {
  if (chunked(shape)) return PrefillChunks(nullptr, shape, chunk_count(tokens)).bytes;
  return tokens * shape.channels() * sizeof(float);
}

}  // namespace qwen::cuda
