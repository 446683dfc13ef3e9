// The C ABI between this runner and the code AOTInductor compiles.
//
// A compiled library calls the functions of aoti.cpp and *_operators.cpp; we call the
// `AOTInductorModelContainer*` functions it exports. Both sides are declared here from the ABI's description
// alone, so that no PyTorch header is needed. Every function that can fail returns an error code and never
// throws.
//
// AOTInductor names the functions `aoti_torch_*`; export compiles the calls as `qwen_aoti_torch_*`. A process
// that has PyTorch too then cannot take one for the other.
#pragma once

#include <cstddef>
#include <cstdint>

extern "C" {

// A tensor handle; ours point at qwen::Tensor.
struct AtenTensorOpaque;
using AtenTensorHandle = AtenTensorOpaque*;
using AOTITorchError = int32_t;  // 0 is success

struct AOTInductorModelContainerOpaque;
using ContainerHandle = AOTInductorModelContainerOpaque*;
using AOTIRuntimeError = int32_t;

struct AOTInductorConstantMapEntry {
  const char* name;  // the container's internal name, not the fully qualified one
  AtenTensorHandle handle;
};

}  // extern "C"

// Visible to libraries opened at run time, whatever the visibility of everything else.
#define QWEN_SHIM extern "C" __attribute__((visibility("default"), used))
