#include "utf8.h"

namespace qwen {
namespace {

constexpr std::string_view kReplacement = "\xEF\xBF\xBD";

}  // namespace

Utf8Char utf8_at(std::string_view text, size_t position) {
  auto byte = [&](size_t i) { return static_cast<uint8_t>(text[position + i]); };
  auto low6 = [&](size_t i) { return static_cast<char32_t>(byte(i) & 0x3F); };
  if (byte(0) < 0x80) return {byte(0), 1};
  if (byte(0) < 0xE0) return {(byte(0) & 0x1Fu) << 6 | low6(1), 2};
  if (byte(0) < 0xF0) return {(byte(0) & 0x0Fu) << 12 | low6(1) << 6 | low6(2), 3};
  return {(byte(0) & 0x07u) << 18 | low6(1) << 12 | low6(2) << 6 | low6(3), 4};
}

Utf8Char utf8_before(std::string_view text, size_t end) {
  size_t start = end - 1;
  while ((static_cast<uint8_t>(text[start]) & 0xC0) == 0x80) --start;
  return utf8_at(text, start);
}

void append_utf8(char32_t code_point, std::string& out) {
  auto tail = [&](int shift) { out.push_back(static_cast<char>(0x80 | ((code_point >> shift) & 0x3F))); };
  if (code_point < 0x80) {
    out.push_back(static_cast<char>(code_point));
  } else if (code_point < 0x800) {
    out.push_back(static_cast<char>(0xC0 | code_point >> 6));
    tail(0);
  } else if (code_point < 0x10000) {
    out.push_back(static_cast<char>(0xE0 | code_point >> 12));
    tail(6);
    tail(0);
  } else {
    out.push_back(static_cast<char>(0xF0 | code_point >> 18));
    tail(12);
    tail(6);
    tail(0);
  }
}

std::string replace_invalid_utf8(std::string_view bytes) {
  std::string out;
  out.reserve(bytes.size());
  Utf8Repair repair;
  repair.append(bytes, out);
  repair.finish(out);
  return out;
}

void Utf8Repair::append(std::string_view bytes, std::string& out) {
  for (size_t i = 0; i < bytes.size();) {
    if (length_ == 0 && static_cast<uint8_t>(bytes[i]) < 0x80) {
      size_t end = i + 1;
      while (end < bytes.size() && static_cast<uint8_t>(bytes[end]) < 0x80) ++end;
      out.append(bytes.substr(i, end - i));
      i = end;
    } else {
      push(static_cast<uint8_t>(bytes[i++]), out);
    }
  }
}

void Utf8Repair::push(uint8_t byte, std::string& out) {
  if (length_ != 0 && (byte < low_ || byte > high_)) finish(out);
  if (length_ == 0) {
    if (byte < 0x80) {
      out.push_back(static_cast<char>(byte));
      return;
    }
    if (byte < 0xC2 || byte > 0xF4) {
      out.append(kReplacement);
      return;
    }
    length_ = byte < 0xE0 ? 2 : byte < 0xF0 ? 3 : 4;
    // The second byte must rule out overlong forms, surrogates, and what lies beyond U+10FFFF.
    low_ = byte == 0xE0 ? 0xA0 : byte == 0xF0 ? 0x90 : 0x80;
    high_ = byte == 0xED ? 0x9F : byte == 0xF4 ? 0x8F : 0xBF;
  } else {
    low_ = 0x80;
    high_ = 0xBF;
  }
  pending_[seen_++] = static_cast<char>(byte);
  if (seen_ == length_) {
    out.append(pending_, seen_);
    seen_ = length_ = 0;
  }
}

void Utf8Repair::finish(std::string& out) {
  if (length_ != 0) out.append(kReplacement);
  seen_ = length_ = 0;
}

}  // namespace qwen
