#include "manifest.h"

#include <algorithm>
#include <limits>
#include <span>

#include "file.h"

namespace qwen {
namespace {

using nlohmann::json;

constexpr std::string_view kDigestKey = "\"manifest_sha256\": \"";
constexpr size_t kDigestLength = 64;

Error corrupt(const std::string& path, const std::string& what) {
  return {ErrorCode::kCorrupt, path + " " + what + "; the program is damaged: export or copy it again"};
}

// The digest covers the file's own bytes with the digest's digits as zeros.
Status verify_own_digest(std::string_view text, const std::string& path) {
  const size_t key = text.rfind(kDigestKey);
  const size_t begin = key + kDigestKey.size();
  if (key == std::string_view::npos || text.size() < begin + kDigestLength) {
    return corrupt(path, "is cut short or has no digest");
  }
  std::string zeroed(text);
  zeroed.replace(begin, kDigestLength, kDigestLength, '0');
  if (sha256_hex(std::as_bytes(std::span(zeroed))) != text.substr(begin, kDigestLength)) {
    return corrupt(path, "does not match its own digest");
  }
  return ok_status();
}

// Reads `object[key]` into `out`; throws json::exception when it is missing or of another type, which parse()
// turns into one message.
template <typename T>
void read(const json& object, const char* key, T& out) {
  out = object.at(key).get<T>();
}

Manifest read_manifest(const json& root) {
  Manifest manifest;
  read(root, "name", manifest.name);
  manifest.model = root.at("model");
  read(root, "vocab_size", manifest.vocab_size);
  const json& target = root.at("target");
  read(target, "device", manifest.device);
  manifest.isa = target.value("isa", "default");
  read(root, "dtype", manifest.dtype);
  manifest.quantization = root.at("quantization");
  manifest.versions = root.at("versions");
  read(root, "max_seq_len", manifest.max_seq_len);
  read(root, "chunk", manifest.chunk);
  read(root, "slots", manifest.slots);
  manifest.batch = root.value("batch", manifest.batch);  // programs from before there were any have none
  read(root, "eos_token_ids", manifest.eos_token_ids);
  const json& sampling = root.at("sampling");
  read(sampling, "temperature", manifest.sampling.temperature);
  read(sampling, "top_k", manifest.sampling.top_k);
  read(sampling, "top_p", manifest.sampling.top_p);
  read(sampling, "min_p", manifest.sampling.min_p);
  read(sampling, "presence_penalty", manifest.sampling.presence_penalty);
  read(sampling, "repetition_penalty", manifest.sampling.repetition_penalty);
  manifest.chat = root.at("chat");
  for (const auto& [name, entry] : root.at("files").items()) {
    FileDigest digest;
    read(entry, "size", digest.size);
    read(entry, "block_size", digest.block_size);
    read(entry, "sha256", digest.sha256);
    manifest.files.emplace(name, std::move(digest));
  }
  return manifest;
}

bool consistent(const Manifest& manifest) {
  for (const auto& [name, digest] : manifest.files) {
    if (name.find('/') != std::string::npos || digest.block_size == 0) return false;
    if (digest.sha256.size() != (digest.size + digest.block_size - 1) / digest.block_size) return false;
  }
  return manifest.vocab_size > 0 && manifest.vocab_size <= std::numeric_limits<int32_t>::max() &&
         manifest.max_seq_len >= 1 && manifest.chunk >= 2 && manifest.slots >= 1 && manifest.batch >= 1 &&
         manifest.batch <= std::min(kMaxBatch, manifest.slots);
}

}  // namespace

Result<Manifest> Manifest::parse(std::string_view text, const std::string& path) {
  QWEN_RETURN_IF_ERROR(verify_own_digest(text, path));
  const json root = json::parse(text, /*cb=*/nullptr, /*allow_exceptions=*/false);
  if (!root.is_object()) return corrupt(path, "is not a JSON object");
  try {
    const auto version = root.at("format_version").get<int64_t>();
    if (version != kProgramFormatVersion) {
      return Error{ErrorCode::kUnsupported, path + " has program format " + std::to_string(version) +
                                                ", this runner reads " +
                                                std::to_string(kProgramFormatVersion) +
                                                "; export the checkpoint again with this version"};
    }
    Manifest manifest = read_manifest(root);
    if (!consistent(manifest)) return corrupt(path, "contradicts itself");
    return manifest;
  } catch (const json::exception& error) {
    return corrupt(path, std::string("lacks a value or has one of the wrong type (") + error.what() + ")");
  }
}

}  // namespace qwen
