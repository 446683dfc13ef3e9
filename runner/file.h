// Reading files: whole into memory, or mapped. Both report missing and unreadable files in one line.
#pragma once

#include <cstddef>
#include <cstdint>
#include <span>
#include <string>

#include "manifest.h"
#include "result.h"

namespace qwen {

// A file mapped read-only. Pages are shared with the page cache and are not copies. Movable, not copyable;
// spans of bytes() stay valid when it moves. Thread-safe to read.
class MappedFile {
 public:
  // Errors: kNotFound, kIo.
  static Result<MappedFile> open(const std::string& path);
  MappedFile(MappedFile&& other) noexcept;
  MappedFile& operator=(MappedFile&& other) noexcept;
  ~MappedFile();

  std::span<const std::byte> bytes() const { return {data_, size_}; }

 private:
  MappedFile(const std::byte* data, size_t size) : data_(data), size_(size) {}
  const std::byte* data_ = nullptr;
  size_t size_ = 0;
};

// Errors: kNotFound, kIo.
Result<std::string> read_file(const std::string& path);

// SHA-256 as 64 lower-case hexadecimal digits.
std::string sha256_hex(std::span<const std::byte> bytes);

// Checks size and block digests, several blocks at a time. Error: kCorrupt naming `path`.
Status verify_digest(std::span<const std::byte> bytes, const FileDigest& digest, const std::string& path);

}  // namespace qwen
