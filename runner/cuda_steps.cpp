#include "cuda_steps.h"

#include <algorithm>
#include <atomic>
#include <cstring>
#include <new>
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

void relax() {
#if defined(__x86_64__)
  __builtin_ia32_pause();
#else
  std::this_thread::yield();
#endif
}

}  // namespace

Result<std::unique_ptr<CudaSteps>> CudaSteps::make(CudaDevice& device, const Manifest& manifest,
                                                   CompiledMethod& prefill, CompiledMethod& decode,
                                                   bool graph) {
  std::unique_ptr<CudaSteps> steps(new CudaSteps(device, prefill, decode, graph));
  steps->vocab_size_ = static_cast<size_t>(manifest.vocab_size);
  QWEN_ASSIGN_OR_RETURN(steps->prefill_inputs_, make_inputs(device, static_cast<size_t>(manifest.chunk)));
  QWEN_ASSIGN_OR_RETURN(steps->decode_inputs_, make_inputs(device, 1));
  QWEN_ASSIGN_OR_RETURN(steps->published_,
                        DeviceBuffer::zeroed(device, sizeof(uint32_t), "the count of steps"));
  QWEN_ASSIGN_OR_RETURN(steps->ring_,
                        PinnedBuffer::make(cuda::kRingSteps * sizeof(uint64_t), "the tokens on their way"));
  QWEN_ASSIGN_OR_RETURN(steps->ring_on_device_, steps->ring_.device_data());
  return steps;
}

CudaSteps::~CudaSteps() {
  // What is enqueued still uses the memory. What fails here was or will be reported by who uses the GPU next.
  (void)device_.synchronize();
}

Result<CudaSteps::Inputs> CudaSteps::make_inputs(CudaDevice& device, size_t tokens) {
  Inputs inputs;
  inputs.bytes = (kCells * sizeof(Cell) + tokens * sizeof(int64_t) + 15) / 16 * 16;
  inputs.last_step.assign(kBlocks, 0);
  QWEN_ASSIGN_OR_RETURN(inputs.device, DeviceBuffer::make(device, inputs.bytes, "the inputs of a step"));
  QWEN_ASSIGN_OR_RETURN(inputs.pinned, PinnedBuffer::make(kBlocks * inputs.bytes, "the inputs of a step"));
  return inputs;
}

// In the order of the methods' inputs, after the tokens.
void CudaSteps::fill_cells(std::span<Cell> cells, const Row& row) {
  const SamplingOptions& sampling = row.sampling;
  cells[0].integer = row.position;
  cells[1].integer = row.slot;
  cells[2].number = static_cast<float>(sampling.temperature);
  cells[3].integer = sampling.top_k;
  cells[4].number = static_cast<float>(sampling.top_p);
  cells[5].number = static_cast<float>(sampling.min_p);
  cells[6].number = static_cast<float>(sampling.presence_penalty);
  cells[7].number = static_cast<float>(sampling.repetition_penalty);
  cells[8].integer = sampling.seed;
  cells[9].integer = row.generated_from;
}

Result<int64_t> CudaSteps::run(const Step& step) {
  const CurrentDevice current;
  try {
    auto token = step.tokens.size() == 1 ? decode(step) : prefill(step);
    if (!token.ok()) return abandon(token.error());
    return token;
  } catch (const std::bad_alloc&) {
    return abandon({ErrorCode::kOutOfMemory, "no memory for a step; end other programs"});
  }
}

// What is on the GPU is not known after a failure: the next step writes all its inputs, and takes memory
// again if it was given back, which no capture may.
Error CudaSteps::abandon(Error error) {
  on_device_.reset();
  warm_ = false;
  // Copies of inputs may be on their way without a step that says when they ended.
  (void)device_.synchronize();
  // Kernels that did not all run may have left their counters as no kernel expects them.
  (void)device_.zero(device_.counters(), cuda::kCounters * sizeof(uint32_t));
  if (error.code == ErrorCode::kOutOfMemory) {
    prefill_.container->device_arena()->trim();
    decode_.container->device_arena()->trim();
  }
  return error;
}

Result<int64_t> CudaSteps::prefill(const Step& step) {
  QWEN_ASSIGN_OR_RETURN(const uint64_t number, enqueue_prefill(step));
  const float* logits = method_logits_;
  QWEN_ASSIGN_OR_RETURN(const int64_t token, wait(number));
  QWEN_RETURN_IF_ERROR(collect(number));
  if (step.logits) QWEN_RETURN_IF_ERROR(keep_logits(logits));
  return token;
}

