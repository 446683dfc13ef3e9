#include "method.h"

#include <utility>

namespace qwen {

namespace et = executorch::runtime;

Result<std::unique_ptr<Method>> Method::load(const et::Program& program, const char* name,
                                             const et::NamedDataMap* weights, DelegateContext* context) {
  std::unique_ptr<Method> method(new Method(name, context));
  const DelegateScope scope(context);
  const auto meta = program.method_meta(name);
  if (!meta.ok()) return method->failure("finding", meta.error());
  for (size_t i = 0; i < meta->num_memory_planned_buffers(); ++i) {
    const auto size = static_cast<size_t>(meta->memory_planned_buffer_size(i).get());
    method->planned_.push_back(std::make_unique<uint8_t[]>(size));
    method->planned_spans_.emplace_back(method->planned_.back().get(), size);
  }
  method->planned_memory_.emplace(
      et::Span<et::Span<uint8_t>>(method->planned_spans_.data(), method->planned_spans_.size()));
  method->memory_.emplace(&method->method_memory_, &*method->planned_memory_, &method->temporary_memory_);
  auto loaded = program.load_method(name, &*method->memory_, /*event_tracer=*/nullptr, weights);
  if (!loaded.ok()) return method->failure("loading", loaded.error());
  method->method_.emplace(std::move(loaded.get()));
  return method;
}

Status Method::run(const std::vector<et::EValue>& inputs) {
  const DelegateScope scope(context_);
  for (size_t i = 0; i < inputs.size(); ++i) {
    const et::Error code = method_->set_input(inputs[i], i);
    if (code != et::Error::Ok) return failure("setting the inputs of", code);
  }
  const et::Error code = method_->execute();
  temporary_memory_.reset();
  if (code != et::Error::Ok) return failure("running", code);
  return ok_status();
}

et::EValue Method::output(size_t index) const { return method_->get_output(index); }

Error Method::failure(const char* what, et::Error code) {
  if (context_->error) return *std::exchange(context_->error, std::nullopt);
  const std::string log = std::exchange(context_->log, {});
  if (code == et::Error::MemoryAllocationFailed) {
    return {ErrorCode::kOutOfMemory,
            std::string("no memory for ") + what + " the method " + name_ + "; close other programs"};
  }
  return {ErrorCode::kCorrupt, std::string(what) + " the method " + name_ + " failed (ExecuTorch error " +
                                   std::to_string(static_cast<int>(code)) + (log.empty() ? "" : ": " + log) +
                                   "); export the checkpoint again with this version"};
}

}  // namespace qwen
