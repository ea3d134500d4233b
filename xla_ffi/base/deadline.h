// Deadline: the absolute, monotonic time by which an operation must end.

#ifndef JAXFABRIC_BASE_DEADLINE_H_
#define JAXFABRIC_BASE_DEADLINE_H_

#include <algorithm>
#include <chrono>
#include <cstdint>
#include <limits>

namespace jaxfabric {

inline int64_t MonotonicNanoseconds() {
  return std::chrono::duration_cast<std::chrono::nanoseconds>(
             std::chrono::steady_clock::now().time_since_epoch())
      .count();
}

class Deadline {
 public:
  // Already expired.
  Deadline() = default;

  static Deadline AfterNanoseconds(int64_t duration_ns) {
    return AfterNanoseconds(duration_ns, MonotonicNanoseconds());
  }
  static Deadline AfterNanoseconds(int64_t duration_ns, int64_t now_ns) {
    const int64_t room_ns = std::numeric_limits<int64_t>::max() - now_ns;
    return Deadline(now_ns + std::min(duration_ns, room_ns));
  }
  static Deadline AfterSeconds(double seconds) {
    return AfterSeconds(seconds, MonotonicNanoseconds());
  }
  static Deadline AfterSeconds(double seconds, int64_t now_ns) {
    constexpr double kLargestSeconds = 1e9;  // keeps the conversion exact
    return AfterNanoseconds(
        static_cast<int64_t>(std::min(seconds, kLargestSeconds) * 1e9), now_ns);
  }

  int64_t nanoseconds() const { return at_ns_; }
  bool Expired() const { return MonotonicNanoseconds() >= at_ns_; }
  int64_t RemainingNanoseconds() const {
    return std::max<int64_t>(0, at_ns_ - MonotonicNanoseconds());
  }
  bool operator<(const Deadline& other) const { return at_ns_ < other.at_ns_; }

 private:
  explicit Deadline(int64_t at_ns) : at_ns_(at_ns) {}
  int64_t at_ns_ = 0;
};

}  // namespace jaxfabric

#endif  // JAXFABRIC_BASE_DEADLINE_H_
