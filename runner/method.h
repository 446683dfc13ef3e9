// Method: one method of an ExecuTorch program with the memory it needs. Not thread-safe.
#pragma once

#include <executorch/extension/memory_allocator/malloc_memory_allocator.h>
#include <executorch/runtime/executor/memory_manager.h>
#include <executorch/runtime/executor/method.h>
#include <executorch/runtime/executor/program.h>

#include <cstdint>
#include <memory>
#include <optional>
#include <span>
#include <string>
#include <vector>

#include "delegate.h"
#include "result.h"

namespace qwen {

class Method {
 public:
  // `program`, `weights` and `context` must outlive the method. `weights` may be null for a method without
  // any.
  static Result<std::unique_ptr<Method>> load(const executorch::runtime::Program& program, const char* name,
                                              const executorch::runtime::NamedDataMap* weights,
                                              DelegateContext* context);

  // Runs the method; the outputs live in its own memory until the next run.
  Status run(const std::vector<executorch::runtime::EValue>& inputs);
  executorch::runtime::EValue output(size_t index) const;
  size_t output_count() const { return method_->outputs_size(); }

 private:
  Method(std::string name, DelegateContext* context) : name_(std::move(name)), context_(context) {}
  Error failure(const char* what, executorch::runtime::Error code);

  std::string name_;
  DelegateContext* context_;
  executorch::extension::MallocMemoryAllocator method_memory_;
  executorch::extension::MallocMemoryAllocator temporary_memory_;
  std::vector<std::unique_ptr<uint8_t[]>> planned_;
  std::vector<executorch::runtime::Span<uint8_t>> planned_spans_;
  std::optional<executorch::runtime::HierarchicalAllocator> planned_memory_;
  std::optional<executorch::runtime::MemoryManager> memory_;
  std::optional<executorch::runtime::Method> method_;
};

}  // namespace qwen
