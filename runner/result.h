// Result<T>: a value or an Error, the one way a function of this project fails.
//
// An Error has a code (what kind of failure, from which the exit status and the Python exception follow) and
// a message: one line that says what was wrong and what to do. Nothing here throws; nothing here is shared
// between threads unless the caller shares it.
#pragma once

#include <string>
#include <utility>
#include <variant>

namespace qwen {

enum class ErrorCode {
  kInvalidArgument,  // the caller asked for something that cannot be: exit status 2, ValueError
  kNotFound,         // a file or folder is not there: exit status 1, FileNotFoundError
  kCorrupt,          // a file is not what its digest or format says: exit status 1, RuntimeError
  kUnsupported,      // a valid program that this build or machine cannot run: exit status 1, RuntimeError
  kOutOfMemory,      // exit status 1, MemoryError
  kIo,               // the operating system refused: exit status 1, OSError
  kInternal,         // a broken invariant of ours or of a dependency: exit status 1, RuntimeError
};

struct Error {
  ErrorCode code = ErrorCode::kInternal;
  std::string message;
};

template <typename T>
class [[nodiscard]] Result {
 public:
  // Implicit on purpose: `return value;` and `return Error{...};` both read well.
  Result(T value) : state_(std::in_place_index<0>, std::move(value)) {}
  Result(Error error) : state_(std::in_place_index<1>, std::move(error)) {}

  bool ok() const { return state_.index() == 0; }
  explicit operator bool() const { return ok(); }

  // REQUIRES: ok().
  T& value() & { return std::get<0>(state_); }
  const T& value() const& { return std::get<0>(state_); }
  T&& value() && { return std::get<0>(std::move(state_)); }
  T& operator*() { return value(); }
  const T& operator*() const { return value(); }
  T* operator->() { return &value(); }
  const T* operator->() const { return &value(); }

  // REQUIRES: !ok().
  const Error& error() const { return std::get<1>(state_); }

 private:
  std::variant<T, Error> state_;
};

struct Ok {};
using Status = Result<Ok>;
inline Status ok_status() { return Ok{}; }

}  // namespace qwen

#define QWEN_CONCAT_INNER(a, b) a##b
#define QWEN_CONCAT(a, b) QWEN_CONCAT_INNER(a, b)

// Evaluates `expr` (a Result or Status); on failure returns its error from the enclosing function.
#define QWEN_RETURN_IF_ERROR(expr) \
  do {                             \
    auto qwen_status = (expr);     \
    if (!qwen_status.ok()) {       \
      return qwen_status.error();  \
    }                              \
  } while (false)

// `QWEN_ASSIGN_OR_RETURN(auto x, f());` moves f()'s value into `x`, or returns its error.
#define QWEN_ASSIGN_OR_RETURN(lhs, expr) \
  QWEN_ASSIGN_OR_RETURN_IMPL(QWEN_CONCAT(qwen_result_, __LINE__), lhs, expr)
#define QWEN_ASSIGN_OR_RETURN_IMPL(result, lhs, expr) \
  auto result = (expr);                               \
  if (!result.ok()) {                                 \
    return result.error();                            \
  }                                                   \
  lhs = std::move(result).value()
