#include "transport/ofi_bell.h"

#include <sys/epoll.h>
#include <sys/eventfd.h>
#include <sys/timerfd.h>
#include <unistd.h>

#include <algorithm>
#include <atomic>
#include <cerrno>
#include <climits>
#include <cstring>
#include <string>

#include "base/check.h"

namespace jaxfabric {
namespace {

// Who polls again does so within a few microseconds, or within a time like that
// which it took, if a device works in its caller's thread.
constexpr int64_t kGraceMinNs = 30'000;
constexpr int64_t kGraceMaxNs = 1'000'000;

// A timer lasts for several graces, so that not each call has to set it; the
// longer calls take, the more of them. Beside short ones two are enough, and
// more would be felt by those who wait for the worker.
int64_t TimerNs(int64_t grace_ns) {
  constexpr int64_t kMost = 8;
  return grace_ns * std::clamp<int64_t>(grace_ns / kGraceMinNs, 2, kMost);
}

Status SystemError(const char* call) {
  return Status(StatusCode::kResourceExhausted,
                std::string(call) + " failed: " + std::strerror(errno));
}

epoll_event EventOf(int fd, uint32_t events) {
  epoll_event event = {};
  event.events = events;
  event.data.fd = fd;
  return event;
}

}  // namespace

StatusOr<std::unique_ptr<OfiBell>> OfiBell::Open() {
  std::unique_ptr<OfiBell> bell(new OfiBell());
  bell->epoll_ = UniqueFd(epoll_create1(EPOLL_CLOEXEC));
  if (!bell->epoll_.valid()) return SystemError("epoll_create1");
  bell->rung_ = UniqueFd(eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK));
  if (!bell->rung_.valid()) return SystemError("eventfd");
  bell->timer_ =
      UniqueFd(timerfd_create(CLOCK_MONOTONIC, TFD_CLOEXEC | TFD_NONBLOCK));
  if (!bell->timer_.valid()) return SystemError("timerfd_create");
  for (const int fd : {bell->rung_.get(), bell->timer_.get()}) {
    epoll_event event = EventOf(fd, EPOLLIN);
    if (epoll_ctl(bell->epoll_.get(), EPOLL_CTL_ADD, fd, &event) != 0) {
      return SystemError("epoll_ctl");
    }
  }
  return bell;
}

Status OfiBell::Add(int fd) {
  std::lock_guard<std::mutex> lock(mutex_);
  epoll_event event = EventOf(fd, listens_ ? uint32_t{EPOLLIN} : 0);
  if (epoll_ctl(epoll_.get(), EPOLL_CTL_ADD, fd, &event) != 0) {
    return SystemError("epoll_ctl");
  }
  fds_.push_back(fd);
  return OkStatus();
}

void OfiBell::Remove(int fd) {
  std::lock_guard<std::mutex> lock(mutex_);
  epoll_ctl(epoll_.get(), EPOLL_CTL_DEL, fd, nullptr);
  std::erase(fds_, fd);
}

void OfiBell::ListenLocked(bool listens) {
  if (listens_ == listens) return;
  listens_ = listens;
  for (const int fd : fds_) {
    epoll_event event = EventOf(fd, listens ? uint32_t{EPOLLIN} : 0);
    JF_CHECK(epoll_ctl(epoll_.get(), EPOLL_CTL_MOD, fd, &event) == 0);
  }
}

void OfiBell::SetTimer(int64_t after_ns) const {
  itimerspec when = {};
  when.it_value.tv_nsec = after_ns;
  JF_CHECK(timerfd_settime(timer_.get(), 0, &when, nullptr) == 0);
}

void OfiBell::Mute() {
  std::lock_guard<std::mutex> lock(mutex_);
  if (mutes_.fetch_add(1, std::memory_order_acq_rel) > 0) return;
  muted_ns_ = MonotonicNanoseconds();
  ListenLocked(false);
}

void OfiBell::Unmute() {
  std::lock_guard<std::mutex> lock(mutex_);
  if (mutes_.fetch_sub(1, std::memory_order_acq_rel) > 1) return;
  const int64_t now_ns = MonotonicNanoseconds();
  const int64_t grace_ns =
      std::clamp(now_ns - muted_ns_, kGraceMinNs, kGraceMaxNs);
  const int64_t after_ns = TimerNs(grace_ns);
  // That of an earlier Unmute will do if it is neither too early nor too late.
  const int64_t left_ns = timer_ns_ - now_ns;
  if (left_ns >= grace_ns && left_ns <= after_ns) return;
  timer_ns_ = now_ns + after_ns;
  SetTimer(after_ns);
}

void OfiBell::Wake() {
  const uint64_t one = 1;
  // Only a full counter is refused, and that wakes as well.
  (void)!write(rung_.get(), &one, sizeof(one));
}

void OfiBell::Wait(uint32_t seen, Deadline deadline) {
  // seq_cst on both words, as in Doorbell::Ring. Old rings are taken off by who
  // sleeps alone, and before it looks. Another may have come and looked since:
  // it needs the ring that was taken off with the old ones.
  if (words()->sleepers.fetch_add(1, std::memory_order_seq_cst) == 0) {
    uint64_t rings = 0;
    (void)!read(rung_.get(), &rings, sizeof(rings));
    if (words()->sequence.load(std::memory_order_seq_cst) != seen) Wake();
  }
  if (words()->sequence.load(std::memory_order_seq_cst) == seen) {
    constexpr int64_t kMillisecond = 1'000'000;
    const int64_t left_ns = deadline.RemainingNanoseconds();
    const int64_t left_ms =
        std::min<int64_t>(left_ns / kMillisecond + 1, INT_MAX);
    epoll_event event = {};
    const int timeout_ms = left_ns == 0 ? 0 : static_cast<int>(left_ms);
    const int count = epoll_wait(epoll_.get(), &event, 1, timeout_ms);
    if (count == 1 && event.data.fd == timer_.get()) Listen();
  }
  words()->sleepers.fetch_sub(1, std::memory_order_seq_cst);
}

void OfiBell::Listen() {
  uint64_t expirations = 0;
  // None if it was set anew meanwhile: then somebody polls, or just did.
  if (read(timer_.get(), &expirations, sizeof(expirations)) < 0) return;
  std::lock_guard<std::mutex> lock(mutex_);
  if (!muted()) ListenLocked(true);
}

}  // namespace jaxfabric
