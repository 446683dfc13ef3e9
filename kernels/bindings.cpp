// The CPU kernels on numpy arrays, for tests and benchmarks: qwen_runner._kernels.
//
// Each function takes the operator's arguments in its order, then the output arrays, and returns a status
// code. Arrays are C-contiguous; bfloat16 is uint16. Sizes are read off the arrays; what they hold is the
// kernel's to check.
#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>

#include <stdexcept>
#include <string>

#include "kernels/attention/cpu.h"
#include "kernels/gated_delta/cpu.h"
#include "kernels/linear/cpu.h"
#include "kernels/moe/cpu.h"
#include "kernels/parallel.h"
#include "kernels/sample/cpu.h"
#include "kernels/sample/philox.h"
#include "kernels/vector.h"

namespace py = pybind11;
namespace cpu = qwen::cpu;

namespace {

template <typename T>
T* data(const py::array& array) {
  if (!py::isinstance<py::array_t<T>>(array) || (array.flags() & py::array::c_style) == 0) {
    throw std::invalid_argument("expected a C-contiguous array of " +
                                std::string(py::str(py::dtype::of<T>())) + ", got " +
                                std::string(py::str(array.dtype())));
  }
  return static_cast<T*>(const_cast<void*>(array.data()));
}

cpu::DType dtype(const py::array& array) {
  return py::isinstance<py::array_t<float>>(array) ? cpu::DType::kFloat32 : cpu::DType::kBFloat16;
}

// Float32 or bfloat16.
void* floats(const py::array& array) {
  if (dtype(array) == cpu::DType::kFloat32) {
    return data<float>(array);
  }
  return data<uint16_t>(array);
}

cpu::Array view(const py::array& array) { return {floats(array), dtype(array)}; }

int float_linear(const py::array& x, const py::array& weight, const py::array& out) {
  return cpu::float_linear(view(x), view(weight), floats(out), {x.shape(0), x.shape(1), weight.shape(0)});
}

int int8_linear(const py::array& x, const py::array& q, const py::array& scales, const py::array& out) {
  return cpu::int8_linear(view(x), data<int8_t>(q), data<uint16_t>(scales), scales.shape(1), floats(out),
                          {x.shape(0), x.shape(1), q.shape(0)});
}

int int4_linear(const py::array& x, const py::array& q, const py::array& scales, const py::array& out) {
  return cpu::int4_linear(view(x), data<uint8_t>(q), data<uint16_t>(scales), scales.shape(1), floats(out),
                          {x.shape(0), x.shape(1), q.shape(0)});
}

int int8_embedding(const py::array& ids, const py::array& q, const py::array& scales, const py::array& out) {
  return cpu::int8_embedding(data<int64_t>(ids), data<int8_t>(q), data<uint16_t>(scales), scales.shape(1),
                             data<float>(out), {ids.shape(0), q.shape(0), q.shape(1)});
}

int router(const py::array& x, const py::array& weight, int64_t top_k, const py::array& ids,
           const py::array& weights) {
  return cpu::router(view(x), view(weight), data<int64_t>(ids), data<float>(weights),
                     {x.shape(0), x.shape(1), weight.shape(0), top_k});
}

int float_moe(const py::array& x, const py::array& ids, const py::array& weights, const py::array& gate_up,
              const py::array& down, const py::array& out) {
  return cpu::float_moe(view(x), data<int64_t>(ids), data<float>(weights), view(gate_up), view(down),
                        floats(out), {x.shape(0), x.shape(1), down.shape(0), down.shape(2), ids.shape(1)});
}

int int4_moe(const py::array& x, const py::array& ids, const py::array& weights, const py::array& gate_up,
             const py::array& gate_up_scales, const py::array& down, const py::array& down_scales,
             const py::array& out) {
  const cpu::Int4Experts experts = {data<uint8_t>(gate_up),  data<uint16_t>(gate_up_scales),
                                    data<uint8_t>(down),     data<uint16_t>(down_scales),
                                    gate_up_scales.shape(2), down_scales.shape(2)};
  return cpu::int4_moe(view(x), data<int64_t>(ids), data<float>(weights), experts, floats(out),
                       {x.shape(0), x.shape(1), down.shape(0), down.shape(2) * 2, ids.shape(1)});
}

int gated_delta(const py::array& mixed_qkv, const py::array& a, const py::array& b,
                const py::array& conv_weight, const py::array& a_log, const py::array& dt_bias,
                const py::array& conv_state, const py::array& recurrent_state, const py::array& slot,
                int64_t num_key_heads, const py::array& out) {
  cpu::GatedDeltaInputs inputs;
  inputs.mixed_qkv = floats(mixed_qkv);
  inputs.a = floats(a);
  inputs.b = floats(b);
  inputs.dtype = dtype(mixed_qkv);
  inputs.conv_weight = view(conv_weight);
  inputs.a_log = view(a_log);
  inputs.dt_bias = view(dt_bias);
  inputs.slot = data<int64_t>(slot);
  const cpu::GatedDeltaShape shape = {mixed_qkv.shape(0),       slot.shape(0),
                                      recurrent_state.shape(0), num_key_heads,
                                      recurrent_state.shape(1), recurrent_state.shape(2),
                                      recurrent_state.shape(3), conv_weight.shape(1)};
  return cpu::gated_delta(inputs, floats(conv_state), data<float>(recurrent_state), floats(out), shape);
}

int attention(const py::array& q, const py::array& k, const py::array& v, const py::array& key_cache,
              const py::array& value_cache, const py::array& position, const py::array& slot,
              const py::array& out) {
  const cpu::AttentionInputs inputs = {
      floats(q), floats(k), floats(v), dtype(q), data<int64_t>(position), data<int64_t>(slot)};
  const cpu::AttentionShape shape = {q.shape(0), slot.shape(0), key_cache.shape(0), key_cache.shape(2),
                                     q.shape(1), k.shape(1),    q.shape(2)};
  return cpu::attention(inputs, floats(key_cache), floats(value_cache), floats(out), shape);
}

int sample(const py::array& logits, const py::array& tokens, const py::array& position, const py::array& slot,
           const py::array& seen, const py::array& temperature, const py::array& top_k,
           const py::array& top_p, const py::array& min_p, const py::array& presence_penalty,
           const py::array& repetition_penalty, const py::array& seed, const py::array& generated_from,
           const py::array& next) {
  const cpu::SampleInputs inputs = {data<float>(logits),
                                    data<int64_t>(tokens),
                                    data<int64_t>(position),
                                    data<int64_t>(slot),
                                    data<float>(temperature),
                                    data<int64_t>(top_k),
                                    data<float>(top_p),
                                    data<float>(min_p),
                                    data<float>(presence_penalty),
                                    data<float>(repetition_penalty),
                                    data<int64_t>(seed),
                                    data<int64_t>(generated_from)};
  return cpu::sample(inputs, data<uint8_t>(seen), data<int64_t>(next),
                     {logits.shape(0), tokens.shape(0), seen.shape(0), logits.shape(1)});
}

py::tuple philox(uint32_t c0, uint32_t c1, uint32_t c2, uint32_t c3, uint32_t k0, uint32_t k1) {
  const auto words = cpu::philox({c0, c1, c2, c3}, {k0, k1});
  return py::make_tuple(words[0], words[1], words[2], words[3]);
}

}  // namespace

PYBIND11_MODULE(_kernels, m) {
  m.doc() = "The CPU kernels on numpy arrays, for tests and benchmarks.";
  m.attr("OK") = cpu::kOk;
  m.attr("BAD_SHAPE") = cpu::kBadShape;
  m.attr("OUT_OF_RANGE") = cpu::kOutOfRange;
  m.attr("OUT_OF_MEMORY") = cpu::kOutOfMemory;
  m.def("isa", [] { return cpu::vector_ops().name; }, "The instruction set in use: v4, v3 or base.");
  m.def("max_threads", &cpu::max_threads, "Threads that the kernels use at most.");
  m.def("set_max_threads", &cpu::set_max_threads, "Threads that the kernels use from now on.");
  m.def("float_linear", &float_linear);
  m.def("int8_linear", &int8_linear);
  m.def("int4_linear", &int4_linear);
  m.def("int8_embedding", &int8_embedding);
  m.def("router", &router);
  m.def("float_moe", &float_moe);
  m.def("int4_moe", &int4_moe);
  m.def("gated_delta", &gated_delta);
  m.def("attention", &attention);
  m.def("sample", &sample);
  m.def("philox", &philox, "Four counter words and two key words -> four random words.");
}
