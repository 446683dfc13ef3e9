// What an engine and its sessions share. Internal to engine.cpp and session.cpp.
#pragma once

#include <algorithm>
#include <memory>
#include <mutex>
#include <span>
#include <string>
#include <utility>
#include <vector>

#include "engine.h"
#include "program.h"

namespace qwen {

struct Engine::Impl {
  Impl(std::unique_ptr<Program> loaded, Tokenizer text, ChatFormat format, WarningCallback callback)
      : program(std::move(loaded)),
        tokenizer(std::move(text)),
        chat(std::move(format)),
        on_warning(std::move(callback)),
        slot_taken(static_cast<size_t>(program->manifest().slots), false) {}

  // REQUIRES: the mutex is not held. Error: kInvalidArgument when all slots are in use.
  Result<int64_t> take_slot() {
    const std::lock_guard lock(mutex);
    const auto free = std::find(slot_taken.begin(), slot_taken.end(), false);
    if (free == slot_taken.end()) {
      return Error{ErrorCode::kInvalidArgument, "all " + std::to_string(slot_taken.size()) +
                                                    " slots of the program are in use; close a session, or "
                                                    "export with more --slots"};
    }
    *free = true;
    return free - slot_taken.begin();
  }
  void give_back(int64_t slot) {
    const std::lock_guard lock(mutex);
    slot_taken[static_cast<size_t>(slot)] = false;
  }

  // REQUIRES: the mutex is not held. Python's callback waits for the interpreter's lock, which a thread may
  // hold that waits for the mutex.
  void warn(const std::vector<std::string>& warnings) const {
    if (!on_warning) return;
    for (const std::string& warning : warnings) on_warning(warning);
  }

  // Steps of at most the program's batch, run together, and what there is to warn of.
  Result<std::vector<int64_t>> run(std::span<const Step> steps) {
    std::vector<std::string> warnings;
    auto sampled = [&] {
      const std::lock_guard lock(mutex);
      auto tokens = program->run(steps);
      warnings = program->take_warnings();
      return tokens;
    }();
    warn(warnings);
    return sampled;
  }

  std::mutex mutex;  // guards program and slot_taken: one step at a time
  std::unique_ptr<Program> program;
  const Tokenizer tokenizer;
  const ChatFormat chat;
  const WarningCallback on_warning;
  LoadStats load_stats;
  std::vector<bool> slot_taken;
};

}  // namespace qwen
