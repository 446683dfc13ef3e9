#include "added_tokens.h"

#include <algorithm>
#include <utility>

#include "unicode_categories.h"
#include "utf8.h"

namespace qwen {
namespace {

bool is_space(char32_t c) { return char_properties(c).char_class() == CharClass::kSpace; }
bool is_word(char32_t c) { return char_properties(c).is_word(); }

bool touches_word(std::string_view text, size_t start, size_t end) {
  return (start > 0 && is_word(utf8_before(text, start).code_point)) ||
         (end < text.size() && is_word(utf8_at(text, end).code_point));
}

}  // namespace

AddedTokenMatcher::AddedTokenMatcher(std::vector<AddedToken> tokens) : tokens_(std::move(tokens)) {
  for (size_t i = 0; i < tokens_.size(); ++i) {
    const std::string& content = tokens_[i].content;
    if (content.empty() || !by_content_.emplace(content, i).second) continue;
    lengths_[static_cast<uint8_t>(content[0])].push_back(content.size());
  }
  for (auto& lengths : lengths_) {
    std::sort(lengths.rbegin(), lengths.rend());
    lengths.erase(std::unique(lengths.begin(), lengths.end()), lengths.end());
  }
}

const AddedToken* AddedTokenMatcher::match(std::string_view text, size_t position) const {
  for (const size_t length : lengths_[static_cast<uint8_t>(text[position])]) {
    if (length > text.size() - position) continue;
    const auto found = by_content_.find(std::string(text.substr(position, length)));
    if (found != by_content_.end()) return &tokens_[found->second];
  }
  return nullptr;
}

void AddedTokenMatcher::split(std::string_view text, const std::function<void(std::string_view)>& on_text,
                              const std::function<void(int64_t)>& on_token) const {
  size_t done = 0;  // everything before is handed out
  for (size_t i = 0; i < text.size();) {
    const AddedToken* token = match(text, i);
    if (token == nullptr) {
      ++i;
      continue;
    }
    size_t start = i;
    size_t end = i + token->content.size();
    i = end;
    if (token->single_word && touches_word(text, start, end))
      continue;  // and none that starts within it is tried
    if (token->lstrip) {
      while (start > done) {
        const Utf8Char before = utf8_before(text, start);
        if (!is_space(before.code_point)) break;
        start -= before.length;
      }
    }
    if (token->rstrip) {
      while (end < text.size()) {
        const Utf8Char after = utf8_at(text, end);
        if (!is_space(after.code_point)) break;
        end += after.length;
      }
    }
    if (start > done) on_text(text.substr(done, start - done));
    on_token(token->id);
    done = i = end;
  }
  if (done < text.size()) on_text(text.substr(done));
}

}  // namespace qwen
