#include "library.h"

#include <dlfcn.h>
#include <fcntl.h>
#include <sys/mman.h>
#include <unistd.h>

#include <cerrno>
#include <cstring>
#include <utility>

#include "shims/abi.h"

QWEN_SHIM int32_t qwen_aoti_torch_device_type_cpu();

namespace qwen {
namespace {

// Compiled libraries look for the shims among the process's global symbols. An executable linked with this
// library has them there; a Python extension is opened with local visibility, so this library is promoted
// once.
void publish_shims() {
  static const bool published = [] {
    Dl_info info = {};
    if (dladdr(reinterpret_cast<void*>(&qwen_aoti_torch_device_type_cpu), &info) == 0) return false;
    return dlopen(info.dli_fname, RTLD_NOW | RTLD_GLOBAL | RTLD_NOLOAD) != nullptr;
  }();
  (void)published;  // dlopen() of the compiled library reports what is missing
}

std::string path_of(int fd) { return "/proc/self/fd/" + std::to_string(fd); }

Status write_all(int fd, std::span<const std::byte> bytes) {
  while (!bytes.empty()) {
    const ssize_t written = ::write(fd, bytes.data(), bytes.size());
    if (written < 0 && errno == EINTR) continue;
    if (written <= 0)
      return Error{ErrorCode::kIo, std::string("cannot stage a library: ") + std::strerror(errno)};
    bytes = bytes.subspan(static_cast<size_t>(written));
  }
  return ok_status();
}

}  // namespace

Result<CompiledLibrary> CompiledLibrary::load(std::span<const std::byte> bytes, const std::string& name) {
  publish_shims();
  const int fd = ::memfd_create(name.c_str(), MFD_CLOEXEC | MFD_ALLOW_SEALING);
  if (fd < 0) return Error{ErrorCode::kIo, std::string("cannot stage a library: ") + std::strerror(errno)};
  CompiledLibrary library(nullptr, fd);
  QWEN_RETURN_IF_ERROR(write_all(fd, bytes));
  (void)::fcntl(fd, F_ADD_SEALS, F_SEAL_WRITE | F_SEAL_SHRINK | F_SEAL_GROW);  // a precaution, not a need
  library.handle_ = dlopen(path_of(fd).c_str(), RTLD_NOW | RTLD_LOCAL);
  if (library.handle_ == nullptr) {
    const char* reason = dlerror();
    return Error{ErrorCode::kUnsupported,
                 "the compiled " + name + " cannot be loaded here (" +
                     (reason != nullptr ? reason : "unknown reason") +
                     "); export the checkpoint again with this version on this machine"};
  }
  return library;
}

CompiledLibrary::CompiledLibrary(CompiledLibrary&& other) noexcept
    : handle_(std::exchange(other.handle_, nullptr)), fd_(std::exchange(other.fd_, -1)) {}

CompiledLibrary& CompiledLibrary::operator=(CompiledLibrary&& other) noexcept {
  std::swap(handle_, other.handle_);
  std::swap(fd_, other.fd_);
  return *this;
}

CompiledLibrary::~CompiledLibrary() {
  if (handle_ != nullptr) {
    dlclose(handle_);
    // A library with unique symbols stays loaded. Its path must then never name another one.
    if (void* resident = dlopen(path_of(fd_).c_str(), RTLD_LAZY | RTLD_NOLOAD); resident != nullptr) {
      dlclose(resident);
      return;
    }
  }
  if (fd_ >= 0) ::close(fd_);
}

Status CompiledLibrary::find_address(const char* symbol, void*& out) const {
  out = dlsym(handle_, symbol);
  if (out != nullptr) return ok_status();
  return Error{ErrorCode::kUnsupported, std::string("the compiled program lacks ") + symbol +
                                            "; export the checkpoint again with this version"};
}

}  // namespace qwen
