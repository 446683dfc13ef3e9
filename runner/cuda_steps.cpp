#include "cuda_steps.h"

#include <algorithm>
#include <new>
#include <utility>

#include "kernels/cuda/tuning.h"
#include "kernels/cuda/types.h"

namespace qwen {

static_assert(kMaxBatch == cuda::kMaxDecodeRows);

Result<std::unique_ptr<CudaSteps>> CudaSteps::make(CudaDevice& device, const Manifest& manifest,
                                                   const Methods& methods, const GpuOptions& options) {
  QWEN_RETURN_IF_ERROR(check_supported(options, cuda::gpu_architecture(), device.name()));
  std::unique_ptr<CudaSteps> steps(new CudaSteps(device, methods));
  CudaLane::Context& context = steps->context_;
  context.vocab_size = static_cast<size_t>(manifest.vocab_size);
  context.use_graph = options.graph;
  context.expert_activations = static_cast<cuda::ExpertActivations>(options.expert_activations);
  QWEN_ASSIGN_OR_RETURN(steps->prefill_,
                        CudaLane::for_prefill(context, methods.prefill, static_cast<size_t>(manifest.chunk)));
  QWEN_RETURN_IF_ERROR(steps->lane(1));
  return steps;
}

CudaSteps::~CudaSteps() {
  // What is enqueued still uses the memory. What fails here was or will be reported by who uses the GPU next.
  (void)context_.device.synchronize();
}

Result<CudaLane*> CudaSteps::lane(size_t rows) {
  std::unique_ptr<CudaLane>& lane = lanes_[rows];
  if (lane == nullptr) {
    CompiledMethod& method = rows == 1 ? methods_.decode : *methods_.decode_batch;
    QWEN_ASSIGN_OR_RETURN(lane, CudaLane::for_decode(context_, method, rows));
  }
  return lane.get();
}

int64_t CudaSteps::graph_nodes() const { return last_ == nullptr ? 0 : last_->graph_nodes(); }

Result<std::vector<int64_t>> CudaSteps::run(std::span<const Step> steps) {
  const CurrentDevice current;
  try {
    auto tokens = steps[0].tokens.size() == 1 ? decode(steps) : prefill(steps[0]);
    if (!tokens.ok()) return abandon(tokens.error());
    return tokens;
  } catch (const std::bad_alloc&) {
    return abandon({ErrorCode::kOutOfMemory, "no memory for a step; end other programs"});
  }
}

Error CudaSteps::abandon(Error error) {
  prefill_->forget();
  for (auto& [rows, lane] : lanes_) {
    if (lane != nullptr) lane->forget();
  }
  // Copies of inputs may be on their way without a step that says when they ended.
  CudaDevice& device = context_.device;
  (void)device.synchronize();
  // Kernels that did not all run may have left their counters as no kernel expects them.
  (void)device.zero(device.counters(), cuda::kCounters * sizeof(uint32_t));
  if (error.code == ErrorCode::kOutOfMemory) {
    for (CompiledMethod* method : {&methods_.prefill, &methods_.decode, methods_.decode_batch}) {
      if (method != nullptr) method->container->device_arena()->trim();
    }
  }
  return error;
}

Result<std::vector<int64_t>> CudaSteps::prefill(const Step& step) {
  QWEN_ASSIGN_OR_RETURN(
      const uint64_t number,
      prefill_->prefill({step.position, step.slot, step.sampling, step.generated_from}, step.tokens));
  QWEN_ASSIGN_OR_RETURN(const int64_t token, prefill_->wait(number, 0));
  QWEN_RETURN_IF_ERROR(collect());
  if (step.logits != nullptr) QWEN_RETURN_IF_ERROR(prefill_->copy_logits(0, *step.logits));
  return std::vector<int64_t>{token};
}

Result<std::vector<int64_t>> CudaSteps::decode(std::span<const Step> steps) {
  std::vector<Sampled> sampled(steps.size());
  std::vector<size_t> missing;  // that did not run ahead
  std::vector<CudaLane::Row> rows;
  for (size_t i = 0; i < steps.size(); ++i) {
    const Step& step = steps[i];
    const auto known = ahead_.extract(step.slot);
    if (!known.empty() && known.mapped().position == step.position) {
      sampled[i] = known.mapped();
    } else {
      missing.push_back(i);
      rows.push_back({step.position, step.slot, step.sampling, step.generated_from, step.tokens[0]});
    }
  }
  if (!missing.empty()) {
    QWEN_ASSIGN_OR_RETURN(const std::vector<Sampled> enqueued, enqueue(rows));
    for (size_t i = 0; i < missing.size(); ++i) sampled[missing[i]] = enqueued[i];
  }
  QWEN_RETURN_IF_ERROR(run_ahead(steps, sampled));
  std::vector<int64_t> tokens;
  for (Sampled& each : sampled) {
    QWEN_ASSIGN_OR_RETURN(const int64_t token, token_of(each));
    tokens.push_back(token);
  }
  QWEN_RETURN_IF_ERROR(collect());
  for (size_t i = 0; i < steps.size(); ++i) {
    if (steps[i].logits == nullptr) continue;
    QWEN_RETURN_IF_ERROR(sampled[i].lane->copy_logits(sampled[i].row, *steps[i].logits));
  }
  return tokens;
}

Status CudaSteps::run_ahead(std::span<const Step> steps, std::span<Sampled> sampled) {
  std::vector<size_t> going;
  std::vector<CudaLane::Row> rows;
  for (size_t i = 0; i < steps.size(); ++i) {
    const Step& step = steps[i];
    if (!step.ahead) continue;
    going.push_back(i);
    rows.push_back({step.position + 1, step.slot, step.sampling, step.generated_from});
  }
  if (going.empty()) return ok_status();
  QWEN_ASSIGN_OR_RETURN(const CudaLane* lane, this->lane(rows.size()));
  // The GPU has their tokens where it samples them, and them alone, in the lane's last step.
  bool follow = lane->follows(rows);
  for (size_t row = 0; row < going.size(); ++row) {
    const Sampled& before = sampled[going[row]];
    follow = follow && before.lane == lane && before.number == lane->last() && before.row == row;
  }
  for (size_t row = 0; row < going.size() && !follow; ++row) {
    QWEN_ASSIGN_OR_RETURN(rows[row].token, token_of(sampled[going[row]]));
  }
  QWEN_ASSIGN_OR_RETURN(const std::vector<Sampled> enqueued, enqueue(rows));
  for (size_t row = 0; row < going.size(); ++row) {
    ahead_.insert_or_assign(steps[going[row]].slot, enqueued[row]);
  }
  return ok_status();
}

Result<std::vector<CudaSteps::Sampled>> CudaSteps::enqueue(std::span<const CudaLane::Row> rows) {
  QWEN_ASSIGN_OR_RETURN(CudaLane * lane, this->lane(rows.size()));
  QWEN_ASSIGN_OR_RETURN(const uint64_t number, lane->decode(rows));
  last_ = lane;
  std::vector<Sampled> sampled;
  sampled.reserve(rows.size());
  for (size_t row = 0; row < rows.size(); ++row) sampled.push_back({lane, number, row, rows[row].position});
  return sampled;
}

Result<int64_t> CudaSteps::token_of(Sampled& sampled) {
  if (!sampled.token) {
    QWEN_ASSIGN_OR_RETURN(sampled.token, sampled.lane->wait(sampled.number, sampled.row));
  }
  return *sampled.token;
}

Status CudaSteps::collect() {
  for (auto& [slot, sampled] : ahead_) {
    if (sampled.number <= sampled.lane->finished()) QWEN_RETURN_IF_ERROR(token_of(sampled));
  }
  return ok_status();
}

}  // namespace qwen
