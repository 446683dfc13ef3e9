// CompiledLibrary: a shared library that AOTInductor made, loaded from memory.
//
// The bytes come from a program whose digest was checked, and never touch the file system: no predictable
// path, nothing left behind. Movable; unloaded when destroyed, so anything made from it must be gone by then.
#pragma once

#include <cstddef>
#include <span>
#include <string>

#include "result.h"

namespace qwen {

class CompiledLibrary {
 public:
  // `name` is for messages. Errors: kUnsupported (an operator that this runner lacks, another architecture),
  // kIo.
  static Result<CompiledLibrary> load(std::span<const std::byte> bytes, const std::string& name);
  CompiledLibrary(CompiledLibrary&& other) noexcept;
  CompiledLibrary& operator=(CompiledLibrary&& other) noexcept;
  ~CompiledLibrary();

  // Error: kUnsupported naming the function.
  template <typename Function>
  Status find(const char* symbol, Function*& out) const {
    void* address = nullptr;
    QWEN_RETURN_IF_ERROR(find_address(symbol, address));
    out = reinterpret_cast<Function*>(address);
    return ok_status();
  }

 private:
  CompiledLibrary(void* handle, int fd) : handle_(handle), fd_(fd) {}
  Status find_address(const char* symbol, void*& out) const;
  void* handle_ = nullptr;
  int fd_ = -1;  // kept open: the loader tells libraries apart by path, and the path is this number
};

}  // namespace qwen
