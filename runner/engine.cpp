#include "engine.h"

#include <chrono>
#include <mutex>
#include <utility>

#include "engine_impl.h"
#include "session.h"

namespace qwen {

Engine::Engine(std::unique_ptr<Impl> impl) : impl_(std::move(impl)) {}
Engine::~Engine() = default;

Result<std::unique_ptr<Engine>> Engine::load(const std::string& path, const EngineOptions&) {
  const auto start = std::chrono::steady_clock::now();
  QWEN_ASSIGN_OR_RETURN(auto program, Program::load(path));
  QWEN_ASSIGN_OR_RETURN(auto tokenizer,
                        Tokenizer::from_json(program->tokenizer_json(), path + "/tokenizer.json"));
  QWEN_ASSIGN_OR_RETURN(auto chat, ChatFormat::from_json(program->manifest().chat));
  auto impl = std::make_unique<Impl>(std::move(program), std::move(tokenizer), std::move(chat));
  impl->load_stats.load_ms =
      std::chrono::duration<double, std::milli>(std::chrono::steady_clock::now() - start).count();
  impl->load_stats.weight_bytes = impl->program->constants().weight_bytes();
  impl->load_stats.state_bytes = impl->program->constants().state_bytes();
  return std::unique_ptr<Engine>(new Engine(std::move(impl)));
}

const Manifest& Engine::manifest() const { return impl_->program->manifest(); }
const Tokenizer& Engine::tokenizer() const { return impl_->tokenizer; }
const ChatFormat& Engine::chat() const { return impl_->chat; }
const LoadStats& Engine::load_stats() const { return impl_->load_stats; }
std::vector<BoundConstant> Engine::bound_constants() const { return impl_->program->bound_constants(); }

Result<Session> Engine::open_session() {
  const std::lock_guard lock(impl_->mutex);
  for (size_t slot = 0; slot < impl_->slot_taken.size(); ++slot) {
    if (impl_->slot_taken[slot]) continue;
    impl_->slot_taken[slot] = true;
    impl_->program->constants().zero_slot(static_cast<int64_t>(slot));
    return Session(this, static_cast<int64_t>(slot));
  }
  return Error{ErrorCode::kInvalidArgument,
               "all " + std::to_string(impl_->slot_taken.size()) +
                   " slots of the program are in use; close a session, or export with "
                   "more --slots"};
}

}  // namespace qwen