Result<int64_t> CudaSteps::decode(const Step& step) {
  Row row{step.tokens[0], step.position, step.slot, step.sampling, step.generated_from};
  Ahead wanted{};
  if (const auto known = ahead_.find(step.slot); known != ahead_.end()) {
    wanted = known->second;
    ahead_.erase(known);
  }
  if (wanted.number == 0 || wanted.position != step.position) {
    QWEN_ASSIGN_OR_RETURN(wanted.number, enqueue_decode(row));
    wanted.token.reset();
  }
  if (step.ahead) {
    // Its token is on the GPU unless another session's step has come between.
    row.token.reset();
    row.position += 1;
    if (!is_on_device(row)) {
      if (!wanted.token) {
        QWEN_ASSIGN_OR_RETURN(wanted.token, wait(wanted.number));
      }
      row.token = wanted.token;
    }
    QWEN_ASSIGN_OR_RETURN(const uint64_t number, enqueue_decode(row));
    ahead_[step.slot] = {number, row.position, std::nullopt};
  }
  if (!wanted.token) {
    QWEN_ASSIGN_OR_RETURN(wanted.token, wait(wanted.number));
  }
  if (on_device_ && enqueued_ == wanted.number) on_device_->token = wanted.token;
  QWEN_RETURN_IF_ERROR(collect(wanted.number));
  if (step.logits) QWEN_RETURN_IF_ERROR(keep_logits(decode_logits_));
  return *wanted.token;
}

Result<uint64_t> CudaSteps::enqueue_prefill(const Step& step) {
  QWEN_ASSIGN_OR_RETURN(std::byte * block, next_block(prefill_inputs_));
  fill_cells({reinterpret_cast<Cell*>(block), kCells},
             {std::nullopt, step.position, step.slot, step.sampling, step.generated_from});
  constexpr size_t kTokensBegin = kCells * sizeof(Cell);
  std::memcpy(block + kTokensBegin, step.tokens.data(), step.tokens.size_bytes());
  QWEN_RETURN_IF_ERROR(send_block(prefill_inputs_, kTokensBegin + step.tokens.size_bytes()));
  QWEN_RETURN_IF_ERROR(launch(prefill_, prefill_inputs_, static_cast<int64_t>(step.tokens.size()),
                              /*feeds_next=*/false));
  return ++enqueued_;
}

bool CudaSteps::is_on_device(const Row& row) const {
  return on_device_ && on_device_->position == row.position && on_device_->slot == row.slot &&
         on_device_->sampling == row.sampling && on_device_->generated_from == row.generated_from &&
         (!row.token || on_device_->token == row.token);
}

Result<uint64_t> CudaSteps::enqueue_decode(const Row& row) {
  if (!is_on_device(row)) {
    QWEN_ASSIGN_OR_RETURN(std::byte * block, next_block(decode_inputs_));
    fill_cells({reinterpret_cast<Cell*>(block), kCells}, row);
    std::memcpy(block + kCells * sizeof(Cell), &*row.token, sizeof(int64_t));
    QWEN_RETURN_IF_ERROR(send_block(decode_inputs_, decode_inputs_.bytes));
  }
  QWEN_RETURN_IF_ERROR(launch_decode());
  on_device_ = row;
  on_device_->token.reset();
  on_device_->position += 1;
  return ++enqueued_;
}

Status CudaSteps::launch_decode() {
  if (use_graph_ && warm_ && !graph_) {
    if (const Status captured = capture_decode(); !captured.ok()) {
      use_graph_ = false;
      warnings_.push_back("decoding goes on without a CUDA graph, which is slower: " +
                          captured.error().message);
    }
  }
  if (graph_) return graph_.launch(device_.stream());
  const DeviceArena& arena = *decode_.container->device_arena();
  const uint64_t changes = arena.changes();
  QWEN_RETURN_IF_ERROR(launch(decode_, decode_inputs_, 1, /*feeds_next=*/true));
  decode_logits_ = method_logits_;
  warm_ = arena.changes() == changes;
  return ok_status();
}

Status CudaSteps::capture_decode() {
  QWEN_ASSIGN_OR_RETURN(graph_, CudaGraph::capture(device_.stream(), [this] {
                          return launch(decode_, decode_inputs_, 1,
                                        /*feeds_next=*/true);
                        }));
  decode_.container->device_arena()->keep_addresses();
  decode_logits_ = method_logits_;
  return ok_status();
}

