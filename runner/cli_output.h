// Standard output and error of the command line: the answer alone goes to the one, one line a message to the
// other.
#pragma once

#include <nlohmann/json.hpp>
#include <string>
#include <string_view>

#include "result.h"

namespace qwen::cli {

// Writes to standard output, unbuffered, so that an answer appears as it comes. Not thread-safe.
// REQUIRES: SIGPIPE is ignored.
class Output {
 public:
  // Returns false, then and ever after, once the output cannot be written.
  bool write(std::string_view text);
  // One JSON value and a line's end; invalid UTF-8 in it is replaced.
  bool write_json(const nlohmann::ordered_json& value, int indent = -1);
  // Ends an unfinished line where what follows would stand on it: on a terminal, or where standard error goes
  // to the same file. Anywhere else the output stays the answer, byte for byte.
  void end_line();

  // Whether the reader has gone (`| head`), which is no failure.
  bool closed() const;
  // Error: kIo, when writing failed for any other reason.
  Status status() const;

 private:
  int error_ = 0;  // errno of the write that failed
  bool line_open_ = false;
};

// "warning: " or "error: " and the message on standard error, as one line.
void print_warning(const std::string& message);
void print_error(const Error& error);
void print_line(const std::string& line);  // on standard error

// 2 for what the caller must write differently, else 1.
int exit_status(const Error& error);
inline constexpr int kInterruptedStatus = 130;  // what shells report for a process that SIGINT ended

}  // namespace qwen::cli
