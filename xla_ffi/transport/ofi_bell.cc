#include "transport/ofi_bell.h"

#include <pthread.h>
#include <sys/epoll.h>
#include <sys/eventfd.h>
#include <unistd.h>

#include <array>
#include <cerrno>
#include <cstring>
#include <string>

namespace jaxfabric {
namespace {

constexpr uint64_t kStopNumber = 0;

Status SystemError(const char* call) {
  return Status(StatusCode::kResourceExhausted,
                std::string(call) + " failed: " + std::strerror(errno));
}

}  // namespace

StatusOr<std::unique_ptr<OfiBell>> OfiBell::Open(Doorbell* doorbell) {
  std::unique_ptr<OfiBell> bell(new OfiBell(doorbell));
  bell->epoll_ = UniqueFd(epoll_create1(EPOLL_CLOEXEC));
  if (!bell->epoll_.valid()) return SystemError("epoll_create1");
  bell->stop_ = UniqueFd(eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK));
  if (!bell->stop_.valid()) return SystemError("eventfd");
  epoll_event event = {};
  event.events = EPOLLIN;
  event.data.u64 = kStopNumber;
  if (epoll_ctl(bell->epoll_.get(), EPOLL_CTL_ADD, bell->stop_.get(), &event) !=
      0) {
    return SystemError("epoll_ctl");
  }
  bell->thread_ = std::thread([bell = bell.get()] { bell->Run(); });
  return bell;
}

OfiBell::~OfiBell() {
  if (!thread_.joinable()) return;
  const uint64_t one = 1;
  JF_CHECK(write(stop_.get(), &one, sizeof(one)) == sizeof(one));
  thread_.join();
}

StatusOr<OfiBell::Watch*> OfiBell::Add(int fd) {
  auto watch = std::make_unique<Watch>();
  watch->fd_ = fd;
  std::lock_guard<std::mutex> lock(mutex_);
  watch->number_ = next_number_++;
  epoll_event event = {};
  event.events = EPOLLONESHOT;  // nothing yet
  event.data.u64 = watch->number_;
  if (epoll_ctl(epoll_.get(), EPOLL_CTL_ADD, fd, &event) != 0) {
    return SystemError("epoll_ctl");
  }
  Watch* const result = watch.get();
  watches_[result->number_] = std::move(watch);
  return result;
}

void OfiBell::Arm(Watch* watch) {
  watch->armed_.store(true, std::memory_order_release);
  epoll_event event = {};
  event.events = EPOLLIN | EPOLLONESHOT;
  event.data.u64 = watch->number_;
  JF_CHECK(epoll_ctl(epoll_.get(), EPOLL_CTL_MOD, watch->fd_, &event) == 0);
}

void OfiBell::Remove(Watch* watch) {
  std::lock_guard<std::mutex> lock(mutex_);
  epoll_ctl(epoll_.get(), EPOLL_CTL_DEL, watch->fd_, nullptr);
  watches_.erase(watch->number_);
}

void OfiBell::Run() {
  pthread_setname_np(pthread_self(), "jaxfabric-bell");
  std::array<epoll_event, 16> events;
  for (;;) {
    const int count = epoll_wait(epoll_.get(), events.data(),
                                 static_cast<int>(events.size()), -1);
    if (count < 0 && errno == EINTR) continue;
    JF_CHECK(count >= 0);
    {
      std::lock_guard<std::mutex> lock(mutex_);
      for (int i = 0; i < count; ++i) {
        if (events[i].data.u64 == kStopNumber) return;
        const auto found = watches_.find(events[i].data.u64);
        if (found == watches_.end()) continue;  // removed meanwhile
        found->second->armed_.store(false, std::memory_order_release);
      }
    }
    doorbell_->Ring();
  }
}

}  // namespace jaxfabric
