// The ExecuTorch delegate behind the methods of a program: compiled library in, bound container out.
//
// ExecuTorch keeps one instance for the process and gives it no way to tell programs apart, so a program
// opens a DelegateScope around every call into ExecuTorch that may reach the delegate. Different threads may
// be inside different scopes at the same time.
#pragma once

#include <map>
#include <memory>
#include <optional>
#include <string>
#include <vector>

#include "constants.h"
#include "container.h"
#include "device.h"
#include "result.h"

namespace qwen {

// The name in the .pte; the exporter's backend has the same one.
inline constexpr const char* kDelegateName = "QwenAotiBackend";

// One method, ready to run.
struct CompiledMethod {
  std::unique_ptr<Container> container;
  size_t inputs = 0;
  size_t outputs = 0;
};

// What a program and the delegate's methods share. One program's calls are made one at a time.
struct DelegateContext {
  explicit DelegateContext(Device& device) : device(device), constants(device) {}

  Device& device;
  ConstantStore constants;
  std::map<std::string, CompiledMethod*> methods;  // by name; ExecuTorch's methods own them
  std::vector<BoundConstant> bound;
  std::optional<Error> error;  // why the last call into ExecuTorch failed, in our own words
  std::string log;             // what ExecuTorch itself said last
};

class DelegateScope {
 public:
  explicit DelegateScope(DelegateContext* context);
  ~DelegateScope();
  DelegateScope(const DelegateScope&) = delete;
  DelegateScope& operator=(const DelegateScope&) = delete;

 private:
  DelegateContext* previous_;
};

// Registers the delegate with ExecuTorch, once a process; later calls do nothing. What ExecuTorch logs inside
// a scope goes to the scope's context instead of stderr, where only our own one line belongs. Thread-safe.
Status register_delegate();

}  // namespace qwen
