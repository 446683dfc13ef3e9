// Reading files: whole into memory, or mapped. Both report missing and unreadable files in one line.
#pragma once

#include <cstddef>
#include <cstdint>
#include <functional>
#include <span>
#include <string>

#include "manifest.h"
#include "result.h"

struct evp_md_ctx_st;  // OpenSSL's

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
  // Copies bytes from `offset` on without mapping them, which spares a page fault every few pages. Error:
  // kIo.
  Status read(size_t offset, std::span<std::byte> out) const;

 private:
  MappedFile(const std::byte* data, size_t size, int fd) : data_(data), size_(size), fd_(fd) {}
  const std::byte* data_ = nullptr;
  size_t size_ = 0;
  int fd_ = -1;
};

// Errors: kNotFound, kIo.
Result<std::string> read_file(const std::string& path);

// SHA-256, as 64 lower-case hexadecimal digits, of bytes that come in pieces.
class Sha256 {
 public:
  Sha256();
  Sha256(const Sha256&) = delete;
  Sha256& operator=(const Sha256&) = delete;
  ~Sha256();

  void update(std::span<const std::byte> bytes);
  // Ends it; the next update() begins another. Empty where the digest could not be made.
  std::string hex();

 private:
  evp_md_ctx_st* context_;
  bool failed_ = false;
};
std::string sha256_hex(std::span<const std::byte> bytes);

// Errors of verification: kCorrupt naming `path`.
Status check_size(uint64_t size, const FileDigest& digest, const std::string& path);
Error digest_mismatch(const std::string& path);

// Checks size and block digests, several blocks at a time. Error: kCorrupt naming `path`.
Status verify_digest(std::span<const std::byte> bytes, const FileDigest& digest, const std::string& path);
// Checks size and the digests of the blocks that the first `length` bytes lie in.
Status verify_beginning(std::span<const std::byte> bytes, uint64_t length, const FileDigest& digest,
                        const std::string& path);

// Runs `work` in this thread and in up to `threads` - 1 others, fewer where the system gives no more, and
// returns when all are done. `work` is given each thread's number, from 0 on; it must not throw.
void run_in_threads(size_t threads, const std::function<void(size_t)>& work);

}  // namespace qwen
