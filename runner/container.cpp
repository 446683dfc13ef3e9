#include "container.h"

#include <utility>

namespace qwen {

struct Container::Functions {
  AOTIRuntimeError (*create)(ContainerHandle*, size_t, const char*, const char*);
  AOTIRuntimeError (*destroy)(ContainerHandle);
  AOTIRuntimeError (*num_constants)(ContainerHandle, size_t*);
  AOTIRuntimeError (*constant_name)(ContainerHandle, size_t, const char**);
  AOTIRuntimeError (*constant_fqn)(ContainerHandle, size_t, const char**);
  AOTIRuntimeError (*constant_dtype)(ContainerHandle, size_t, int32_t*);
  AOTIRuntimeError (*constant_size)(ContainerHandle, size_t, size_t*);
  AOTIRuntimeError (*bind)(ContainerHandle, const AOTInductorConstantMapEntry*, size_t, bool, bool);
  // The map is a std::unordered_map<std::string, AtenTensorHandle>, of the process's own C++ library.
  AOTIRuntimeError (*extract)(ContainerHandle, void*, bool);
  AOTIRuntimeError (*run)(ContainerHandle, AtenTensorHandle*, size_t, AtenTensorHandle*, size_t, void*,
                          void*);

  Status find(const CompiledLibrary& library) {
    QWEN_RETURN_IF_ERROR(library.find("AOTInductorModelContainerCreateWithDevice", create));
    QWEN_RETURN_IF_ERROR(library.find("AOTInductorModelContainerDelete", destroy));
    QWEN_RETURN_IF_ERROR(library.find("AOTInductorModelContainerGetNumConstants", num_constants));
    QWEN_RETURN_IF_ERROR(library.find("AOTInductorModelContainerGetConstantName", constant_name));
    QWEN_RETURN_IF_ERROR(library.find("AOTInductorModelContainerGetConstantOriginalFQN", constant_fqn));
    QWEN_RETURN_IF_ERROR(library.find("AOTInductorModelContainerGetConstantDtype", constant_dtype));
    QWEN_RETURN_IF_ERROR(library.find("AOTInductorModelContainerGetConstantDataSize", constant_size));
    QWEN_RETURN_IF_ERROR(library.find("AOTInductorModelContainerUpdateUserManagedConstantBufferPairs", bind));
    QWEN_RETURN_IF_ERROR(library.find("AOTInductorModelContainerExtractConstantsMap", extract));
    // One container, one stream: the variant without the pool of models and its events.
    return library.find("AOTInductorModelContainerRunSingleThreaded", run);
  }
};

Container::Container(CompiledLibrary library, Device& device)
    : library_(std::move(library)), functions_(std::make_unique<Functions>()) {
  if (!device.is_host()) device_arena_.emplace(device, "a step's temporaries");
}

Container::~Container() {
  if (handle_ != nullptr) functions_->destroy(handle_);
}

Result<std::unique_ptr<Container>> Container::create(std::span<const std::byte> bytes,
                                                     const std::string& name, Device& device) {
  QWEN_ASSIGN_OR_RETURN(CompiledLibrary library, CompiledLibrary::load(bytes, name));
  std::unique_ptr<Container> container(new Container(std::move(library), device));
  QWEN_RETURN_IF_ERROR(container->functions_->find(container->library_));
  const ArenaScope scope(&container->host_arena_);
  // "cpu" for a GPU too: that code of a method is compiled for the host and only passes tensors on.
  if (container->functions_->create(&container->handle_, 1, "cpu", nullptr) != 0) {
    return container->failure("creating the compiled method");
  }
  QWEN_RETURN_IF_ERROR(container->read_constants());
  return container;
}

Status Container::read_constants() {
  size_t count = 0;
  if (functions_->num_constants(handle_, &count) != 0) return failure("reading the constants");
  constants_.reserve(count);
  for (size_t i = 0; i < count; ++i) {
    const char* internal_name = nullptr;
    const char* name = nullptr;
    int32_t dtype = 0;
    size_t bytes = 0;
    if (functions_->constant_name(handle_, i, &internal_name) != 0 ||
        functions_->constant_fqn(handle_, i, &name) != 0 ||
        functions_->constant_dtype(handle_, i, &dtype) != 0 ||
        functions_->constant_size(handle_, i, &bytes) != 0) {
      return failure("reading the constants");
    }
    constants_.push_back({internal_name, name, static_cast<ScalarType>(dtype), bytes});
  }
  return ok_status();
}

Status Container::bind(std::span<Tensor* const> tensors) {
  if (tensors.size() != constants_.size())
    return Error{ErrorCode::kInternal, "not every constant has a tensor"};
  std::vector<AOTInductorConstantMapEntry> pairs;
  pairs.reserve(tensors.size());
  for (size_t i = 0; i < tensors.size(); ++i) {
    pairs.push_back({constants_[i].internal_name.c_str(), tensors[i]->handle()});
  }
  if (functions_->bind(handle_, pairs.data(), pairs.size(), /*use_inactive=*/false,
                       /*validate_full_update=*/true) != 0) {
    return failure("binding the constants");
  }
  return ok_status();
}

Result<std::unordered_map<std::string, const Tensor*>> Container::bound() {
  std::unordered_map<std::string, AtenTensorHandle> handles;
  if (functions_->extract(handle_, &handles, /*use_inactive=*/false) != 0) {
    return failure("reading back the constants");
  }
  std::unordered_map<std::string, const Tensor*> tensors;
  for (const auto& [name, handle] : handles) tensors.emplace(name, Tensor::from(handle));
  return tensors;
}

Result<std::vector<std::unique_ptr<Tensor>>> Container::run(std::vector<std::unique_ptr<Tensor>> inputs,
                                                            size_t outputs) {
  std::vector<AtenTensorHandle> input_handles;
  input_handles.reserve(inputs.size());
  for (std::unique_ptr<Tensor>& input : inputs) input_handles.push_back(input.release()->handle());
  std::vector<AtenTensorHandle> output_handles(outputs, nullptr);
  Arena* arena = &host_arena_;
  if (device_arena_) {
    device_arena_->begin_run();
    arena = &*device_arena_;
  }
  const ArenaScope scope(arena);
  take_shim_error();
  const AOTIRuntimeError code = functions_->run(handle_, input_handles.data(), input_handles.size(),
                                                output_handles.data(), outputs, nullptr, nullptr);
  std::vector<std::unique_ptr<Tensor>> results;
  results.reserve(outputs);
  for (const AtenTensorHandle handle : output_handles) results.emplace_back(Tensor::from(handle));
  if (code != 0) return failure("running the compiled method");
  // A failed check inside compiled code has no way to stop it; its message is left behind.
  if (auto error = take_shim_error()) return *std::move(error);
  for (const std::unique_ptr<Tensor>& result : results) {
    if (result == nullptr) return Error{ErrorCode::kInternal, "the compiled method left an output empty"};
  }
  return results;
}

Error Container::failure(const char* what) {
  const auto shim_error = take_shim_error();
  if (device_arena_) {
    if (auto error = device_arena_->take_error()) return *std::move(error);
  }
  if (shim_error) return {shim_error->code, std::string(what) + " failed: " + shim_error->message};
  return {ErrorCode::kInternal, std::string(what) + " failed"};
}

}  // namespace qwen
