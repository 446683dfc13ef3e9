// The ends of a cuda program: qwen::embedding_block, qwen::head_block and qwen::sample.

#include "kernels/linear/cuda.h"
#include "kernels/sample/cuda.h"
#include "shims/cuda_arguments.h"

using namespace qwen;  // NOLINT(google-build-using-namespace): the functions below are outside for their C
                       // names

QWEN_SHIM AOTITorchError qwen_aoti_torch_cuda_embedding_block(AtenTensorHandle ids_handle,
                                                              AtenTensorHandle qweight,
                                                              AtenTensorHandle scales,
                                                              AtenTensorHandle* result) {
  return guarded("embedding_block", [&] {
    const Tensor& ids = dense(ids_handle, 1, kIndex, "ids");
    const cuda::Int8Matrix table = int8_argument(qweight, scales, "the embedding");
    auto rows = allocate({ids.sizes[0], table.k}, ScalarType::kBFloat16);
    QWEN_LAUNCH(int8_embedding, ids.as<int64_t>(), table, bf16_data(*rows), ids.sizes[0]);
    *result = rows.release()->handle();
  });
}

QWEN_SHIM AOTITorchError qwen_aoti_torch_cuda_head_block(AtenTensorHandle x_handle,
                                                         AtenTensorHandle norm_handle,
                                                         AtenTensorHandle qweight, AtenTensorHandle scales,
                                                         int64_t vocab_size, double eps,
                                                         AtenTensorHandle* result) {
  return guarded("head_block", [&] {
    const Tensor& x = dense(x_handle, 2, kBFloat, "x");
    const int64_t rows = x.sizes[0];
    const int64_t hidden = x.sizes[1];
    require(rows <= cuda::kMaxDecodeRows, "too many rows");
    const cuda::RmsNorm norm = {bf16_argument(norm_handle, {hidden}, "norm is not [D]"),
                                static_cast<float>(eps)};
    auto logits = allocate({rows, vocab_size}, ScalarType::kFloat32);
    if (get(qweight).dtype == ScalarType::kUInt8) {
      const cuda::Int4Matrix head = int4_argument(qweight, scales, vocab_size, hidden, "the head");
      QWEN_LAUNCH(int4_head, bf16_data(x), norm, head, logits->as<float>(), static_cast<int>(rows));
    } else {
      const cuda::Int8Matrix head = int8_argument(qweight, scales, "the head");
      require(head.n == vocab_size && head.k == hidden, "the head is not [V, D]");
      QWEN_LAUNCH(int8_head, bf16_data(x), norm, head, logits->as<float>(), static_cast<int>(rows));
    }
    *result = logits.release()->handle();
  });
}

QWEN_SHIM AOTITorchError qwen_aoti_torch_cuda_sample(
    AtenTensorHandle logits_handle, AtenTensorHandle tokens_handle, AtenTensorHandle position,
    AtenTensorHandle slot, AtenTensorHandle seen_handle, AtenTensorHandle temperature, AtenTensorHandle top_k,
    AtenTensorHandle top_p, AtenTensorHandle min_p, AtenTensorHandle presence_penalty,
    AtenTensorHandle repetition_penalty, AtenTensorHandle seed, AtenTensorHandle generated_from,
    AtenTensorHandle* result) {
  return guarded("sample", [&] {
    const Tensor& logits = dense(logits_handle, 2, kFloat, "logits");
    const Tensor& tokens = dense(tokens_handle, 1, kIndex, "tokens");
    const Tensor& seen = dense(seen_handle, 2, kByte, "seen");
    const int64_t sessions = logits.sizes[0];
    require(seen.sizes[1] == logits.sizes[1], "seen is not [S, V]");
    require(sessions <= cuda::kMaxDecodeRows && (sessions == 1 || tokens.sizes[0] == sessions),
            "tokens are not one a session");
    auto next = allocate({sessions}, ScalarType::kInt64);
    const cuda::SampleArguments arguments = {
        .logits = logits.as<float>(),
        .tokens = tokens.as<int64_t>(),
        .position = per_session<int64_t>(position, kIndex, sessions, "position"),
        .slot = per_session<int64_t>(slot, kIndex, sessions, "slot"),
        .seen = seen.as<uint8_t>(),
        .temperature = per_session<float>(temperature, kFloat, sessions, "temperature"),
        .top_k = per_session<int64_t>(top_k, kIndex, sessions, "top_k"),
        .top_p = per_session<float>(top_p, kFloat, sessions, "top_p"),
        .min_p = per_session<float>(min_p, kFloat, sessions, "min_p"),
        .presence_penalty = per_session<float>(presence_penalty, kFloat, sessions, "presence_penalty"),
        .repetition_penalty = per_session<float>(repetition_penalty, kFloat, sessions, "repetition_penalty"),
        .seed = per_session<int64_t>(seed, kIndex, sessions, "seed"),
        .generated_from = per_session<int64_t>(generated_from, kIndex, sessions, "generated_from"),
        .next_token = next->as<int64_t>(),
        .sessions = static_cast<int>(sessions),
        .tokens_count = tokens.sizes[0],
        .vocabulary = static_cast<int>(logits.sizes[1])};
    const Scratch<std::byte> scratch(
        static_cast<int64_t>(cuda::sample_scratch(arguments.vocabulary, arguments.sessions)));
    QWEN_LAUNCH(sample, arguments, scratch, cuda_scope().counters);
    *result = next.release()->handle();
  });
}
