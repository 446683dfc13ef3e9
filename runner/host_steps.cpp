#include <executorch/extension/tensor/tensor_ptr_maker.h>

#include <array>
#include <utility>
#include <vector>

#include "method.h"
#include "steps.h"

namespace qwen {
namespace {

namespace et = executorch::runtime;
using executorch::aten::ScalarType;

// The inputs of one step, laid out as ExecuTorch tensors over this object's own memory.
class StepInputs {
 public:
  explicit StepInputs(const Step& step)
      : tokens_(step.tokens.begin(), step.tokens.end()),
        integers_{step.position, step.slot, step.sampling.top_k, step.sampling.seed, step.generated_from},
        floats_{static_cast<float>(step.sampling.temperature), static_cast<float>(step.sampling.top_p),
                static_cast<float>(step.sampling.min_p), static_cast<float>(step.sampling.presence_penalty),
                static_cast<float>(step.sampling.repetition_penalty)} {
    add(tokens_.data(), {1, static_cast<int32_t>(tokens_.size())}, ScalarType::Long);
    add(&integers_[0], {1}, ScalarType::Long);  // position
    add(&integers_[1], {1}, ScalarType::Long);  // slot
    add(&floats_[0], {1}, ScalarType::Float);   // temperature
    add(&integers_[2], {1}, ScalarType::Long);  // top_k
    add(&floats_[1], {1}, ScalarType::Float);   // top_p
    add(&floats_[2], {1}, ScalarType::Float);   // min_p
    add(&floats_[3], {1}, ScalarType::Float);   // presence_penalty
    add(&floats_[4], {1}, ScalarType::Float);   // repetition_penalty
    add(&integers_[3], {1}, ScalarType::Long);  // seed
    add(&integers_[4], {1}, ScalarType::Long);  // generated_from
  }

  const std::vector<et::EValue>& values() const { return values_; }

 private:
  void add(void* data, std::vector<int32_t> sizes, ScalarType dtype) {
    tensors_.push_back(executorch::extension::from_blob(data, std::move(sizes), dtype));
    values_.emplace_back(tensors_.back());
  }

  std::vector<int64_t> tokens_;
  std::array<int64_t, 5> integers_;
  std::array<float, 5> floats_;
  std::vector<executorch::extension::TensorPtr> tensors_;
  std::vector<et::EValue> values_;
};

class HostSteps final : public Steps {
 public:
  HostSteps(Method& prefill, Method& decode) : prefill_(prefill), decode_(decode) {}

  Result<std::vector<int64_t>> run(std::span<const Step> steps) override {
    std::vector<int64_t> tokens;
    for (const Step& step : steps) {
      Method& method = step.tokens.size() == 1 ? decode_ : prefill_;
      const StepInputs inputs(step);
      QWEN_RETURN_IF_ERROR(method.run(inputs.values()));
      const et::EValue token = method.output(0);
      tokens.push_back(token.toTensor().const_data_ptr<int64_t>()[0]);
      if (step.logits == nullptr) continue;
      const et::EValue logits = method.output(1);
      const float* const data = logits.toTensor().const_data_ptr<float>();
      step.logits->assign(data, data + logits.toTensor().numel());
    }
    return tokens;
  }
  void discard(int64_t) override {}

 private:
  Method& prefill_;
  Method& decode_;
};

}  // namespace

std::unique_ptr<Steps> make_host_steps(Method& prefill, Method& decode) {
  return std::make_unique<HostSteps>(prefill, decode);
}

}  // namespace qwen
