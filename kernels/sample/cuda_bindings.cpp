#include "kernels/cuda/bindings.h"
#include "kernels/sample/cuda.h"

namespace qwen::cuda {

void bind_sample(pybind11::module_& m) {
  m.def("sample", [](uintptr_t logits, uintptr_t tokens, uintptr_t position, uintptr_t slot, uintptr_t seen,
                     uintptr_t temperature, uintptr_t top_k, uintptr_t top_p, uintptr_t min_p,
                     uintptr_t presence_penalty, uintptr_t repetition_penalty, uintptr_t seed,
                     uintptr_t generated_from, uintptr_t next_token, int sessions, int64_t tokens_count,
                     int vocabulary, uintptr_t scratch, uintptr_t counters, uintptr_t cuda_stream) {
    const SampleArguments arguments = {pointer<const float>(logits),
                                       pointer<const int64_t>(tokens),
                                       pointer<const int64_t>(position),
                                       pointer<const int64_t>(slot),
                                       pointer<uint8_t>(seen),
                                       pointer<const float>(temperature),
                                       pointer<const int64_t>(top_k),
                                       pointer<const float>(top_p),
                                       pointer<const float>(min_p),
                                       pointer<const float>(presence_penalty),
                                       pointer<const float>(repetition_penalty),
                                       pointer<const int64_t>(seed),
                                       pointer<const int64_t>(generated_from),
                                       pointer<int64_t>(next_token),
                                       sessions,
                                       tokens_count,
                                       vocabulary};
    check(sample(arguments, pointer<void>(scratch), pointer<uint32_t>(counters), stream(cuda_stream)));
  });
  bind(m, "sample_scratch", &sample_scratch);
}

}  // namespace qwen::cuda
