// Trace: what one rank did, and when, in bounded memory.
//
// Off by default, and then it costs one relaxed load wherever something could
// be recorded. While it is on, spans that are over lie in a ring, of which the
// oldest give way; those under way are kept beside it, so that a recording of a
// program that hangs shows what it hangs in. Thread-safe.

#ifndef JAXFABRIC_ENGINE_TRACE_H_
#define JAXFABRIC_ENGINE_TRACE_H_

#include <atomic>
#include <cstddef>
#include <cstdint>
#include <mutex>
#include <optional>
#include <string>
#include <unordered_map>
#include <vector>

#include "base/status.h"

namespace jaxfabric {

// One thing that took time; `begin_ns` and `end_ns` are monotonic.
struct TraceEvent {
  std::string name;     // what kind of thing: "dispatch", "write"
  std::string label;    // which one, as error texts have it
  uint64_t span = 0;    // its number; never used again
  uint64_t parent = 0;  // the span that it is part of, or 0
  int64_t begin_ns = 0;
  int64_t end_ns = 0;  // 0: was not over when the recording was
  std::optional<uint32_t> peer;
  std::optional<uint32_t> nic;  // index of the Domain
  std::optional<uint32_t> id;   // what it is counted under
  uint64_t bytes = 0;
  StatusCode status = StatusCode::kOk;
};

struct TraceRecording {
  std::vector<TraceEvent> events;  // those under way last
  uint64_t dropped = 0;            // that did not fit
  int64_t begin_ns = 0;
  int64_t end_ns = 0;
};

class Trace {
 public:
  // So many spans may be under way; more than all queues together hold.
  static constexpr size_t kOpenMax = size_t{1} << 16;
  // A label of a user's is as long as he likes.
  static constexpr size_t kLabelBytesMax = 120;

  bool on() const { return on_.load(std::memory_order_relaxed); }

  // Keeps up to `events_max` spans that are over. False if it is on already.
  bool Start(size_t events_max);
  // Empty if it was not on.
  TraceRecording Stop();

  // The span's number, or 0 where nothing is recorded. `describe` returns a
  // TraceEvent, and is only called where it is.
  template <typename Describe>
  uint64_t Begin(const Describe& describe) {
    return on() ? Add(describe()) : 0;
  }
  // Of what nobody began, or has ended already, nothing is recorded.
  void End(uint64_t span, StatusCode status = StatusCode::kOk);
  // The same where more is known than at the beginning: all but the label, the
  // numbers and the times is taken from what `describe` returns.
  template <typename Describe>
  void End(uint64_t span, const Describe& describe) {
    if (span != 0) EndAs(span, describe());
  }
  // Something that took no time.
  template <typename Describe>
  void Mark(const Describe& describe) {
    End(Begin(describe));
  }

 private:
  uint64_t Add(TraceEvent event);
  void EndAs(uint64_t span, TraceEvent event);
  void KeepLocked(TraceEvent event);

  std::atomic<bool> on_{false};
  std::mutex mutex_;  // guards what follows
  uint64_t next_span_ = 1;
  size_t events_max_ = 0;
  size_t oldest_ = 0;  // in ring_, once it is full
  std::vector<TraceEvent> ring_;
  std::unordered_map<uint64_t, TraceEvent> open_;  // by span
  uint64_t dropped_ = 0;
  int64_t begin_ns_ = 0;
};

// Records a block of code.
class TraceScope {
 public:
  template <typename Describe>
  TraceScope(Trace& trace, const Describe& describe)
      : trace_(trace), span_(trace.Begin(describe)) {}
  ~TraceScope() { trace_.End(span_); }
  TraceScope(const TraceScope&) = delete;
  TraceScope& operator=(const TraceScope&) = delete;

 private:
  Trace& trace_;
  const uint64_t span_;
};

}  // namespace jaxfabric

#endif  // JAXFABRIC_ENGINE_TRACE_H_
