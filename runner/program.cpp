#include "program.h"

#include <executorch/extension/data_loader/buffer_data_loader.h>
#include <executorch/extension/flat_tensor/flat_tensor_data_map.h>
#include <executorch/extension/flat_tensor/serialize/flat_tensor_header.h>
#include <executorch/runtime/platform/runtime.h>

#include <chrono>
#include <optional>
#include <utility>

#include "cpu_features.h"
#include "delegate.h"
#include "file.h"
#include "method.h"

#ifdef QWEN_CUDA
#include "cuda_device.h"
#include "cuda_error.h"
#include "cuda_steps.h"
#include "cuda_upload.h"
#include "kernels/cuda/tuning.h"
#endif

namespace qwen {
namespace {

namespace et = executorch::runtime;
using Clock = std::chrono::steady_clock;
using executorch::extension::BufferDataLoader;
using executorch::extension::FlatTensorDataMap;
using executorch::extension::FlatTensorHeader;

constexpr const char* kModelFile = "model.pte";
constexpr const char* kWeightsFile = "model.ptd";
constexpr const char* kTokenizerFile = "tokenizer.json";

double milliseconds_since(Clock::time_point began) {
  return std::chrono::duration<double, std::milli>(Clock::now() - began).count();
}

Result<const FileDigest*> find_digest(const std::string& folder, const char* name, const Manifest& manifest) {
  const auto digest = manifest.files.find(name);
  if (digest == manifest.files.end()) {
    return Error{ErrorCode::kCorrupt,
                 folder + "/" + kManifestFile + " does not list " + name + "; export the checkpoint again"};
  }
  return &digest->second;
}

Result<MappedFile> open_verified(const std::string& folder, const char* name, const Manifest& manifest) {
  const std::string path = folder + "/" + name;
  QWEN_ASSIGN_OR_RETURN(const FileDigest* digest, find_digest(folder, name, manifest));
  QWEN_ASSIGN_OR_RETURN(MappedFile file, MappedFile::open(path));
  QWEN_RETURN_IF_ERROR(verify_digest(file.bytes(), *digest, path));
  return file;
}

// The weights file for a device that they are copied to: who copies them checks them too. Checked here is
// what is parsed before that, the table of where they are, since a damaged one crashes its parser.
Result<MappedFile> open_weights(const std::string& folder, const Manifest& manifest) {
  const std::string path = folder + "/" + kWeightsFile;
  QWEN_ASSIGN_OR_RETURN(const FileDigest* digest, find_digest(folder, kWeightsFile, manifest));
  QWEN_ASSIGN_OR_RETURN(MappedFile file, MappedFile::open(path));
  const auto bytes = file.bytes();
  QWEN_RETURN_IF_ERROR(check_size(bytes.size(), *digest, path));
  QWEN_RETURN_IF_ERROR(verify_beginning(bytes, FlatTensorHeader::kNumHeadBytes, *digest, path));
  // What is no header is refused where it is parsed.
  const auto header = FlatTensorHeader::Parse(bytes.data(), bytes.size());
  if (header.ok() && header->segment_base_offset > digest->block_size) {
    QWEN_RETURN_IF_ERROR(verify_beginning(bytes, header->segment_base_offset, *digest, path));
  }
  return file;
}

Status check_isa(const Manifest& manifest, const std::string& folder) {
  if (!cpu_supports(manifest.isa)) {
    return Error{ErrorCode::kUnsupported,
                 folder + " was compiled for " + manifest.isa +
                     ", which this CPU lacks; export the checkpoint on this machine"};
  }
  return ok_status();
}

// The kernels of a GPU read int4 weights in one layout, and cannot tell another from it.
Status check_layout(const Manifest& manifest, const std::string& folder) {
  if (manifest.device != "cuda") return ok_status();
  const auto& quantization = manifest.quantization;
  const auto found = quantization.is_object() ? quantization.find("layout") : quantization.end();
  if (found != quantization.end() && *found == kInt4Layout) return ok_status();
  const std::string layout =
      found != quantization.end() && found->is_string() ? found->get<std::string>() : "none";
  return Error{ErrorCode::kUnsupported, folder + " has int4 weights of layout " + layout +
                                            ", this runner reads " + kInt4Layout +
                                            "; export the checkpoint again with this version"};
}

}  // namespace

// Members are destroyed in reverse: steps and methods before what they are bound to.
struct Program::Impl {
  std::string folder;
  Manifest manifest;
  std::string tokenizer_json;
  std::unique_ptr<Device> device;
  MappedFile model_file;
  MappedFile weights_file;
  DelegateContext context;
  std::optional<BufferDataLoader> model_loader;
  std::optional<BufferDataLoader> weights_loader;
  std::optional<FlatTensorDataMap> weights;
  std::optional<et::Program> program;
  std::unique_ptr<Method> prefill;
  std::unique_ptr<Method> decode;
  std::unique_ptr<Method> decode_batch;  // null where no step has more than one row
  std::unique_ptr<Steps> steps;
  double weights_ms = 0;
  std::vector<std::string> warnings;

