#include "engine.h"

#include <chrono>
#include <mutex>
#include <utility>

#include "engine_impl.h"
#include "session.h"

namespace qwen {

Engine::Engine(std::unique_ptr<Impl> impl) : impl_(std::move(impl)) {}
Engine::~Engine() = default;

Result<std::unique_ptr<Engine>> Engine::load(const std::string& path, const EngineOptions& options) {
  const auto start = std::chrono::steady_clock::now();
  QWEN_ASSIGN_OR_RETURN(auto program,
                        Program::load(path, {.graph = options.cuda_graph != EngineOptions::CudaGraph::kOff,
                                             .expert_activations = options.expert_activations}));
  QWEN_ASSIGN_OR_RETURN(auto tokenizer,
                        Tokenizer::from_json(program->tokenizer_json(), path + "/tokenizer.json"));
  QWEN_ASSIGN_OR_RETURN(auto chat, ChatFormat::from_json(program->manifest().chat));
  auto impl =
      std::make_unique<Impl>(std::move(program), std::move(tokenizer), std::move(chat), options.on_warning);
  impl->load_stats.load_ms =
      std::chrono::duration<double, std::milli>(std::chrono::steady_clock::now() - start).count();
  impl->load_stats.weights_ms = impl->program->weights_ms();
  impl->load_stats.weight_bytes = impl->program->constants().weight_bytes();
  impl->load_stats.state_bytes = impl->program->constants().state_bytes();
  impl->warn(impl->program->take_warnings());
  return std::unique_ptr<Engine>(new Engine(std::move(impl)));
}

const Manifest& Engine::manifest() const { return impl_->program->manifest(); }
const Tokenizer& Engine::tokenizer() const { return impl_->tokenizer; }
const ChatFormat& Engine::chat() const { return impl_->chat; }
const LoadStats& Engine::load_stats() const { return impl_->load_stats; }
std::vector<BoundConstant> Engine::bound_constants() const { return impl_->program->bound_constants(); }

DeviceStats Engine::device_stats() const {
  const std::lock_guard lock(impl_->mutex);
  const Device& device = impl_->program->device();
  if (device.is_host()) return {};
  const DeviceMemoryUsage memory = device.memory();
  return {.name = device.name(),
          .allocated_bytes = memory.allocated_bytes,
          .used_bytes = memory.used_bytes,
          .total_bytes = memory.total_bytes,
          .graph_nodes = impl_->program->graph_nodes()};
}

Result<Session> Engine::open_session() {
  QWEN_ASSIGN_OR_RETURN(const int64_t slot, impl_->take_slot());
  Session session(this, slot);
  QWEN_RETURN_IF_ERROR(session.reset());
  return session;
}

Result<std::vector<Session>> Engine::open_sessions(int64_t most) {
  std::vector<Session> sessions;
  do {
    auto session = open_session();
    const bool is_full = !session.ok() && session.error().code == ErrorCode::kInvalidArgument;
    if (is_full && !sessions.empty()) break;
    if (!session.ok()) return session.error();
    sessions.push_back(std::move(session).value());
  } while (static_cast<int64_t>(sessions.size()) < most);
  return sessions;
}

}  // namespace qwen
