#include "cli_output.h"

#include <sys/stat.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <cstdio>
#include <cstring>

namespace qwen::cli {
namespace {

bool shares_a_line_with_messages() {
  struct stat out{};
  struct stat err{};
  return isatty(STDOUT_FILENO) != 0 || (fstat(STDOUT_FILENO, &out) == 0 && fstat(STDERR_FILENO, &err) == 0 &&
                                        out.st_dev == err.st_dev && out.st_ino == err.st_ino);
}

}  // namespace

bool Output::write(std::string_view text) {
  if (!text.empty()) {
    line_open_ = text.back() != '\n';
  }
  while (!text.empty() && error_ == 0) {
    const ssize_t written = ::write(STDOUT_FILENO, text.data(), text.size());
    if (written >= 0) {
      text.remove_prefix(static_cast<size_t>(written));
    } else if (errno != EINTR) {
      error_ = errno;
    }
  }
  return error_ == 0;
}

bool Output::write_json(const nlohmann::ordered_json& value, int indent) {
  return write(value.dump(indent, ' ', false, nlohmann::json::error_handler_t::replace) + "\n");
}

void Output::end_line() {
  if (line_open_ && shares_a_line_with_messages()) {
    write("\n");
  }
}

bool Output::closed() const { return error_ == EPIPE; }

Status Output::status() const {
  if (error_ == 0 || closed()) {
    return ok_status();
  }
  return Error{ErrorCode::kIo, std::string("cannot write to standard output: ") + std::strerror(error_)};
}

void print_line(const std::string& line) {
  std::string one_line = line;
  std::replace(one_line.begin(), one_line.end(), '\n', ' ');
  std::fprintf(stderr, "%s\n", one_line.c_str());
}

void print_warning(const std::string& message) { print_line("warning: " + message); }

void print_error(const Error& error) { print_line("error: " + error.message); }

int exit_status(const Error& error) { return error.code == ErrorCode::kInvalidArgument ? 2 : 1; }

}  // namespace qwen::cli
