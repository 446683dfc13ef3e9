#include "delegate.h"

#include <executorch/runtime/backend/interface.h>
#include <executorch/runtime/core/error.h>
#include <executorch/runtime/core/evalue.h>
#include <executorch/runtime/platform/platform.h>

#include <cstring>
#include <memory>
#include <nlohmann/json.hpp>
#include <string_view>
#include <utility>

#include "shims/tensor.h"

namespace qwen {
namespace {

namespace et = executorch::runtime;
using nlohmann::json;

thread_local DelegateContext* current_context = nullptr;

Error corrupt(const std::string& what) {
  return {ErrorCode::kCorrupt, "the program " + what + "; export the checkpoint again with this version"};
}

std::optional<ScalarType> parse_dtype(const std::string& name) {
  for (const ScalarType dtype :
       {ScalarType::kUInt8, ScalarType::kInt8, ScalarType::kInt32, ScalarType::kInt64, ScalarType::kFloat32,
        ScalarType::kBFloat16, ScalarType::kBool}) {
    if (name == to_string(dtype)) return dtype;
  }
  return std::nullopt;
}

// Makes the method's state; every name the container then asks for is either one of these or a weight.
Status make_states(const json& description, ConstantStore& constants) {
  for (const json& state : description.at("state")) {
    const auto dtype = parse_dtype(state.at("dtype").get<std::string>());
    if (!dtype) return corrupt("has state of an unknown type");
    const auto sizes = state.at("shape").get<std::vector<int64_t>>();
    QWEN_RETURN_IF_ERROR(constants.state(state.at("name").get<std::string>(), *dtype, sizes));
  }
  return ok_status();
}

// Finds the tensor behind every constant of the container and binds them all: coverage is ours to check,
// since the container ignores names it does not know and only warns of missing ones.
Status bind_constants(Container& container, const std::string& method, const et::NamedDataMap& data,
                      DelegateContext& context) {
  std::vector<Tensor*> tensors;
  for (const ConstantInfo& constant : container.constants()) {
    Tensor* tensor = const_cast<Tensor*>(context.constants.find_state(constant.name));
    const bool is_state = tensor != nullptr;
    if (!is_state) {
      QWEN_ASSIGN_OR_RETURN(tensor, context.constants.weight(data, constant.name));
    }
    // The container states the size of the exported tensor's storage, which PyTorch rounds up to 64 bytes.
    const size_t bytes = tensor->storage->bytes;
    const size_t padded = (bytes + 63) / 64 * 64;
    if (tensor->dtype != constant.dtype || (constant.bytes != bytes && constant.bytes != padded)) {
      return corrupt("holds " + constant.name + " as " + tensor->shape() + ", its code expects " +
                     std::to_string(constant.bytes) + " bytes of " + to_string(constant.dtype));
    }
    tensors.push_back(tensor);
  }
  QWEN_RETURN_IF_ERROR(container.bind(tensors));
  QWEN_ASSIGN_OR_RETURN(const auto bound, container.bound());
  for (const auto& [name, tensor] : bound) {
    const bool is_state = context.constants.find_state(name) != nullptr;
    context.bound.push_back({method, name, tensor->data(), tensor->storage->bytes, is_state});
  }
  return ok_status();
}

Result<std::unique_ptr<CompiledMethod>> load_method(std::string_view processed, const et::NamedDataMap& data,
                                                    DelegateContext& context) {
  const json description = json::parse(processed, /*cb=*/nullptr, /*allow_exceptions=*/false);
  if (!description.is_object()) return corrupt("has an unreadable method description");
  try {
    const auto name = description.at("method").get<std::string>();
    const auto library = data.get_data(description.at("library").get<std::string>());
    if (!library.ok()) return corrupt("lacks the compiled library of " + name);
    auto method = std::make_unique<CompiledMethod>();
    method->inputs = description.at("inputs").get<size_t>();
    method->outputs = description.at("outputs").get<size_t>();
    QWEN_RETURN_IF_ERROR(make_states(description, context.constants));
    QWEN_ASSIGN_OR_RETURN(method->container,
                          Container::create({static_cast<const std::byte*>(library->data()), library->size()},
                                            name, context.device));
    QWEN_RETURN_IF_ERROR(bind_constants(*method->container, name, data, context));
    context.methods[name] = method.get();
    return method;
  } catch (const json::exception& error) {
    return corrupt(std::string("has an incomplete method description (") + error.what() + ")");
  }
}

std::vector<int64_t> sizes_of(const executorch::aten::Tensor& tensor) {
  return {tensor.sizes().begin(), tensor.sizes().end()};
}

// ExecuTorch's planned buffers are borrowed for the inputs; outputs are copied into its planned buffers.
// REQUIRES: a program for this process's memory.
Status run_method(CompiledMethod& method, et::Span<et::EValue*> args) {
  if (args.size() != method.inputs + method.outputs) return corrupt("passes its method the wrong arguments");
  std::vector<std::unique_ptr<Tensor>> inputs;
  for (size_t i = 0; i < method.inputs; ++i) {
    const auto& input = args[i]->toTensor();
    inputs.push_back(Tensor::borrow(input.mutable_data_ptr(), sizes_of(input),
                                    static_cast<ScalarType>(static_cast<int32_t>(input.scalar_type()))));
    if (inputs.back() == nullptr) return corrupt("passes its method a tensor of too many dimensions");
  }
  QWEN_ASSIGN_OR_RETURN(const auto outputs, method.container->run(std::move(inputs), method.outputs));
  for (size_t i = 0; i < method.outputs; ++i) {
    const auto& target = args[method.inputs + i]->toTensor();
    const Tensor& source = *outputs[i];
    if (!source.is_contiguous() ||
        static_cast<size_t>(source.numel()) * element_size(source.dtype) != target.nbytes()) {
      return corrupt("returns an output of shape " + source.shape() + " that its description does not have");
    }
    std::memcpy(target.mutable_data_ptr(), source.data(), target.nbytes());
  }
  return ok_status();
}

class QwenAotiBackend final : public et::BackendInterface {
 public:
  bool is_available() const override { return true; }

