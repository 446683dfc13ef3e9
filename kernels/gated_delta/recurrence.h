// The gated delta rule token by token, for decode and for the prefill of small heads.
#pragma once

#include "kernels/gated_delta/cuda.h"

namespace qwen::cuda {

// `sequences` times `tokens` consecutive tokens, sequence i in slot[i]; arguments as delta_step_decode, with
// sequences * tokens rows.
cudaError_t delta_recurrence(const float* mixed, const float* gates, const bf16* a_log, const bf16* dt_bias,
                             float* recurrent_state, const int64_t* slot, float* core, DeltaShape shape,
                             int sequences, int64_t tokens, cudaStream_t stream);

}  // namespace qwen::cuda
