// Unicode's canonical composition (NFC) as Hugging Face `tokenizers` does it.
//
// Its tables are of Unicode 9: characters assigned later are left where they are, so that ids agree.
// Thread-safe.
#pragma once

#include <string>
#include <string_view>

namespace qwen {

// `text` in NFC, in time linear in its length but for sorting runs of combining marks.
// REQUIRES: text is valid UTF-8.
std::string to_nfc(std::string_view text);

// False if to_nfc would return `text` itself; it may be true for such a text too. Much cheaper than to_nfc.
bool may_change_in_nfc(std::string_view text);

}  // namespace qwen
