#include "program.h"

#include <executorch/extension/data_loader/buffer_data_loader.h>
#include <executorch/extension/flat_tensor/flat_tensor_data_map.h>
#include <executorch/extension/tensor/tensor_ptr_maker.h>
#include <executorch/runtime/platform/runtime.h>

#include <optional>
#include <utility>

#include "cpu_features.h"
#include "delegate.h"
#include "file.h"
#include "method.h"

namespace qwen {
namespace {

namespace et = executorch::runtime;
using executorch::aten::ScalarType;
using executorch::extension::BufferDataLoader;
using executorch::extension::FlatTensorDataMap;

constexpr const char* kModelFile = "model.pte";
constexpr const char* kWeightsFile = "model.ptd";
constexpr const char* kTokenizerFile = "tokenizer.json";

Result<MappedFile> open_verified(const std::string& folder, const char* name, const Manifest& manifest) {
  const std::string path = folder + "/" + name;
  const auto digest = manifest.files.find(name);
  if (digest == manifest.files.end()) {
    return Error{ErrorCode::kCorrupt,
                 folder + "/" + kManifestFile + " does not list " + name + "; export the checkpoint again"};
  }
  QWEN_ASSIGN_OR_RETURN(MappedFile file, MappedFile::open(path));
  QWEN_RETURN_IF_ERROR(verify_digest(file.bytes(), digest->second, path));
  return file;
}

Status check_target(const Manifest& manifest, const std::string& folder) {
  if (manifest.device != "cpu") {
    return Error{ErrorCode::kUnsupported,
                 folder + " is a program for " + manifest.device +
                     ", this runner is built for cpu only; export with --target cpu"};
  }
  if (!cpu_supports(manifest.isa)) {
    return Error{ErrorCode::kUnsupported,
                 folder + " was compiled for " + manifest.isa +
                     ", which this CPU lacks; export the checkpoint on this machine"};
  }
  return ok_status();
}

// The inputs of one step, laid out as ExecuTorch tensors over this object's own memory.
class StepInputs {
 public:
  StepInputs(std::span<const int64_t> tokens, int64_t position, int64_t slot, const SamplingOptions& sampling,
             int64_t generated_from)
      : tokens_(tokens.begin(), tokens.end()),
        integers_{position, slot, sampling.top_k, sampling.seed, generated_from},
        floats_{static_cast<float>(sampling.temperature), static_cast<float>(sampling.top_p),
                static_cast<float>(sampling.min_p), static_cast<float>(sampling.presence_penalty),
                static_cast<float>(sampling.repetition_penalty)} {
    add(tokens_.data(), {1, static_cast<int32_t>(tokens_.size())}, ScalarType::Long);
    add(&integers_[0], {1}, ScalarType::Long);  // position
    add(&integers_[1], {1}, ScalarType::Long);  // slot
    add(&floats_[0], {1}, ScalarType::Float);   // temperature
    add(&integers_[2], {1}, ScalarType::Long);  // top_k
    add(&floats_[1], {1}, ScalarType::Float);   // top_p
    add(&floats_[2], {1}, ScalarType::Float);   // min_p
    add(&floats_[3], {1}, ScalarType::Float);   // presence_penalty
    add(&floats_[4], {1}, ScalarType::Float);   // repetition_penalty
    add(&integers_[3], {1}, ScalarType::Long);  // seed
    add(&integers_[4], {1}, ScalarType::Long);  // generated_from
  }

  const std::vector<et::EValue>& values() const { return values_; }

 private:
  void add(void* data, std::vector<int32_t> sizes, ScalarType dtype) {
    tensors_.push_back(executorch::extension::from_blob(data, std::move(sizes), dtype));
    values_.emplace_back(tensors_.back());
  }

  std::vector<int64_t> tokens_;
  std::array<int64_t, 5> integers_;
  std::array<float, 5> floats_;
  std::vector<executorch::extension::TensorPtr> tensors_;
  std::vector<et::EValue> values_;
};

}  // namespace

// Members are destroyed in reverse: methods before what they are bound to.
struct Program::Impl {
  std::string folder;
  Manifest manifest;
  std::string tokenizer_json;
  MappedFile model_file;
  MappedFile weights_file;
  DelegateContext context;
  std::optional<BufferDataLoader> model_loader;
  std::optional<BufferDataLoader> weights_loader;
  std::optional<FlatTensorDataMap> weights;
  std::optional<et::Program> program;
  std::unique_ptr<Method> prefill;
  std::unique_ptr<Method> decode;
  std::span<const float> logits;

  Impl(std::string folder, Manifest manifest, MappedFile model, MappedFile weights)
      : folder(std::move(folder)),
        manifest(std::move(manifest)),
        model_file(std::move(model)),
        weights_file(std::move(weights)) {}

