#include "cuda_upload.h"

#include <cuda_runtime_api.h>

#include <algorithm>
#include <array>
#include <atomic>
#include <mutex>
#include <optional>
#include <thread>
#include <utility>
#include <vector>

#include "cuda_device.h"
#include "cuda_error.h"

namespace qwen {
namespace {

// Of a pinned buffer: stays in a core's cache between being read, hashed and fetched by the GPU, and is large
// enough for the full speed of the bus.
constexpr size_t kPiece = size_t{1} << 20;
// A core hashes about 2 GB/s, so this many keep up with the bus.
constexpr size_t kMostThreads = 16;

// The GPU's own handle, destroyed with it.
class Stream {
 public:
  Stream() = default;
  Stream(const Stream&) = delete;
  Stream& operator=(const Stream&) = delete;
  ~Stream() {
    if (stream_ != nullptr) cudaStreamDestroy(stream_);
  }
  Status create() {
    QWEN_CUDA_CHECK(cudaStreamCreateWithFlags(&stream_, cudaStreamNonBlocking));
    return ok_status();
  }
  cudaStream_t get() const { return stream_; }

 private:
  cudaStream_t stream_ = nullptr;
};

// One thread's way to the GPU: it fills one half while the other is copied.
class DoubleBuffer {
 public:
  DoubleBuffer() = default;
  DoubleBuffer(const DoubleBuffer&) = delete;
  DoubleBuffer& operator=(const DoubleBuffer&) = delete;
  ~DoubleBuffer() {
    for (cudaEvent_t event : copied_) {
      if (event != nullptr) cudaEventDestroy(event);
    }
  }

  Status create() {
    QWEN_ASSIGN_OR_RETURN(memory_, PinnedBuffer::make(2 * kPiece, "loading the weights"));
    for (cudaEvent_t& event : copied_) {
      QWEN_CUDA_CHECK(cudaEventCreateWithFlags(&event, cudaEventDisableTiming));
    }
    return ok_status();
  }

  // The half whose turn it is, once it is free.
  Result<std::span<std::byte>> next() {
    half_ = 1 - half_;
    if (std::exchange(busy_[half_], false)) QWEN_CUDA_CHECK(cudaEventSynchronize(copied_[half_]));
    return std::span(memory_.data() + half_ * kPiece, kPiece);
  }
  // Begins to copy the first `bytes` of it.
  Status send(void* to, size_t bytes, cudaStream_t stream) {
    QWEN_CUDA_CHECK(
        cudaMemcpyAsync(to, memory_.data() + half_ * kPiece, bytes, cudaMemcpyHostToDevice, stream));
    QWEN_CUDA_CHECK(cudaEventRecord(copied_[half_], stream));
    busy_[half_] = true;
    return ok_status();
  }

 private:
  PinnedBuffer memory_;
  std::array<cudaEvent_t, 2> copied_{};
  std::array<bool, 2> busy_{};
  size_t half_ = 0;
};

class Upload {
 public:
  Upload(const MappedFile& file, const FileDigest& digest, const std::string& path, std::byte* to,
         cudaStream_t stream)
      : file_(file), digest_(digest), path_(path), to_(to), stream_(stream) {}

  void work(DoubleBuffer& buffer) {
    for (size_t block = next_++; block < digest_.sha256.size() && !failed_; block = next_++) {
      if (Status copied = copy_block(block, buffer); !copied.ok()) {
        const std::lock_guard lock(mutex_);
        if (!failed_.exchange(true)) error_ = copied.error();
      }
    }
  }

  Status status() const { return error_ ? Status(*error_) : ok_status(); }

 private:
  Status copy_block(size_t block, DoubleBuffer& buffer) {
    const size_t end = std::min<size_t>((block + 1) * digest_.block_size, digest_.size);
    Sha256 sha256;
    for (size_t begin = block * digest_.block_size; begin < end && !failed_;) {
      QWEN_ASSIGN_OR_RETURN(const std::span<std::byte> half, buffer.next());
      const auto piece = half.first(std::min(half.size(), end - begin));
      QWEN_RETURN_IF_ERROR(file_.read(begin, piece));
      QWEN_RETURN_IF_ERROR(buffer.send(to_ + begin, piece.size(), stream_));
      sha256.update(piece);
      begin += piece.size();
    }
    if (!failed_ && sha256.hex() != digest_.sha256[block]) return digest_mismatch(path_);
    return ok_status();
  }

  const MappedFile& file_;
  const FileDigest& digest_;
  const std::string& path_;
  std::byte* to_;
  cudaStream_t stream_;
  std::atomic<size_t> next_ = 0;
  std::atomic<bool> failed_ = false;
  std::mutex mutex_;  // guards error_
  std::optional<Error> error_;
};

}  // namespace

Status upload_verified(const MappedFile& file, const FileDigest& digest, const std::string& path,
                       std::span<std::byte> to) {
  QWEN_RETURN_IF_ERROR(check_size(file.bytes().size(), digest, path));
  const CurrentDevice current;
  const size_t threads =
      std::clamp<size_t>(std::thread::hardware_concurrency(), 1,
                         std::min(kMostThreads, std::max<size_t>(digest.sha256.size(), 1)));
  std::vector<DoubleBuffer> buffers(threads);  // outlive the stream, which uses them
  for (DoubleBuffer& buffer : buffers) QWEN_RETURN_IF_ERROR(buffer.create());
  Stream stream;
  QWEN_RETURN_IF_ERROR(stream.create());
  Upload upload(file, digest, path, to.data(), stream.get());
  run_in_threads(threads, [&](size_t i) {
    const CurrentDevice current;
    upload.work(buffers[i]);
  });
  const cudaError_t finished = cudaStreamSynchronize(stream.get());
  QWEN_RETURN_IF_ERROR(upload.status());
  if (finished != cudaSuccess) return cuda_failure(finished, "cudaStreamSynchronize");
  return ok_status();
}

}  // namespace qwen