  et::Result<et::DelegateHandle*> init(et::BackendInitContext& context, et::FreeableBuffer* processed,
                                       et::ArrayRef<et::CompileSpec>) const override {
    if (current_context == nullptr || context.get_named_data_map() == nullptr) return et::Error::InvalidState;
    auto method = load_method({static_cast<const char*>(processed->data()), processed->size()},
                              *context.get_named_data_map(), *current_context);
    processed->Free();
    if (!method.ok()) {
      current_context->error = method.error();
      return et::Error::DelegateInvalidCompatibility;
    }
    return std::move(method).value().release();
  }

  et::Error execute(et::BackendExecutionContext&, et::DelegateHandle* handle,
                    et::Span<et::EValue*> args) const override {
    const Status status = run_method(*static_cast<CompiledMethod*>(handle), args);
    if (status.ok()) return et::Error::Ok;
    if (current_context != nullptr) current_context->error = status.error();
    return et::Error::DelegateInvalidHandle;
  }

  void destroy(et::DelegateHandle* handle) const override { delete static_cast<CompiledMethod*>(handle); }
};

// ExecuTorch's own logging, for calls that are not ours.
pal_emit_log_message_method default_log = nullptr;

void log_message(et_timestamp_t timestamp, et_pal_log_level_t level, const char* file, const char* function,
                 size_t line, const char* message, size_t length) {
  if (current_context != nullptr) {
    if (level == kError || level == kFatal) current_context->log.assign(message, length);
  } else if (default_log != nullptr) {
    default_log(timestamp, level, file, function, line, message, length);
  }
}

}  // namespace

DelegateScope::DelegateScope(DelegateContext* context) : previous_(std::exchange(current_context, context)) {
  context->error.reset();
  context->log.clear();
}
DelegateScope::~DelegateScope() { current_context = previous_; }

Status register_delegate() {
  static QwenAotiBackend backend;
  static const et::Error registered = [] {
    default_log = et::get_pal_impl()->emit_log_message;
    et::register_pal(et::PalImpl::create(&log_message, __FILE__));
    return et::register_backend({kDelegateName, &backend});
  }();
  if (registered == et::Error::Ok) return ok_status();
  return Error{ErrorCode::kInternal, "ExecuTorch did not accept the delegate"};
}

}  // namespace qwen
