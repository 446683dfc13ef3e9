// Container: one compiled method, through the C functions that AOTInductor gives its library.
//
// Not thread-safe: one run at a time. Constants are bound once, after creation, to memory that must outlive
// it.
#pragma once

#include <cstddef>
#include <memory>
#include <span>
#include <string>
#include <unordered_map>
#include <vector>

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
  // `device` is "cpu" or "cuda". Errors: kUnsupported, kInternal.
  static Result<std::unique_ptr<Container>> create(std::span<const std::byte> library,
                                                   const std::string& name, const std::string& device);
  ~Container();
  Container(const Container&) = delete;
  Container& operator=(const Container&) = delete;

  const std::vector<ConstantInfo>& constants() const { return constants_; }

  // Binds constant i to tensors[i]. REQUIRES: one tensor a constant, alive as long as this container.
  Status bind(std::span<Tensor* const> tensors);
  // What the container itself says it is bound to, by fully qualified name.
  Result<std::unordered_map<std::string, const Tensor*>> bound() const;

  // Runs the method. Consumes the inputs; the outputs' memory belongs to this container's arena and is valid
  // until the outputs are destroyed, which must be before the next run. Error: kInternal with the compiled
  // code's own message.
  Result<std::vector<std::unique_ptr<Tensor>>> run(std::vector<std::unique_ptr<Tensor>> inputs,
                                                   size_t outputs);

 private:
  explicit Container(CompiledLibrary library);
  Status read_constants();
  Error failure(const char* what) const;

  struct Functions;
  CompiledLibrary library_;
  std::unique_ptr<Functions> functions_;
  ContainerHandle handle_ = nullptr;
  Arena arena_;
  std::vector<ConstantInfo> constants_;
};

}  // namespace qwen