  Impl(std::string folder, Manifest manifest, std::unique_ptr<Device> on, MappedFile model,
       MappedFile weights)
      : folder(std::move(folder)),
        manifest(std::move(manifest)),
        device(std::move(on)),
        model_file(std::move(model)),
        weights_file(std::move(weights)),
        context(*device) {}

  Status parse();
  Status load_methods();
  Status check_metadata();
  Status prepare_device();
  Status make_steps(const GpuOptions& options);
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
  QWEN_ASSIGN_OR_RETURN(prefill, Method::load(*program, "prefill", &*weights, &context));
  QWEN_ASSIGN_OR_RETURN(decode, Method::load(*program, "decode", &*weights, &context));
  if (manifest.batch > 1) {
    QWEN_ASSIGN_OR_RETURN(decode_batch, Method::load(*program, "decode_batch", &*weights, &context));
  }
  for (const auto* method : {&prefill, &decode, &decode_batch}) {
    if (*method != nullptr && (*method)->output_count() != 2) {
      return Error{ErrorCode::kCorrupt,
                   folder +
                       " has methods with other outputs than this runner reads; export the "
                       "checkpoint again with this version"};
    }
  }
  return ok_status();
}

// The manifest vouches for the files; the model's own constants vouch that the manifest describes this model.
Status Program::Impl::check_metadata() {
  std::vector<std::pair<const char*, int64_t>> expected = {{"get_format_version", kProgramFormatVersion},
                                                           {"get_vocab_size", manifest.vocab_size},
                                                           {"get_max_seq_len", manifest.max_seq_len},
                                                           {"get_chunk", manifest.chunk},
                                                           {"get_slots", manifest.slots}};
  // Programs from before there were batches do not say that they have none.
  if (manifest.batch > 1) expected.emplace_back("get_batch", manifest.batch);
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

#ifdef QWEN_CUDA
// Room on the GPU beside weights and state, for the largest model this runs: the kernels' code, a CUDA graph
// and decode's temporaries, and a token's of a prefill chunk.
constexpr uint64_t kGpuReserve = uint64_t{256} << 20;
constexpr uint64_t kGpuReserveToken = uint64_t{128} << 10;
#endif

// Makes room for the weights on a GPU, where there must be some for the rest too. Of their file no more than
// the table has been read.
Status Program::Impl::prepare_device() {
#ifdef QWEN_CUDA
  if (!device->is_host()) {
    const auto& gpu = static_cast<const CudaDevice&>(*device);
    const uint64_t weight_bytes = weights_file.bytes().size();
    QWEN_RETURN_IF_ERROR(gpu.require_free(weight_bytes, folder + "'s weights"));
  }
#endif
  return context.constants.reserve_weights(weights_file.bytes());
}

Status Program::Impl::make_steps(const GpuOptions& options) {
#ifdef QWEN_CUDA
  if (!device->is_host()) {
    auto& gpu = static_cast<CudaDevice&>(*device);
    const CurrentDevice current;
    const uint64_t reserve = kGpuReserve + static_cast<uint64_t>(manifest.chunk) * kGpuReserveToken;
    QWEN_RETURN_IF_ERROR(gpu.require_free(
        reserve, "a step's temporaries, beside " + readable_bytes(weights_file.bytes().size()) +
                     " of weights and " + readable_bytes(context.constants.state_bytes()) + " of state"));
    std::string untuned = cuda::untuned_warning(cuda::gpu_architecture());
    if (!untuned.empty()) warnings.push_back(std::move(untuned));
    auto& methods = context.methods;
    QWEN_ASSIGN_OR_RETURN(
        steps, CudaSteps::make(gpu, manifest,
                               {.prefill = *methods.at("prefill"),
                                .decode = *methods.at("decode"),
                                .decode_batch = manifest.batch > 1 ? methods.at("decode_batch") : nullptr},
                               options));
    // The methods are bound to where the weights will be: all that can be refused without reading them has
    // been.
    QWEN_ASSIGN_OR_RETURN(const FileDigest* digest, find_digest(folder, kWeightsFile, manifest));
    const auto began = Clock::now();
    QWEN_RETURN_IF_ERROR(upload_verified(weights_file, *digest, folder + "/" + kWeightsFile,
                                         context.constants.weights_memory()));
    weights_ms = milliseconds_since(began);
    return ok_status();
  }
#endif
  (void)options;
  steps = make_host_steps(*prefill, *decode);
  return ok_status();
}

Program::Program(std::unique_ptr<Impl> impl) : impl_(std::move(impl)) {}
Program::~Program() = default;

Result<std::unique_ptr<Program>> Program::load(const std::string& path, const GpuOptions& options) {
  et::runtime_init();
  QWEN_RETURN_IF_ERROR(register_delegate());
  const std::string manifest_path = path + "/" + kManifestFile;
  QWEN_ASSIGN_OR_RETURN(const std::string text, read_file(manifest_path));
  QWEN_ASSIGN_OR_RETURN(Manifest manifest, Manifest::parse(text, manifest_path));
  QWEN_ASSIGN_OR_RETURN(auto device, open_device(manifest.device, path));
  QWEN_RETURN_IF_ERROR(check_isa(manifest, path));
  QWEN_RETURN_IF_ERROR(check_layout(manifest, path));
  QWEN_ASSIGN_OR_RETURN(MappedFile model, open_verified(path, kModelFile, manifest));
  const auto began = Clock::now();
  QWEN_ASSIGN_OR_RETURN(MappedFile weights, device->is_host() ? open_verified(path, kWeightsFile, manifest)
                                                              : open_weights(path, manifest));
  const double weights_ms = milliseconds_since(began);
  QWEN_ASSIGN_OR_RETURN(const MappedFile tokenizer, open_verified(path, kTokenizerFile, manifest));
  // The rest is for other readers (Python's chat); a program is whole or it is not.
  for (const auto& [name, digest] : manifest.files) {
    if (name == kModelFile || name == kWeightsFile || name == kTokenizerFile) continue;
    QWEN_RETURN_IF_ERROR(open_verified(path, name.c_str(), manifest));
  }
  auto impl = std::make_unique<Impl>(path, std::move(manifest), std::move(device), std::move(model),
                                     std::move(weights));
  impl->tokenizer_json.assign(reinterpret_cast<const char*>(tokenizer.bytes().data()),
                              tokenizer.bytes().size());
  impl->weights_ms = weights_ms;
  QWEN_RETURN_IF_ERROR(impl->prepare_device());
  QWEN_RETURN_IF_ERROR(impl->parse());
  QWEN_RETURN_IF_ERROR(impl->check_metadata());
  QWEN_RETURN_IF_ERROR(impl->load_methods());
  QWEN_RETURN_IF_ERROR(impl->make_steps(options));
  return std::unique_ptr<Program>(new Program(std::move(impl)));
}

const Manifest& Program::manifest() const { return impl_->manifest; }
const std::string& Program::tokenizer_json() const { return impl_->tokenizer_json; }
ConstantStore& Program::constants() { return impl_->context.constants; }
const std::vector<BoundConstant>& Program::bound_constants() const { return impl_->context.bound; }
const Device& Program::device() const { return *impl_->device; }

Result<std::vector<int64_t>> Program::run(std::span<const Step> steps) {
  for (const Step& step : steps) {
    const auto count = static_cast<int64_t>(step.tokens.size()) + (step.ahead ? 1 : 0);
    impl_->context.constants.will_write(step.slot, step.position + count);
  }
  return impl_->steps->run(steps);
}

int64_t Program::graph_nodes() const { return impl_->steps->graph_nodes(); }

std::vector<std::string> Program::take_warnings() {
  auto warnings = std::exchange(impl_->warnings, {});
  for (std::string& warning : impl_->steps->take_warnings()) warnings.push_back(std::move(warning));
  return warnings;
}

Status Program::clear_slot(int64_t slot) {
  impl_->steps->discard(slot);
  return impl_->context.constants.zero_slot(slot);
}

Status Program::copy_slot(int64_t from, int64_t to) {
  impl_->steps->discard(to);
  return impl_->context.constants.copy_slot(from, to);
}

double Program::weights_ms() const { return impl_->weights_ms; }

}  // namespace qwen
