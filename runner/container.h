// Container: one compiled method, through the C functions that AOTInductor gives its library.
//
// Not thread-safe: one run at a time. Constants are bound once, after creation, to memory that must outlive
// it.
#pragma once

#include <cstddef>
#include <memory>
#include <optional>
#include <span>
#include <string>
#include <unordered_map>
#include <vector>

#include "device.h"
#include "device_arena.h"
#include "library.h"
#include "result.h"
#include "shims/tensor.h"

namespace qwen {

// A weight or state tensor as the compiled method declares it.
struct ConstantInfo {
  std::string internal_name;  // what binding takes
  std::string name;           // fully qualified name in the exported model
  ScalarType dtype;
  size_t bytes;  // of the storage it had at export
};

class Container {
 public:
  // Where `device` is a GPU, what the method makes while it runs is there. Errors: kUnsupported, kInternal.
  static Result<std::unique_ptr<Container>> create(std::span<const std::byte> library,
                                                   const std::string& name, Device& device);
  ~Container();
  Container(const Container&) = delete;
  Container& operator=(const Container&) = delete;

  const std::vector<ConstantInfo>& constants() const { return constants_; }

  // Binds constant i to tensors[i]. REQUIRES: one tensor a constant, alive as long as this container.
  Status bind(std::span<Tensor* const> tensors);
  // What the container itself says it is bound to, by fully qualified name.
  Result<std::unordered_map<std::string, const Tensor*>> bound();

  // Runs the method. Consumes the inputs; the outputs' memory belongs to this container's arena and is valid
  // until the outputs are destroyed, which must be before the next run. Errors: those of the functions that
  // the compiled code called, kInternal and kOutOfMemory among them.
  Result<std::vector<std::unique_ptr<Tensor>>> run(std::vector<std::unique_ptr<Tensor>> inputs,
                                                   size_t outputs);
  // Null where the method runs in this process's memory.
  DeviceArena* device_arena() { return device_arena_ ? &*device_arena_ : nullptr; }

 private:
  Container(CompiledLibrary library, Device& device);
  Status read_constants();
  Error failure(const char* what);

  struct Functions;
  CompiledLibrary library_;
  std::unique_ptr<Functions> functions_;
  ContainerHandle handle_ = nullptr;
  HostArena host_arena_;
  std::optional<DeviceArena> device_arena_;
  std::vector<ConstantInfo> constants_;
};

}  // namespace qwen
