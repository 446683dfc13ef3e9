// The CUDA launchers from Python, for tests and benchmarks: qwen_runner._cuda_kernels (nvcc, a GPU) and
// qwen_runner._emulated_kernels (a C++ compiler, the CPU) from the same sources.
//
// bind() defines a function that takes a launcher's arguments: pointers and the stream as integers, structs
// as the classes that bindings.cpp and the operators' own bindings define. A CUDA error raises RuntimeError.
#pragma once

#include <pybind11/pybind11.h>

#include <cstdint>
#include <stdexcept>
#include <string>
#include <type_traits>

#include "kernels/cuda/types.h"

namespace qwen::cuda {

void bind_attention(pybind11::module_& m);
void bind_gated_delta(pybind11::module_& m);
void bind_linear_decode(pybind11::module_& m);
void bind_linear_int8(pybind11::module_& m);
void bind_linear_prefill(pybind11::module_& m);
void bind_moe_decode(pybind11::module_& m);
void bind_moe_prefill(pybind11::module_& m);
void bind_norm(pybind11::module_& m);
void bind_primitives(pybind11::module_& m);
void bind_sample(pybind11::module_& m);
void bind_sort(pybind11::module_& m);

inline void check(cudaError_t error) {
  if (error != cudaSuccess) {
    throw std::runtime_error(std::string(cudaGetErrorName(error)) + ": " + cudaGetErrorString(error));
  }
}

// NOLINTBEGIN(performance-no-int-to-ptr): Python knows pointers as integers
template <typename T>
T* pointer(uintptr_t address) {
  return reinterpret_cast<T*>(address);
}
inline cudaStream_t stream(uintptr_t handle) { return reinterpret_cast<cudaStream_t>(handle); }

// What Python gives for a parameter of type T, and back.
template <typename T>
using FromPython = std::conditional_t<std::is_pointer_v<T>, uintptr_t, T>;
template <typename T>
T from_python(const FromPython<T>& argument) {
  if constexpr (std::is_pointer_v<T>) {
    return reinterpret_cast<T>(argument);
  } else {
    return argument;
  }
}
// NOLINTEND(performance-no-int-to-ptr)

// Of a launcher, or of a function of sizes that returns a number.
template <typename Result, typename... Parameters>
void bind(pybind11::module_& m, const char* name, Result (*function)(Parameters...)) {
  m.def(name, [function](const FromPython<std::remove_cvref_t<Parameters>>&... arguments) {
    if constexpr (std::is_same_v<Result, cudaError_t>) {
      check(function(from_python<std::remove_cvref_t<Parameters>>(arguments)...));
    } else {
      return function(from_python<std::remove_cvref_t<Parameters>>(arguments)...);
    }
  });
}

}  // namespace qwen::cuda
