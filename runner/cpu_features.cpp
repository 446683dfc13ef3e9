#include "cpu_features.h"

namespace qwen {

bool cpu_supports(const std::string& isa) {
  if (isa == "default") return true;
#if defined(__x86_64__)
  const bool avx2 = __builtin_cpu_supports("avx2") != 0 && __builtin_cpu_supports("fma") != 0;
  if (isa == "avx2") return avx2;
  // The set that PyTorch's vectorized code of this name is compiled for.
  if (isa == "avx512") {
    return avx2 && __builtin_cpu_supports("avx512f") != 0 && __builtin_cpu_supports("avx512dq") != 0 &&
           __builtin_cpu_supports("avx512vl") != 0 && __builtin_cpu_supports("avx512bw") != 0;
  }
#endif
  return false;
}

}  // namespace qwen
