// Outcome of a launch: no exceptions cross the native boundary.
#pragma once

#include <cstdarg>
#include <cstdint>
#include <cstdio>

namespace zsvr {

enum class StatusCode : int32_t {
  kOk = 0,
  kInvalidArgument = 1,  // becomes ValueError
  kUnsupported = 2,      // becomes RuntimeError
};

struct Status {
  StatusCode code = StatusCode::kOk;
  char message[240] = {};

  bool ok() const { return code == StatusCode::kOk; }
};

inline Status ok_status() { return {}; }

__attribute__((format(printf, 2, 3))) inline Status make_status(StatusCode code, const char* format,
                                                                ...) {
  Status status;
  status.code = code;
  va_list arguments;
  va_start(arguments, format);
  std::vsnprintf(status.message, sizeof(status.message), format, arguments);
  va_end(arguments);
  return status;
}

}  // namespace zsvr
