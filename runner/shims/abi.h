// The C ABI between this runner and the code AOTInductor compiles.
//
// A compiled library calls the `aoti_torch_*` functions declared in aoti.cpp and *_operators.cpp; we call the
// `AOTInductorModelContainer*` functions it exports. Both sides are declared here from the ABI's description alone, so
// that no PyTorch header is needed. Every function that can fail returns an ErrorCode and never throws.
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
