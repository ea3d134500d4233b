// Status and StatusOr: how every layer below Python reports failure.
//
// Codes equal XLA_FFI_Error_Code, so that a Status becomes an ffi::Error by a
// cast. A message says operation, peer, progress, elapsed time and the way out;
// each layer adds what it knows on the way up with `Status::Annotate`.

#ifndef JAXFABRIC_BASE_STATUS_H_
#define JAXFABRIC_BASE_STATUS_H_

#include <optional>
#include <string>
#include <string_view>
#include <utility>

#include "base/check.h"

namespace jaxfabric {

enum class StatusCode : int {
  kOk = 0,
  kCancelled = 1,
  kUnknown = 2,
  kInvalidArgument = 3,
  kDeadlineExceeded = 4,
  kNotFound = 5,
  kAlreadyExists = 6,
  kPermissionDenied = 7,
  kResourceExhausted = 8,
  kFailedPrecondition = 9,
  kAborted = 10,
  kOutOfRange = 11,
  kUnimplemented = 12,
  kInternal = 13,
  kUnavailable = 14,
  kDataLoss = 15,
  kUnauthenticated = 16,
};

class [[nodiscard]] Status {
 public:
  Status() = default;
  Status(StatusCode code, std::string message)
      : code_(code), message_(std::move(message)) {}

  bool ok() const { return code_ == StatusCode::kOk; }
  StatusCode code() const { return code_; }
  const std::string& message() const { return message_; }

  // The same failure with `context` and ": " before its message.
  Status Annotate(std::string_view context) const {
    if (ok()) return *this;
    return Status(code_, std::string(context) + ": " + message_);
  }

 private:
  StatusCode code_ = StatusCode::kOk;
  std::string message_;
};

inline Status OkStatus() { return Status(); }

// A value, or the reason why there is none.
template <typename T>
class [[nodiscard]] StatusOr {
 public:
  StatusOr(Status status) : status_(std::move(status)) {  // NOLINT: implicit
    JF_CHECK(!status_.ok());
  }
  StatusOr(T value) : value_(std::move(value)) {}  // NOLINT: implicit

  bool ok() const { return status_.ok(); }
  const Status& status() const { return status_; }

  T& operator*() & {
    JF_CHECK(ok());
    return *value_;
  }
  const T& operator*() const& {
    JF_CHECK(ok());
    return *value_;
  }
  T&& operator*() && {
    JF_CHECK(ok());
    return *std::move(value_);
  }
  T* operator->() { return &**this; }
  const T* operator->() const { return &**this; }

 private:
  Status status_;
  std::optional<T> value_;
};

}  // namespace jaxfabric

#define JF_RETURN_IF_ERROR(expr)                                 \
  do {                                                           \
    if (::jaxfabric::Status jf_status = (expr); !jf_status.ok()) \
      return jf_status;                                          \
  } while (false)

#define JF_CONCAT_INNER(a, b) a##b
#define JF_CONCAT(a, b) JF_CONCAT_INNER(a, b)
#define JF_ASSIGN_OR_RETURN(lhs, expr) \
  JF_ASSIGN_OR_RETURN_IMPL(JF_CONCAT(jf_result_, __LINE__), lhs, expr)
#define JF_ASSIGN_OR_RETURN_IMPL(result, lhs, expr) \
  auto result = (expr);                             \
  if (!result.ok()) return result.status();         \
  lhs = *std::move(result)

#endif  // JAXFABRIC_BASE_STATUS_H_