// Enqueues a method and the end of its step. What it returns is in the arena, where it stays until the next
// launch.
Status CudaSteps::launch(CompiledMethod& method, const Inputs& inputs, int64_t tokens, bool feeds_next) {
  std::byte* const cells = inputs.device.data();
  std::byte* const token_data = cells + kCells * sizeof(Cell);
  std::vector<std::unique_ptr<Tensor>> arguments;
  const int64_t shape[] = {1, tokens};
  arguments.push_back(Tensor::borrow(token_data, shape, ScalarType::kInt64));
  constexpr bool kIsInteger[kCells] = {true, true, false, true, false, false, false, false, true, true};
  const int64_t row[] = {1};
  for (size_t i = 0; i < kCells; ++i) {
    arguments.push_back(Tensor::borrow(cells + i * sizeof(Cell), row,
                                       kIsInteger[i] ? ScalarType::kInt64 : ScalarType::kFloat32));
  }
  if (method.inputs != arguments.size() || method.outputs != 2) {
    return Error{ErrorCode::kCorrupt,
                 "the program's methods have other inputs than this runner gives; export the checkpoint "
                 "again with this version"};
  }
  const CudaScope scope(device_.stream(), device_.counters());
  QWEN_ASSIGN_OR_RETURN(const auto outputs, method.container->run(std::move(arguments), method.outputs));
  const Tensor& next_token = *outputs[0];
  const Tensor& logits = *outputs[1];
  if (next_token.dtype != ScalarType::kInt64 || next_token.numel() != 1 ||
      logits.dtype != ScalarType::kFloat32 || !logits.is_contiguous() ||
      static_cast<size_t>(logits.numel()) != vocab_size_) {
    return Error{ErrorCode::kCorrupt, "the program returns " + next_token.shape() + " and " + logits.shape() +
                                          "; export the checkpoint again with this version"};
  }
  const cuda::PublishArguments publish = {
      .next_token = next_token.as<int64_t>(),
      .tokens = feeds_next ? reinterpret_cast<int64_t*>(token_data) : nullptr,
      .position = feeds_next ? reinterpret_cast<int64_t*>(cells) : nullptr,
      .steps = reinterpret_cast<uint32_t*>(published_.data()),
      .ring = static_cast<uint64_t*>(ring_on_device_),
      .rows = 1};
  QWEN_CUDA_CHECK(cuda::publish(publish, device_.stream()));
  method_logits_ = logits.as<float>();
  return ok_status();
}

Result<std::byte*> CudaSteps::next_block(Inputs& inputs) {
  inputs.turn = (inputs.turn + 1) % kBlocks;
  const uint64_t number = inputs.last_step[inputs.turn];
  const bool may_run = number > 0 && number <= enqueued_ && number + cuda::kRingSteps > enqueued_;
  if (may_run) QWEN_RETURN_IF_ERROR(wait(number));
  return inputs.pinned.data() + inputs.turn * inputs.bytes;
}

Status CudaSteps::send_block(Inputs& inputs, size_t bytes) {
  inputs.last_step[inputs.turn] = enqueued_ + 1;
  QWEN_CUDA_CHECK(cudaMemcpyAsync(inputs.device.data(), inputs.pinned.data() + inputs.turn * inputs.bytes,
                                  bytes, cudaMemcpyHostToDevice, device_.stream()));
  return ok_status();
}

// REQUIRES: at most kRingSteps were enqueued since.
Result<int64_t> CudaSteps::wait(uint64_t number) {
  auto* entry = reinterpret_cast<uint64_t*>(ring_.data()) + (number - 1) % cuda::kRingSteps;
  const std::atomic_ref<uint64_t> published(*entry);
  const auto token = [&]() -> std::optional<int64_t> {
    const uint64_t value = published.load(std::memory_order_acquire);
    if (static_cast<uint32_t>(value >> 32) != static_cast<uint32_t>(number)) return std::nullopt;
    return static_cast<int64_t>(value & 0xffffffffU);
  };
  // A decode step takes about a millisecond; a query takes a microsecond and is how a failure is seen.
  constexpr int kLooksBetweenQueries = 1000;
  for (;;) {
    for (int i = 0; i < kLooksBetweenQueries; ++i) {
      if (const auto known = token()) return *known;
      relax();
    }
    const cudaError_t code = cudaStreamQuery(device_.stream());
    if (code == cudaErrorNotReady) continue;
    if (code != cudaSuccess) return cuda_failure(code, "cudaStreamQuery");
    if (const auto known = token()) return *known;
    return Error{ErrorCode::kInternal, "the GPU ended a step without its token; start the process again"};
  }
}

Status CudaSteps::collect(uint64_t number) {
  for (auto& [slot, other] : ahead_) {
    if (!other.token && other.number < number) {
      QWEN_ASSIGN_OR_RETURN(other.token, wait(other.number));
    }
  }
  return ok_status();
}

Status CudaSteps::keep_logits(const float* from) {
  logits_.resize(vocab_size_);
  return device_.copy_to_host(logits_.data(), from, vocab_size_ * sizeof(float));
}

}  // namespace qwen