  Status parse();
  Status load_methods();
  Status check_metadata();
};

Status Program::Impl::parse() {
  const DelegateScope scope(&context);
  const auto model = model_file.bytes();
  model_loader.emplace(model.data(), model.size());
  // The default verification crashes on damaged files; this one does not, and the digest has already been
  // checked.
  auto parsed = et::Program::load(&*model_loader, et::Program::Verification::InternalConsistency);
  if (!parsed.ok()) {
    return Error{ErrorCode::kCorrupt, folder + "/" + kModelFile + " is not an ExecuTorch program (" +
                                          context.log + "); export the checkpoint again"};
  }
  program.emplace(std::move(parsed.get()));
  const auto bytes = weights_file.bytes();
  weights_loader.emplace(bytes.data(), bytes.size());
  auto map = FlatTensorDataMap::load(&*weights_loader);
  if (!map.ok()) {
    return Error{ErrorCode::kCorrupt, folder + "/" + kWeightsFile + " is not a weights file (" + context.log +
                                          "); export the checkpoint again"};
  }
  weights.emplace(std::move(map.get()));
  return ok_status();
}

Status Program::Impl::load_methods() {
  context.device = manifest.device;
  QWEN_ASSIGN_OR_RETURN(prefill, Method::load(*program, "prefill", &*weights, &context));
  QWEN_ASSIGN_OR_RETURN(decode, Method::load(*program, "decode", &*weights, &context));
  if (prefill->output_count() != 2 || decode->output_count() != 2) {
    return Error{ErrorCode::kCorrupt,
                 folder +
                     " has methods with other outputs than this runner reads; export the "
                     "checkpoint again with this version"};
  }
  return ok_status();
}

// The manifest vouches for the files; the model's own constants vouch that the manifest describes this model.
Status Program::Impl::check_metadata() {
  const std::pair<const char*, int64_t> expected[] = {{"get_format_version", kProgramFormatVersion},
                                                      {"get_vocab_size", manifest.vocab_size},
                                                      {"get_max_seq_len", manifest.max_seq_len},
                                                      {"get_chunk", manifest.chunk},
                                                      {"get_slots", manifest.slots}};
  for (const auto& [name, value] : expected) {
    QWEN_ASSIGN_OR_RETURN(const auto method, Method::load(*program, name, nullptr, &context));
    QWEN_RETURN_IF_ERROR(method->run({}));
    if (method->output_count() != 1 || !method->output(0).isInt() || method->output(0).toInt() != value) {
      return Error{ErrorCode::kCorrupt, folder + "/" + kManifestFile + " and " + kModelFile +
                                            " disagree on " + name + "; export the checkpoint again"};
    }
  }
  return ok_status();
}

Program::Program(std::unique_ptr<Impl> impl) : impl_(std::move(impl)) {}
Program::~Program() = default;

Result<std::unique_ptr<Program>> Program::load(const std::string& path) {
  et::runtime_init();
  QWEN_RETURN_IF_ERROR(register_delegate());
  const std::string manifest_path = path + "/" + kManifestFile;
  QWEN_ASSIGN_OR_RETURN(const std::string text, read_file(manifest_path));
  QWEN_ASSIGN_OR_RETURN(Manifest manifest, Manifest::parse(text, manifest_path));
  QWEN_RETURN_IF_ERROR(check_target(manifest, path));
  QWEN_ASSIGN_OR_RETURN(MappedFile model, open_verified(path, kModelFile, manifest));
  QWEN_ASSIGN_OR_RETURN(MappedFile weights, open_verified(path, kWeightsFile, manifest));
  QWEN_ASSIGN_OR_RETURN(const MappedFile tokenizer, open_verified(path, kTokenizerFile, manifest));
  // The rest is for other readers (Python's chat); a program is whole or it is not.
  for (const auto& [name, digest] : manifest.files) {
    if (name == kModelFile || name == kWeightsFile || name == kTokenizerFile) continue;
    QWEN_RETURN_IF_ERROR(open_verified(path, name.c_str(), manifest));
  }
  auto impl = std::make_unique<Impl>(path, std::move(manifest), std::move(model), std::move(weights));
  impl->tokenizer_json.assign(reinterpret_cast<const char*>(tokenizer.bytes().data()),
                              tokenizer.bytes().size());
  QWEN_RETURN_IF_ERROR(impl->parse());
  QWEN_RETURN_IF_ERROR(impl->check_metadata());
  QWEN_RETURN_IF_ERROR(impl->load_methods());
  return std::unique_ptr<Program>(new Program(std::move(impl)));
}

const Manifest& Program::manifest() const { return impl_->manifest; }
const std::string& Program::tokenizer_json() const { return impl_->tokenizer_json; }
ConstantStore& Program::constants() { return impl_->context.constants; }
const std::vector<BoundConstant>& Program::bound_constants() const { return impl_->context.bound; }

Result<int64_t> Program::step(std::span<const int64_t> tokens, int64_t position, int64_t slot,
                              const SamplingOptions& sampling, int64_t generated_from) {
  Method& method = tokens.size() == 1 ? *impl_->decode : *impl_->prefill;
  const StepInputs inputs(tokens, position, slot, sampling, generated_from);
  QWEN_RETURN_IF_ERROR(method.run(inputs.values()));
  const et::EValue token = method.output(0);
  const et::EValue logits = method.output(1);
  impl_->logits = {logits.toTensor().const_data_ptr<float>(), static_cast<size_t>(logits.toTensor().numel())};
  return token.toTensor().const_data_ptr<int64_t>()[0];
}

std::span<const float> Program::logits() const { return impl_->logits; }

}  // namespace qwen
