// Between Python's values and ours: JSON from keyword arguments, exceptions from errors.
#pragma once

#include <pybind11/pybind11.h>

#include <nlohmann/json.hpp>
#include <string>

#include "result.h"

namespace qwen::python {

// The UTF-8 of a str, or bytes as they are. A lone surrogate, which has no UTF-8, becomes bytes that are read
// as any other damage to a text. Raises TypeError for anything else.
std::string to_text(const pybind11::handle& text);

// A keyword argument's value as JSON: None, bool, integers, floats (NumPy's too), str, and lists of these. An
// integer over 64 bits becomes its digits as text. Raises TypeError for anything else.
nlohmann::json to_json(const pybind11::handle& value);

// Raises the Python exception that `error`'s code stands for (see result.h).
[[noreturn]] void raise(const Error& error);

// The value, or the exception of its error.
template <typename T>
T unwrap(Result<T> result) {
  if (!result.ok()) raise(result.error());
  return std::move(result).value();
}

inline void unwrap(const Status& status) {
  if (!status.ok()) raise(status.error());
}

}  // namespace qwen::python
