// Block sizes that were measured: what the tables kernels/<op>/tuned.inc are made of, and which of them a GPU
// uses.
//
// The kernels are linked into the runner, and a program runs on every GPU that the runner was built for: the
// table is chosen when a kernel is launched, by the GPU's compute capability, not when a program is exported.
// A matrix that was not measured, or a GPU without a table, gets the default that a rule predicts
// (linear/decode_configs.h, linear/prefill_configs.h): correct everywhere, perhaps slower.
#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>
#include <span>
#include <string>

namespace qwen::cuda {

// A line of a table: the block sizes of `kernel` for int4 matrices [n, k] with scales for `group` columns,
// from `rows` rows on.
template <typename Kernel, typename Config>
struct Tuned {
  int architecture;  // 90: compute capability 9.0
  Kernel kernel;
  int n;
  int k;
  int group;
  int rows;  // decode: 0, a row's result does not depend on how many there are
  Config config;
};

// The line that holds for `rows` rows, null where there is none.
template <typename Kernel, typename Config>
constexpr const Config* find_tuned(std::span<const Tuned<Kernel, Config>> table, int architecture,
                                   Kernel kernel, int n, int k, int group, int64_t rows) {
  const Tuned<Kernel, Config>* found = nullptr;
  for (const auto& line : table) {
    if (line.architecture == architecture && line.kernel == kernel && line.n == n && line.k == k &&
        line.group == group && line.rows <= rows && (found == nullptr || line.rows > found->rows)) {
      found = &line;
    }
  }
  return found == nullptr ? nullptr : &found->config;
}

// Whether a table has lines for it.
constexpr bool is_measured(int architecture) {
#define TUNED_DECODE(measured, ...) measured,
#define TUNED_PREFILL(measured, ...) measured,
  constexpr int kMeasured[] = {
#include "kernels/gated_delta/tuned.inc"
#include "kernels/linear/tuned.inc"
#include "kernels/moe/tuned.inc"
      0};
#undef TUNED_DECODE
#undef TUNED_PREFILL
  for (const int measured : kMeasured) {
    if (measured == architecture && architecture != 0) return true;
  }
  return false;
}

// The architecture whose lines `architecture` uses, 0 for none. Those that the kernels are built for share
// sm_90's until their own are measured.
constexpr int tuned_as(int architecture) {
  if (is_measured(architecture)) return architecture;
  const bool shares = architecture == 80 || architecture == 89 || architecture == 100;
  return shares && is_measured(90) ? 90 : 0;
}

// One line for who loads a program on a GPU without a table; empty where there is one.
inline std::string untuned_warning(int architecture) {
  if (is_measured(architecture)) return "";
  const int shared = tuned_as(architecture);
  return "block sizes were not measured on this GPU's architecture (sm_" + std::to_string(architecture) +
         "), " + (shared != 0 ? "those of sm_" + std::to_string(shared) : "defaults") +
         " are used; `python -m qwen_runner.kernels.tune all --gpu` in a source checkout measures them";
}

// Of the device current at the first call; 0 where there is none.
inline int gpu_architecture() {
  static const int architecture = [] {
    int device = 0;
    int major = 0;
    int minor = 0;
    if (cudaGetDevice(&device) != cudaSuccess ||
        cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device) != cudaSuccess ||
        cudaDeviceGetAttribute(&minor, cudaDevAttrComputeCapabilityMinor, device) != cudaSuccess) {
      cudaGetLastError();
      return 0;
    }
    return major * 10 + minor;
  }();
  return architecture;
}

}  // namespace qwen::cuda
