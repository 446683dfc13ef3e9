#include "text_stream.h"

#include <algorithm>
#include <utility>

namespace qwen {
namespace {

std::vector<size_t> fallbacks(const std::string& text) {
  std::vector<size_t> fallback(text.size() + 1, 0);
  for (size_t length = 2; length <= text.size(); ++length) {
    size_t shorter = fallback[length - 1];
    while (shorter > 0 && text[shorter] != text[length - 1]) shorter = fallback[shorter];
    fallback[length] = text[shorter] == text[length - 1] ? shorter + 1 : 0;
  }
  return fallback;
}

}  // namespace

TextStream::TextStream(const Tokenizer& tokenizer, const std::vector<std::string>& stop_strings,
                       bool skip_special)
    : tokenizer_(tokenizer), skip_special_(skip_special) {
  for (const std::string& stop : stop_strings) {
    if (stop.empty()) continue;
    std::string text = replace_invalid_utf8(stop);
    std::vector<size_t> fallback = fallbacks(text);
    stops_.push_back({std::move(text), std::move(fallback)});
  }
}

std::string TextStream::push(int64_t token) {
  if (stopped_ || (skip_special_ && tokenizer_.is_special(token))) return "";
  const size_t from = held_.size();
  repair_.append(tokenizer_.token_bytes(token), held_);
  return scan(from);
}

std::string TextStream::finish() {
  if (stopped_) return "";
  const size_t from = held_.size();
  repair_.finish(held_);
  std::string text = scan(from);
  return text + std::exchange(held_, "");
}

std::string TextStream::scan(size_t from) {
  for (size_t i = from; i < held_.size() && !stopped_; ++i) {
    size_t stop_length = 0;
    for (Stop& stop : stops_) {
      while (stop.matched > 0 && stop.text[stop.matched] != held_[i])
        stop.matched = stop.fallback[stop.matched];
      if (stop.text[stop.matched] == held_[i]) ++stop.matched;
      if (stop.matched == stop.text.size()) stop_length = std::max(stop_length, stop.text.size());
    }
    if (stop_length > 0) {
      stopped_ = true;
      held_.resize(i + 1 - stop_length);
    }
  }
  size_t hold = 0;
  if (!stopped_) {
    for (const Stop& stop : stops_) hold = std::max(hold, stop.matched);
  }
  std::string text = held_.substr(0, held_.size() - hold);
  held_.erase(0, text.size());
  return text;
}

}  // namespace qwen
