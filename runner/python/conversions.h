// Between Python's values and ours: JSON from keyword arguments, exceptions from errors.
#pragma once

#include <pybind11/pybind11.h>

#include <nlohmann/json.hpp>

#include "result.h"

namespace qwen::python {

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
