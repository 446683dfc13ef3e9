#include "conversions.h"

#include <string>

namespace qwen::python {

namespace py = pybind11;

std::string to_text(const py::handle& text) {
  if (py::isinstance<py::bytes>(text)) return text.cast<std::string>();
  if (!py::isinstance<py::str>(text)) throw py::type_error("a text must be str or bytes");
  PyObject* bytes = PyUnicode_AsEncodedString(text.ptr(), "utf-8", "surrogatepass");
  if (bytes == nullptr) throw py::error_already_set();
  return py::reinterpret_steal<py::bytes>(bytes);
}

nlohmann::json to_json(const py::handle& value) {
  if (value.is_none()) return nullptr;
  if (py::isinstance<py::bool_>(value)) return value.cast<bool>();
  if (py::isinstance<py::str>(value)) return to_text(value);
  if (py::isinstance<py::float_>(value)) return value.cast<double>();
  if (PyIndex_Check(value.ptr()) != 0) {
    const auto integer = py::reinterpret_steal<py::object>(PyNumber_Index(value.ptr()));
    if (!integer) throw py::error_already_set();
    const int64_t number = PyLong_AsLongLong(integer.ptr());
    if (number == -1 && PyErr_Occurred() != nullptr) {
      PyErr_Clear();
      return py::str(integer)
          .cast<std::string>();  // over 64 bits: no option takes it, and the refusal shows it
    }
    return number;
  }
  if (py::isinstance<py::list>(value) || py::isinstance<py::tuple>(value)) {
    nlohmann::json list = nlohmann::json::array();
    for (const py::handle item : value) list.push_back(to_json(item));
    return list;
  }
  if (py::hasattr(value, "__float__"))
    return py::float_(py::reinterpret_borrow<py::object>(value)).cast<double>();
  throw py::type_error("an option cannot be a " +
                       py::str(py::type::of(value).attr("__name__")).cast<std::string>());
}

void raise(const Error& error) {
  PyObject* type = PyExc_RuntimeError;
  switch (error.code) {
    case ErrorCode::kInvalidArgument:
      type = PyExc_ValueError;
      break;
    case ErrorCode::kNotFound:
      type = PyExc_FileNotFoundError;
      break;
    case ErrorCode::kOutOfMemory:
      type = PyExc_MemoryError;
      break;
    case ErrorCode::kIo:
      type = PyExc_OSError;
      break;
    case ErrorCode::kCorrupt:
    case ErrorCode::kUnsupported:
    case ErrorCode::kInternal:
      break;
  }
  // A message may quote a name that is no UTF-8.
  const auto size = static_cast<py::ssize_t>(error.message.size());
  const auto message =
      py::reinterpret_steal<py::object>(PyUnicode_DecodeUTF8(error.message.data(), size, "replace"));
  if (message) PyErr_SetObject(type, message.ptr());
  throw py::error_already_set();
}

}  // namespace qwen::python
