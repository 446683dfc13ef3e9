#include "cuda_lane.h"

#include <algorithm>
#include <atomic>
#include <cstring>
#include <thread>
#include <utility>

#include "cuda_error.h"
#include "kernels/decode_loop/cuda.h"
#include "shims/cuda_scope.h"
#include "shims/tensor.h"

namespace qwen {
namespace {

// Of a method's inputs: as many as can be on their way before the host waits.
constexpr size_t kBlocks = 4;
static_assert(kBlocks < cuda::kRingSteps);

// What vector loads are aligned to.
size_t aligned(size_t bytes) { return (bytes + 15) / 16 * 16; }

void relax() {
#if defined(__x86_64__)
  __builtin_ia32_pause();
#else
  std::this_thread::yield();
#endif
}

}  // namespace

CudaLane::CudaLane(Context& context, CompiledMethod& method, size_t rows, size_t tokens, bool is_decode)
    : context_(context),
      method_(method),
      rows_(rows),
      is_decode_(is_decode),
      column_bytes_(aligned(rows * sizeof(int64_t))),
      tokens_begin_(kColumns * column_bytes_),
      block_bytes_(aligned(tokens_begin_ + rows * tokens * sizeof(int64_t))),
      last_step_(kBlocks, 0) {
  on_device_.reserve(rows);  // once a step is enqueued nothing may keep it from being counted
}

Result<std::unique_ptr<CudaLane>> CudaLane::for_prefill(Context& context, CompiledMethod& method,
                                                        size_t chunk) {
  return make(context, method, /*rows=*/1, chunk, /*is_decode=*/false);
}

Result<std::unique_ptr<CudaLane>> CudaLane::for_decode(Context& context, CompiledMethod& method,
                                                       size_t rows) {
  return make(context, method, rows, /*tokens=*/1, /*is_decode=*/true);
}

Result<std::unique_ptr<CudaLane>> CudaLane::make(Context& context, CompiledMethod& method, size_t rows,
                                                 size_t tokens, bool is_decode) {
  std::unique_ptr<CudaLane> lane(new CudaLane(context, method, rows, tokens, is_decode));
  const size_t bytes = lane->block_bytes_;
  QWEN_ASSIGN_OR_RETURN(
      lane->inputs_, DeviceBuffer::zeroed(context.device, bytes + sizeof(uint32_t), "the inputs of a step"));
  QWEN_ASSIGN_OR_RETURN(lane->blocks_, PinnedBuffer::make(kBlocks * bytes, "the inputs of a step"));
  QWEN_ASSIGN_OR_RETURN(
      lane->ring_, PinnedBuffer::make(cuda::kRingSteps * rows * sizeof(uint64_t), "the tokens on their way"));
  QWEN_ASSIGN_OR_RETURN(lane->ring_on_device_, lane->ring_.device_data());
  return lane;
}

// In the order of the methods' inputs, after the tokens.
void CudaLane::fill(std::byte* block, size_t row, const Row& values) const {
  const auto integer = [&](size_t column) -> int64_t& {
    return reinterpret_cast<int64_t*>(block + column * column_bytes_)[row];
  };
  const auto number = [&](size_t column) -> float& {
    return reinterpret_cast<float*>(block + column * column_bytes_)[row];
  };
  const SamplingOptions& sampling = values.sampling;
  integer(0) = values.position;
  integer(1) = values.slot;
  number(2) = static_cast<float>(sampling.temperature);
  integer(3) = sampling.top_k;
  number(4) = static_cast<float>(sampling.top_p);
  number(5) = static_cast<float>(sampling.min_p);
  number(6) = static_cast<float>(sampling.presence_penalty);
  number(7) = static_cast<float>(sampling.repetition_penalty);
  integer(8) = sampling.seed;
  integer(9) = values.generated_from;
}

Result<uint64_t> CudaLane::prefill(const Row& row, std::span<const int64_t> tokens) {
  QWEN_ASSIGN_OR_RETURN(std::byte * block, next_block());
  fill(block, 0, row);
  std::memcpy(block + tokens_begin_, tokens.data(), tokens.size_bytes());
  QWEN_RETURN_IF_ERROR(send_block(tokens_begin_ + tokens.size_bytes()));
  QWEN_RETURN_IF_ERROR(launch(tokens.size()));
  logits_ = launched_logits_;
  return ++enqueued_;
}

Result<uint64_t> CudaLane::decode(std::span<const Row> rows) {
  if (!is_on_device(rows)) {
    QWEN_ASSIGN_OR_RETURN(std::byte * block, next_block());
    for (size_t i = 0; i < rows.size(); ++i) {
      fill(block, i, rows[i]);
      std::memcpy(block + tokens_begin_ + i * sizeof(int64_t), &*rows[i].token, sizeof(int64_t));
    }
    QWEN_RETURN_IF_ERROR(send_block(block_bytes_));
  }
  QWEN_RETURN_IF_ERROR(launch_decode());
  on_device_.assign(rows.begin(), rows.end());
  for (Row& row : on_device_) {
    row.token.reset();
    row.position += 1;
  }
  return ++enqueued_;
}

bool CudaLane::follows(std::span<const Row> rows) const {
  return std::ranges::none_of(rows, [](const Row& row) { return row.token.has_value(); }) &&
         is_on_device(rows);
}

bool CudaLane::is_on_device(std::span<const Row> rows) const {
  return std::ranges::equal(rows, on_device_, [](const Row& row, const Row& there) {
    return there.position == row.position && there.slot == row.slot && there.sampling == row.sampling &&
           there.generated_from == row.generated_from && (!row.token || there.token == row.token);
  });
}

Status CudaLane::launch_decode() {
  const DeviceArena& arena = *method_.container->device_arena();
  const uint64_t changes = arena.changes();
  if (context_.use_graph && warm_ == changes && !graph_) {
    if (const Status captured = capture(); !captured.ok()) {
      context_.use_graph = false;
      context_.warnings.push_back("decoding goes on without a CUDA graph, which is slower: " +
                                  captured.error().message);
    }
  }
  if (graph_) {
    logits_ = graph_logits_;
    return graph_.launch(context_.device.stream());
  }
  QWEN_RETURN_IF_ERROR(launch(1));
  logits_ = launched_logits_;
  warm_.reset();
  if (arena.changes() == changes) warm_ = changes;
  return ok_status();
}

Status CudaLane::capture() {
  QWEN_ASSIGN_OR_RETURN(graph_, CudaGraph::capture(context_.device.stream(), [this] { return launch(1); }));
  method_.container->device_arena()->keep_addresses();
  graph_logits_ = launched_logits_;
  return ok_status();
}

// Enqueues the method and the end of its step. What it returns is in the arena, where it stays until the next
// launch of the method.
Status CudaLane::launch(size_t tokens) {
  std::byte* const block = inputs_.data();
  std::vector<std::unique_ptr<Tensor>> arguments;
  const int64_t shape[] = {static_cast<int64_t>(rows_), static_cast<int64_t>(tokens)};
  arguments.push_back(Tensor::borrow(block + tokens_begin_, shape, ScalarType::kInt64));
  constexpr bool kIsInteger[kColumns] = {true, true, false, true, false, false, false, false, true, true};
  for (size_t i = 0; i < kColumns; ++i) {
    arguments.push_back(Tensor::borrow(block + i * column_bytes_, {shape, 1},
                                       kIsInteger[i] ? ScalarType::kInt64 : ScalarType::kFloat32));
  }
  if (method_.inputs != arguments.size() || method_.outputs != 2) {
    return Error{ErrorCode::kCorrupt,
                 "the program's methods have other inputs than this runner gives; export the checkpoint "
                 "again with this version"};
  }
  CudaDevice& device = context_.device;
  const CudaScope scope(device.stream(), device.counters(), context_.expert_activations);
  QWEN_ASSIGN_OR_RETURN(const auto outputs, method_.container->run(std::move(arguments), method_.outputs));
  const Tensor& next_token = *outputs[0];
  const Tensor& logits = *outputs[1];
  if (next_token.dtype != ScalarType::kInt64 || static_cast<size_t>(next_token.numel()) != rows_ ||
      !next_token.is_contiguous() || logits.dtype != ScalarType::kFloat32 || !logits.is_contiguous() ||
      static_cast<size_t>(logits.numel()) != rows_ * context_.vocab_size) {
    return Error{ErrorCode::kCorrupt, "the program returns " + next_token.shape() + " and " + logits.shape() +
                                          "; export the checkpoint again with this version"};
  }
  const cuda::PublishArguments publish = {
      .next_token = next_token.as<int64_t>(),
      .tokens = is_decode_ ? reinterpret_cast<int64_t*>(block + tokens_begin_) : nullptr,
      .position = is_decode_ ? reinterpret_cast<int64_t*>(block) : nullptr,
      .steps = reinterpret_cast<uint32_t*>(block + block_bytes_),
      .ring = static_cast<uint64_t*>(ring_on_device_),
      .rows = static_cast<int>(rows_)};
  QWEN_CUDA_CHECK(cuda::publish(publish, device.stream()));
  launched_logits_ = logits.as<float>();
  return ok_status();
}

Result<std::byte*> CudaLane::next_block() {
  turn_ = (turn_ + 1) % kBlocks;
  const uint64_t number = last_step_[turn_];
  const bool may_run = number > 0 && number <= enqueued_ && number + cuda::kRingSteps > enqueued_;
  if (may_run) QWEN_RETURN_IF_ERROR(wait(number, 0));
  return blocks_.data() + turn_ * block_bytes_;
}

Status CudaLane::send_block(size_t bytes) {
  last_step_[turn_] = enqueued_ + 1;
  QWEN_CUDA_CHECK(cudaMemcpyAsync(inputs_.data(), blocks_.data() + turn_ * block_bytes_, bytes,
                                  cudaMemcpyHostToDevice, context_.device.stream()));
  return ok_status();
}

Result<int64_t> CudaLane::wait(uint64_t number, size_t row) {
  auto* entry = reinterpret_cast<uint64_t*>(ring_.data()) + (number - 1) % cuda::kRingSteps * rows_ + row;
  const std::atomic_ref<uint64_t> published(*entry);
  const auto token = [&]() -> std::optional<int64_t> {
    const uint64_t value = published.load(std::memory_order_acquire);
    if (static_cast<uint32_t>(value >> 32) != static_cast<uint32_t>(number)) return std::nullopt;
    finished_ = std::max(finished_, number);
    const auto known = static_cast<int64_t>(value & 0xffffffffU);
    if (number == enqueued_ && row < on_device_.size()) on_device_[row].token = known;
    return known;
  };
  // A decode step takes about a millisecond; a query takes a microsecond and is how a failure is seen.
  constexpr int kLooksBetweenQueries = 1000;
  for (;;) {
    for (int i = 0; i < kLooksBetweenQueries; ++i) {
      if (const auto known = token()) return *known;
      relax();
    }
    const cudaError_t code = cudaStreamQuery(context_.device.stream());
    if (code == cudaErrorNotReady) continue;
    if (code != cudaSuccess) return cuda_failure(code, "cudaStreamQuery");
    if (const auto known = token()) return *known;
    return Error{ErrorCode::kInternal, "the GPU ended a step without its token; start the process again"};
  }
}

Status CudaLane::copy_logits(size_t row, std::vector<float>& logits) {
  logits.resize(context_.vocab_size);
  return context_.device.copy_to_host(logits.data(), logits_ + row * context_.vocab_size,
                                      context_.vocab_size * sizeof(float));
}

void CudaLane::forget() {
  on_device_.clear();
  warm_.reset();
}

}  // namespace qwen
