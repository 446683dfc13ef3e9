// Manifest: what a program says of itself in manifest.json. Format version 1.
//
// The manifest is read first and vouches for everything else: it carries its own digest and the size and
// digests of every other file. Immutable after parsing, so safe to share between threads.
#pragma once

#include <cstdint>
#include <map>
#include <nlohmann/json.hpp>
#include <string>
#include <string_view>
#include <vector>

#include "result.h"
#include "sampling.h"

namespace qwen {

inline constexpr int64_t kProgramFormatVersion = 1;
inline constexpr const char* kManifestFile = "manifest.json";
// How a cuda program's int4 weights lie in memory (kernels/cuda/types.h), and its version.
inline constexpr const char* kInt4Layout = "tiles-16x64-1";
// The most rows that kernels take in a decode step.
inline constexpr int64_t kMaxBatch = 8;

struct FileDigest {
  uint64_t size = 0;
  uint64_t block_size = 0;          // bytes a block; the last may be shorter
  std::vector<std::string> sha256;  // one lower-case hexadecimal digest a block
};

struct Manifest {
  std::string name;                    // the checkpoint folder's name
  nlohmann::json model;                // the model's configuration, for inspection
  int64_t vocab_size = 0;              // V: rows of the head
  std::string device;                  // "cpu" or "cuda"
  std::string isa;                     // cpu: "avx512", "avx2" or "default", what the compiled code needs
  std::string dtype;                   // of activations: "float32" or "bfloat16"
  nlohmann::json quantization;         // {"scheme": "none"} or {"scheme": "int4", "group_size": 32, ...}
  nlohmann::json versions;             // of qwen_runner, torch, executorch, triton, cuda
  int64_t max_seq_len = 0;             // positions a slot holds
  int64_t chunk = 0;                   // most tokens a prefill call takes
  int64_t slots = 0;                   // S
  int64_t batch = 1;                   // most slots that a decode step advances together
  std::vector<int64_t> eos_token_ids;  // any of them ends an answer
  SamplingOptions sampling;            // the checkpoint's generation defaults
  nlohmann::json chat;                 // see chat.h
  std::map<std::string, FileDigest> files;

  // Parses and checks the text of a manifest.json; `path` is for messages. Errors: kCorrupt (not JSON, a
  // missing or mistyped key, a digest that does not match), kUnsupported (another format version).
  static Result<Manifest> parse(std::string_view text, const std::string& path);
};

}  // namespace qwen
