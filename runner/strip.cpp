#include "strip.h"

#include <algorithm>
#include <array>
#include <span>

namespace qwen {
namespace {

constexpr std::array<std::string_view, 1> kNewline = {"\n"};
constexpr std::array<std::string_view, 29> kWhitespace = {
    "\t",           "\n",           "\v",           "\f",           "\r",
    "\x1c",         "\x1d",         "\x1e",         "\x1f",         " ",
    "\xc2\x85",     "\xc2\xa0",     "\xe1\x9a\x80", "\xe2\x80\x80", "\xe2\x80\x81",
    "\xe2\x80\x82", "\xe2\x80\x83", "\xe2\x80\x84", "\xe2\x80\x85", "\xe2\x80\x86",
    "\xe2\x80\x87", "\xe2\x80\x88", "\xe2\x80\x89", "\xe2\x80\x8a", "\xe2\x80\xa8",
    "\xe2\x80\xa9", "\xe2\x80\xaf", "\xe2\x81\x9f", "\xe3\x80\x80"};

std::span<const std::string_view> characters(Strip strip) {
  switch (strip) {
    case Strip::kNone:
      break;
    case Strip::kNewlines:
      return kNewline;
    case Strip::kWhitespace:
      return kWhitespace;
  }
  return {};
}

}  // namespace

std::string_view strip_left(std::string_view text, Strip strip) {
  const auto cut = characters(strip);
  for (auto found = cut.begin(); found != cut.end();) {
    found = std::ranges::find_if(cut, [&](std::string_view one) { return text.starts_with(one); });
    if (found != cut.end()) text.remove_prefix(found->size());
  }
  return text;
}

std::string_view strip_both(std::string_view text, Strip strip) {
  text = strip_left(text, strip);
  const auto cut = characters(strip);
  for (auto found = cut.begin(); found != cut.end();) {
    found = std::ranges::find_if(cut, [&](std::string_view one) { return text.ends_with(one); });
    if (found != cut.end()) text.remove_suffix(found->size());
  }
  return text;
}

}  // namespace qwen
