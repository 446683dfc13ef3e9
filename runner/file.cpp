#include "file.h"

#include <fcntl.h>
#include <openssl/evp.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

#include <algorithm>
#include <atomic>
#include <cerrno>
#include <cstring>
#include <system_error>
#include <thread>
#include <utility>
#include <vector>

namespace qwen {
namespace {

class FileDescriptor {
 public:
  explicit FileDescriptor(int fd) : fd_(fd) {}
  ~FileDescriptor() {
    if (fd_ >= 0) ::close(fd_);
  }
  FileDescriptor(const FileDescriptor&) = delete;
  FileDescriptor& operator=(const FileDescriptor&) = delete;
  int get() const { return fd_; }
  int release() { return std::exchange(fd_, -1); }

 private:
  int fd_;
};

Error io_error(const std::string& path) {
  const int code = errno;
  if (code == ENOENT || code == ENOTDIR) {
    return {ErrorCode::kNotFound, "no such file: " + path + "; give the folder of an exported program"};
  }
  return {ErrorCode::kIo, "cannot read " + path + ": " + std::strerror(code)};
}

}  // namespace

Result<MappedFile> MappedFile::open(const std::string& path) {
  FileDescriptor file(::open(path.c_str(), O_RDONLY | O_CLOEXEC));
  struct stat info = {};
  if (file.get() < 0 || ::fstat(file.get(), &info) != 0) return io_error(path);
  if (!S_ISREG(info.st_mode)) return Error{ErrorCode::kIo, path + " is not a file; export the program again"};
  const auto size = static_cast<size_t>(info.st_size);
  if (size == 0) return MappedFile(nullptr, 0, file.release());
  void* data = ::mmap(nullptr, size, PROT_READ, MAP_PRIVATE, file.get(), 0);
  if (data == MAP_FAILED) return io_error(path);
  return MappedFile(static_cast<const std::byte*>(data), size, file.release());
}

MappedFile::MappedFile(MappedFile&& other) noexcept
    : data_(std::exchange(other.data_, nullptr)),
      size_(std::exchange(other.size_, 0)),
      fd_(std::exchange(other.fd_, -1)) {}

MappedFile& MappedFile::operator=(MappedFile&& other) noexcept {
  std::swap(data_, other.data_);
  std::swap(size_, other.size_);
  std::swap(fd_, other.fd_);
  return *this;
}

MappedFile::~MappedFile() {
  if (data_ != nullptr) ::munmap(const_cast<std::byte*>(data_), size_);
  if (fd_ >= 0) ::close(fd_);
}

Status MappedFile::read(size_t offset, std::span<std::byte> out) const {
  while (!out.empty()) {
    const ssize_t count = ::pread(fd_, out.data(), out.size(), static_cast<off_t>(offset));
    if (count < 0 && errno == EINTR) continue;
    if (count <= 0) {
      return Error{ErrorCode::kIo, std::string("cannot read the program's weights: ") +
                                       (count == 0 ? "the file was cut short" : std::strerror(errno))};
    }
    offset += static_cast<size_t>(count);
    out = out.subspan(static_cast<size_t>(count));
  }
  return ok_status();
}

Result<std::string> read_file(const std::string& path) {
  QWEN_ASSIGN_OR_RETURN(const MappedFile file, MappedFile::open(path));
  const auto bytes = file.bytes();
  return std::string(reinterpret_cast<const char*>(bytes.data()), bytes.size());
}

Sha256::Sha256() : context_(EVP_MD_CTX_new()) {
  failed_ = EVP_DigestInit_ex(context_, EVP_sha256(), nullptr) != 1;
}
Sha256::~Sha256() { EVP_MD_CTX_free(context_); }

void Sha256::update(std::span<const std::byte> bytes) {
  failed_ = failed_ || EVP_DigestUpdate(context_, bytes.data(), bytes.size()) != 1;
}

std::string Sha256::hex() {
  unsigned char digest[EVP_MAX_MD_SIZE];
  unsigned int length = 0;
  if (failed_ || EVP_DigestFinal_ex(context_, digest, &length) != 1) return {};
  failed_ = EVP_DigestInit_ex(context_, EVP_sha256(), nullptr) != 1;
  constexpr char kDigits[] = "0123456789abcdef";
  std::string hex;
  for (unsigned int i = 0; i < length; ++i) {
    hex += kDigits[digest[i] >> 4];
    hex += kDigits[digest[i] & 15];
  }
  return hex;
}

std::string sha256_hex(std::span<const std::byte> bytes) {
  Sha256 digest;
  digest.update(bytes);
  return digest.hex();
}

Status check_size(uint64_t size, const FileDigest& digest, const std::string& path) {
  if (size == digest.size) return ok_status();
  return Error{ErrorCode::kCorrupt, path + " has " + std::to_string(size) + " bytes, the manifest says " +
                                        std::to_string(digest.size) +
                                        "; the program is damaged: export or copy it again"};
}

Error digest_mismatch(const std::string& path) {
  return {ErrorCode::kCorrupt, path +
                                   " does not match its digest in the manifest; the program is "
                                   "damaged: export or copy it again"};
}

void run_in_threads(size_t threads, const std::function<void(size_t)>& work) {
  std::vector<std::jthread> helpers;
  try {
    for (size_t i = 1; i < threads; ++i) helpers.emplace_back(work, i);
  } catch (const std::system_error&) {  // NOLINT(bugprone-empty-catch): those that there are do the work
  }
  work(0);
}

Status verify_digest(std::span<const std::byte> bytes, const FileDigest& digest, const std::string& path) {
  return verify_beginning(bytes, bytes.size(), digest, path);
}

Status verify_beginning(std::span<const std::byte> bytes, uint64_t length, const FileDigest& digest,
                        const std::string& path) {
  QWEN_RETURN_IF_ERROR(check_size(bytes.size(), digest, path));
  length = std::min<uint64_t>(length, bytes.size());
  const size_t blocks = length / digest.block_size + (length % digest.block_size != 0 ? 1 : 0);
  std::atomic<size_t> next = 0;
  std::atomic<bool> intact = true;
  const auto work = [&](size_t) {
    for (size_t block = next++; block < blocks && intact; block = next++) {
      const size_t begin = block * digest.block_size;
      const size_t size = std::min<size_t>(digest.block_size, bytes.size() - begin);
      if (sha256_hex(bytes.subspan(begin, size)) != digest.sha256[block]) intact = false;
    }
  };
  run_in_threads(std::min<size_t>(blocks, std::max(1U, std::thread::hardware_concurrency())), work);
  if (!intact) return digest_mismatch(path);
  return ok_status();
}

}  // namespace qwen
