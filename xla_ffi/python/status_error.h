// StatusError: how a Status becomes a Python exception.

#ifndef JAXFABRIC_PYTHON_STATUS_ERROR_H_
#define JAXFABRIC_PYTHON_STATUS_ERROR_H_

#include <exception>
#include <string>
#include <utility>

#include "base/status.h"

namespace jaxfabric {

// Becomes _native.StatusError; jaxfabric/_errors.py turns it into the
// documented exceptions by the code in front of the text.
class StatusError : public std::exception {
 public:
  explicit StatusError(const Status& status)
      : text_(std::to_string(static_cast<int>(status.code())) + " " +
              status.message()) {}
  const char* what() const noexcept override { return text_.c_str(); }

 private:
  std::string text_;
};

inline void Check(const Status& status) {
  if (!status.ok()) throw StatusError(status);
}

template <typename T>
T Value(StatusOr<T> result) {
  Check(result.status());
  return *std::move(result);
}

}  // namespace jaxfabric

#endif  // JAXFABRIC_PYTHON_STATUS_ERROR_H_
