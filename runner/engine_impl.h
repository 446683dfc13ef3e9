// What an engine and its sessions share. Internal to engine.cpp and session.cpp.
#pragma once

#include <memory>
#include <mutex>
#include <utility>
#include <vector>

#include "engine.h"
#include "program.h"

namespace qwen {

struct Engine::Impl {
  Impl(std::unique_ptr<Program> loaded, Tokenizer text, ChatFormat format)
      : program(std::move(loaded)),
        tokenizer(std::move(text)),
        chat(std::move(format)),
        slot_taken(static_cast<size_t>(program->manifest().slots), false) {}

  std::mutex mutex;  // guards program and slot_taken: one step at a time
  std::unique_ptr<Program> program;
  const Tokenizer tokenizer;
  const ChatFormat chat;
  LoadStats load_stats;
  std::vector<bool> slot_taken;
};

}  // namespace qwen
