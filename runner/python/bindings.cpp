// qwen_runner._core: the runner as Python sees it. No logic, only conversions.
//
// The GIL is released wherever the model runs or the engine's lock is taken, which another thread holds for
// as long as a step takes: all of Python would wait for that step.

#include <pybind11/functional.h>
#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <algorithm>
#include <nlohmann/json.hpp>
#include <optional>
#include <span>

#include "chat.h"
#include "conversions.h"
#include "engine.h"
#include "file.h"
#include "generate.h"
#include "options.h"
#include "session.h"
#include "stats.h"
#include "tokenizer.h"

namespace py = pybind11;

namespace qwen::python {
namespace {

using Messages = std::vector<std::pair<std::string, std::string>>;

// What `action` returns, made without the GIL.
template <typename Action>
auto without_gil(Action&& action) {
  const py::gil_scoped_release release;
  return action();
}

struct Cancel {
  CancelFlag flag = false;
};

std::vector<ChatMessage> to_messages(const Messages& pairs) {
  std::vector<ChatMessage> messages;
  for (const auto& [role, content] : pairs) messages.push_back({role, content});
  return messages;
}

py::dict to_dict(const Timings& timings) {
  py::dict dict;
  dict["load_ms"] = timings.load_ms;
  dict["ttft_ms"] = timings.ttft_ms;
  dict["prefill_tokens_per_second"] = timings.prefill_tokens_per_second;
  dict["decode_tokens_per_second"] = timings.decode_tokens_per_second;
  return dict;
}

py::dict to_dict(const Generation& generation) {
  py::dict dict;
  dict["text"] = generation.text;
  dict["tokens"] = generation.tokens;
  dict["prompt_tokens"] = generation.prompt_tokens;
  dict["finish_reason"] = to_string(generation.finish_reason);
  dict["seed"] = generation.seed;
  dict["timings"] = to_dict(generation.timings);
  dict["logprobs"] = generation.logprobs;
  return dict;
}

GenerateOptions to_options(const Engine& engine, const py::dict& values) {
  nlohmann::json json = nlohmann::json::object();
  for (const auto& [name, value] : values) json[to_text(name)] = to_json(value);
  return unwrap(make_generate_options(engine.manifest(), json));
}

// Opens a session for one answer. `on_piece` is called with the GIL; what it raises ends the answer and is
// raised again.
py::dict generate_answer(Engine& engine, const std::vector<int64_t>& prompt, const py::dict& values,
                         const py::object& on_piece, const Cancel& cancel) {
  const GenerateOptions options = to_options(engine, values);
  std::exception_ptr raised;
  const PieceCallback callback = [&](std::string_view piece) {
    const py::gil_scoped_acquire gil;
    try {
      if (PyErr_CheckSignals() != 0) throw py::error_already_set();
      if (!on_piece.is_none()) on_piece(py::str(piece.data(), piece.size()));
      return true;
    } catch (...) {
      raised = std::current_exception();
      return false;
    }
  };
  Result<Generation> generation = without_gil([&]() -> Result<Generation> {
    QWEN_ASSIGN_OR_RETURN(Session session, engine.open_session());
    return generate(engine, session, prompt, options, callback, &cancel.flag);
  });
  if (raised) std::rethrow_exception(raised);
  return to_dict(unwrap(std::move(generation)));
}

// The same for several prompts, each with its own options. Opens a session for as many as a decode step
// advances together. `on_piece` is called with the prompt's index before the piece.
py::list generate_answers(Engine& engine, std::vector<std::vector<int64_t>> prompts,
                          const std::vector<py::dict>& values, const py::object& on_piece, Cancel& cancel) {
  if (prompts.size() != values.size()) throw py::value_error("there must be options for every prompt");
  std::vector<GenerationRequest> requests;
  requests.reserve(prompts.size());
  for (size_t i = 0; i < prompts.size(); ++i) {
    requests.push_back({std::move(prompts[i]), to_options(engine, values[i])});
  }
  std::exception_ptr raised;
  const BatchPieceCallback callback = [&](size_t index, std::string_view piece) {
    const py::gil_scoped_acquire gil;
    if (raised) return false;
    try {
      if (PyErr_CheckSignals() != 0) throw py::error_already_set();
      if (!on_piece.is_none()) on_piece(index, py::str(piece.data(), piece.size()));
      return true;
    } catch (...) {
      raised = std::current_exception();
      cancel.flag = true;
      return false;
    }
  };
  auto answers = without_gil([&]() -> Result<std::vector<Generation>> {
    if (requests.empty()) return std::vector<Generation>();
    const auto most = std::min(static_cast<int64_t>(requests.size()), engine.manifest().batch);
    QWEN_ASSIGN_OR_RETURN(std::vector<Session> sessions, engine.open_sessions(most));
    return generate_batch(engine, sessions, requests, callback, &cancel.flag);
  });
  if (raised) std::rethrow_exception(raised);
  py::list list;
  for (const Generation& answer : unwrap(std::move(answers))) list.append(to_dict(answer));
  return list;
}

py::list option_list() {
  py::list list;
  for (const OptionSpec& option : generation_options()) {
    py::dict entry;
    entry["name"] = option.name;
    entry["help"] = option.help;
    entry["allowed"] = option.allowed;
    list.append(entry);
  }
  return list;
}

EngineOptions engine_options(std::optional<bool> cuda_graph, const std::string& expert_activations) {
  EngineOptions options;
  if (cuda_graph) {
    options.cuda_graph = *cuda_graph ? EngineOptions::CudaGraph::kOn : EngineOptions::CudaGraph::kOff;
  }
  options.expert_activations = unwrap(parse_expert_activations(expert_activations));
  options.on_warning = [](const std::string& message) {
    const py::gil_scoped_acquire gil;
    // Where warnings are errors, the step that warns goes on all the same.
    if (PyErr_WarnEx(PyExc_RuntimeWarning, message.c_str(), 1) != 0) PyErr_WriteUnraisable(nullptr);
  };
  return options;
}

void bind_engine(py::module_& module) {
  py::class_<Cancel>(module, "Cancel").def(py::init<>()).def("set", [](Cancel& cancel) {
    cancel.flag = true;
  });

  py::class_<Engine>(module, "Engine", py::release_gil_before_calling_cpp_dtor())
      .def(py::init([](const std::string& path, std::optional<bool> cuda_graph,
                       const std::string& expert_activations) {
             const EngineOptions options = engine_options(cuda_graph, expert_activations);
             return unwrap(without_gil([&] { return Engine::load(path, options); }));
           }),
           py::arg("path"), py::arg("cuda_graph") = py::none(), py::arg("expert_activations") = "bfloat16")
      .def("generate", &generate_answer, py::arg("prompt"), py::arg("options"), py::arg("on_piece"),
           py::arg("cancel"))
      .def("generate_batch", &generate_answers, py::arg("prompts"), py::arg("options"), py::arg("on_piece"),
           py::arg("cancel"))
      .def(
          "decode_together",
          [](const Engine& engine, const std::vector<Session*>& sessions, const std::vector<int64_t>& tokens,
             const std::vector<py::dict>& options, bool ahead) {
            if (sessions.empty() || tokens.size() != sessions.size() || options.size() != sessions.size()) {
              throw py::value_error("there must be a session, and a token and options for every session");
            }
            std::vector<DecodeRow> rows;
            rows.reserve(sessions.size());
            for (size_t i = 0; i < sessions.size(); ++i) {
              rows.push_back({sessions[i], tokens[i], to_options(engine, options[i]).sampling, ahead});
            }
            return unwrap(without_gil([&] { return Session::decode_together(rows); }));
          },
          py::arg("sessions"), py::arg("tokens"), py::arg("options"), py::arg("ahead"))
      .def(
          "open_session",
          [](Engine& engine) { return unwrap(without_gil([&] { return engine.open_session(); })); },
          py::keep_alive<0, 1>())
      .def(
          "tokenize",
          [](const Engine& engine, const py::object& text, bool parse_special) {
            return engine.tokenizer().encode(to_text(text), parse_special);
          },
          py::arg("text"), py::arg("parse_special"))
      .def(
          "detokenize",
          [](const Engine& engine, const std::vector<int64_t>& tokens, bool skip_special) {
            return engine.tokenizer().decode(tokens, skip_special);
          },
          py::arg("tokens"), py::arg("skip_special"))
      .def(
          "encode_chat",
          [](const Engine& engine, const Messages& messages, bool thinking, bool add_generation_prompt) {
            return unwrap(encode_chat(engine, to_messages(messages), thinking, add_generation_prompt));
          },
          py::arg("messages"), py::arg("thinking"), py::arg("add_generation_prompt"))
      .def("bound_constants",
           [](const Engine& engine) {
             py::list list;
             for (const BoundConstant& constant : engine.bound_constants()) {
               list.append(py::make_tuple(constant.method, constant.name,
                                          reinterpret_cast<uintptr_t>(constant.data), constant.bytes,
                                          constant.is_state));
             }
             return list;
           })
      .def_property_readonly("max_seq_len",
                             [](const Engine& engine) { return engine.manifest().max_seq_len; })
      .def_property_readonly("vocab_size", [](const Engine& engine) { return engine.manifest().vocab_size; })
      .def_property_readonly("chunk", [](const Engine& engine) { return engine.manifest().chunk; })
      .def_property_readonly("slots", [](const Engine& engine) { return engine.manifest().slots; })
      .def_property_readonly("batch", [](const Engine& engine) { return engine.manifest().batch; })
      .def_property_readonly("device", [](const Engine& engine) { return engine.manifest().device; })
      .def_property_readonly("gpu",
                             [](const Engine& engine) -> py::object {
                               const DeviceStats gpu = without_gil([&] { return engine.device_stats(); });
                               if (gpu.name.empty()) return py::none();
                               py::dict dict;
                               dict["name"] = gpu.name;
                               dict["allocated_bytes"] = gpu.allocated_bytes;
                               dict["used_bytes"] = gpu.used_bytes;
                               dict["total_bytes"] = gpu.total_bytes;
                               dict["graph_nodes"] = gpu.graph_nodes;
                               return dict;
                             })
      .def_property_readonly("memory", [](const Engine& engine) {
        const MemoryUsage memory = measure_memory(engine.load_stats());
        py::dict dict;
        dict["peak_resident_bytes"] = memory.peak_resident_bytes;
        dict["resident_bytes"] = memory.resident_bytes;
        dict["weight_bytes"] = memory.weight_bytes;
        dict["state_bytes"] = memory.state_bytes;
        return dict;
      });
}

void bind_session(py::module_& module) {
  py::class_<Session>(module, "Session", py::release_gil_before_calling_cpp_dtor())
      .def(
          "run",
          [](Session& session, const Engine& engine, const std::vector<int64_t>& tokens,
             const py::dict& options, int64_t chunk) {
            const SamplingOptions sampling = to_options(engine, options).sampling;
            return unwrap(without_gil([&] { return session.run(tokens, sampling, chunk); }));
          },
          py::arg("engine"), py::arg("tokens"), py::arg("options"), py::arg("chunk") = 0)
      .def(
          "decode",
          [](Session& session, const Engine& engine, int64_t token, const py::dict& options, bool ahead) {
            const SamplingOptions sampling = to_options(engine, options).sampling;
            return unwrap(without_gil([&] { return session.decode(token, sampling, ahead); }));
          },
          py::arg("engine"), py::arg("token"), py::arg("options"), py::arg("ahead"))
      .def(
          "fork", [](Session& session) { return unwrap(without_gil([&] { return session.fork(); })); },
          py::keep_alive<0, 1>())
      .def("keep_logits", &Session::keep_logits, py::arg("keep"))
      .def("logits",
           [](const Session& session) {
             const auto logits = unwrap(session.logits());
             return py::array_t<float>(static_cast<py::ssize_t>(logits.size()), logits.data());
           })
      .def(
          "state",
          [](const Session& session, const std::string& name) {
            const auto bytes = unwrap(without_gil([&] { return session.read_state(name); }));
            return py::array_t<uint8_t>(static_cast<py::ssize_t>(bytes.size()),
                                        reinterpret_cast<const uint8_t*>(bytes.data()));
          },
          py::arg("name"))
      .def(
          "write_state",
          [](Session& session, const std::string& name,
             const py::array_t<uint8_t, py::array::c_style | py::array::forcecast>& bytes) {
            const auto data = std::as_bytes(std::span(bytes.data(), static_cast<size_t>(bytes.size())));
            unwrap(without_gil([&] { return session.write_state(name, data); }));
          },
          py::arg("name"), py::arg("bytes"))
      .def("reset", [](Session& session) { unwrap(without_gil([&] { return session.reset(); })); })
      .def("set_generated_from", &Session::set_generated_from, py::arg("position"))
      .def_property_readonly("position", &Session::position)
      .def_property_readonly("slot", &Session::slot);
}

void bind_tokenizer(py::module_& module) {
  py::class_<Tokenizer>(module, "Tokenizer")
      .def(py::init([](const std::string& path) {
             return unwrap(Tokenizer::from_json(unwrap(read_file(path)), path));
           }),
           py::arg("path"))
      .def(
          "encode",
          [](const Tokenizer& tokenizer, const py::object& text, bool parse_special) {
            return tokenizer.encode(to_text(text), parse_special);
          },
          py::arg("text"), py::arg("parse_special") = false)
      .def(
          "decode",
          [](const Tokenizer& tokenizer, const std::vector<int64_t>& ids, bool skip_special) {
            return tokenizer.decode(ids, skip_special);
          },
          py::arg("ids"), py::arg("skip_special") = true);
}

}  // namespace

// Tests build this a second time, with an emulated GPU.
#ifndef QWEN_CORE_MODULE
#define QWEN_CORE_MODULE _core
#endif

PYBIND11_MODULE(QWEN_CORE_MODULE, module) {
  module.doc() = "The C++ runner; use qwen_runner.Runner instead.";
  module.attr("__version__") = QWEN_VERSION;
  bind_engine(module);
  bind_session(module);
  bind_tokenizer(module);
  module.def("generation_options", &option_list);
  module.def(
      "render_chat",
      [](const std::string& pieces, const Messages& messages, bool thinking, bool add_generation_prompt) {
        const auto format = unwrap(ChatFormat::from_json(nlohmann::json::parse(pieces)));
        std::string text;
        for (const auto& segment :
             unwrap(format.render(to_messages(messages), thinking, add_generation_prompt))) {
          text += segment.text;
        }
        return text;
      },
      py::arg("pieces"), py::arg("messages"), py::arg("thinking"), py::arg("add_generation_prompt"));
}

}  // namespace qwen::python
