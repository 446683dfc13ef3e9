// Weights from a file into the GPU's memory, checked on their way.
#pragma once

#include <cstddef>
#include <span>
#include <string>

#include "file.h"
#include "manifest.h"
#include "result.h"

namespace qwen {

// Copies all of `file` to `to` on the GPU through pinned buffers, two a thread, and compares it with `digest`
// by the same read: several threads each take a block at a time. `path` is for messages. REQUIRES: to.size()
// is the file's. Errors: kCorrupt, kIo, kOutOfMemory, kInternal.
Status upload_verified(const MappedFile& file, const FileDigest& digest, const std::string& path,
                       std::span<std::byte> to);

}  // namespace qwen
