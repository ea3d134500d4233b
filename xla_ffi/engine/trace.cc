#include "engine/trace.h"

#include <algorithm>
#include <utility>

#include "base/deadline.h"

namespace jaxfabric {

bool Trace::Start(size_t events_max) {
  std::lock_guard<std::mutex> lock(mutex_);
  if (on_.load(std::memory_order_relaxed)) return false;
  events_max_ = std::max<size_t>(1, events_max);
  oldest_ = 0;
  dropped_ = 0;
  begin_ns_ = MonotonicNanoseconds();
  on_.store(true, std::memory_order_relaxed);
  return true;
}

TraceRecording Trace::Stop() {
  TraceRecording recording;
  std::lock_guard<std::mutex> lock(mutex_);
  if (!on_.load(std::memory_order_relaxed)) return recording;
  on_.store(false, std::memory_order_relaxed);
  recording.begin_ns = begin_ns_;
  recording.end_ns = MonotonicNanoseconds();
  recording.dropped = dropped_;
  recording.events = std::exchange(ring_, {});
  std::rotate(recording.events.begin(),
              recording.events.begin() + static_cast<ptrdiff_t>(oldest_),
              recording.events.end());
  for (auto& [span, event] : open_) {
    recording.events.push_back(std::move(event));
  }
  open_.clear();
  return recording;
}

uint64_t Trace::Add(TraceEvent event) {
  std::lock_guard<std::mutex> lock(mutex_);
  if (!on_.load(std::memory_order_relaxed)) return 0;
  if (open_.size() == kOpenMax) {
    ++dropped_;
    return 0;
  }
  event.label.resize(std::min(event.label.size(), kLabelBytesMax));
  event.span = next_span_++;
  event.begin_ns = MonotonicNanoseconds();
  const uint64_t span = event.span;
  open_.emplace(span, std::move(event));
  return span;
}

void Trace::End(uint64_t span, StatusCode status) {
  if (span == 0) return;
  std::lock_guard<std::mutex> lock(mutex_);
  auto node = open_.extract(span);
  if (!node) return;
  node.mapped().status = status;
  node.mapped().end_ns = MonotonicNanoseconds();
  KeepLocked(std::move(node.mapped()));
}

void Trace::EndAs(uint64_t span, TraceEvent event) {
  std::lock_guard<std::mutex> lock(mutex_);
  auto node = open_.extract(span);
  if (!node) return;
  event.label = std::move(node.mapped().label);
  event.span = span;
  event.parent = node.mapped().parent;
  event.begin_ns = node.mapped().begin_ns;
  event.end_ns = MonotonicNanoseconds();
  KeepLocked(std::move(event));
}

void Trace::KeepLocked(TraceEvent event) {
  if (ring_.size() < events_max_) {
    ring_.push_back(std::move(event));
    return;
  }
  ring_[oldest_] = std::move(event);
  oldest_ = (oldest_ + 1) % events_max_;
  ++dropped_;
}

}  // namespace jaxfabric
