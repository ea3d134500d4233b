#include "transport/shm_link.h"

#include <sys/socket.h>

#include <chrono>
#include <string>
#include <utility>

namespace jaxfabric {

StatusOr<ShmReceived> ShmLink::Request(ShmControlMessage request,
                                       Deadline deadline) {
  JF_ASSIGN_OR_RETURN(Pending pending, Exchange(request, deadline));
  return std::move(pending.reply);
}

StatusOr<std::shared_ptr<ShmMapping>> ShmLink::Map(const ShmAddress& target,
                                                   uint64_t key,
                                                   Deadline deadline) {
  {
    std::lock_guard<std::mutex> lock(mutex_);
    const auto found = mappings_.find(key);
    if (found != mappings_.end()) {
      if (std::shared_ptr<ShmMapping> mapping = found->second.lock()) {
        if (mapping->domain != target.domain) {
          return Status(StatusCode::kPermissionDenied,
                        "the key belongs to another Domain of the peer");
        }
        return mapping;
      }
    }
  }
  ShmControlMessage request;
  request.kind = ShmControlKind::kMapRegion;
  request.target = target;
  request.key = key;
  JF_ASSIGN_OR_RETURN(Pending pending, Exchange(request, deadline));
  return std::move(pending.mapping);
}

StatusOr<ShmLink::Pending> ShmLink::Exchange(ShmControlMessage request,
                                             Deadline deadline) {
  const int64_t start_ns = MonotonicNanoseconds();
  Pending pending;
  pending.key = request.key;
  {
    std::lock_guard<std::mutex> lock(mutex_);
    if (!failed_.ok()) return failed_;
    request.serial = next_serial_++;
    pending_.emplace(request.serial, &pending);
  }
  const Status sent = ShmSend(fd(), request, {}, deadline);
  std::unique_lock<std::mutex> lock(mutex_);
  if (sent.ok()) {
    const std::chrono::steady_clock::time_point until(
        std::chrono::nanoseconds(deadline.nanoseconds()));
    replied_.wait_until(lock, until, [&] { return pending.done; });
  }
  pending_.erase(request.serial);
  if (pending.done) {
    JF_RETURN_IF_ERROR(pending.status);
    return pending;
  }
  JF_RETURN_IF_ERROR(failed_);
  JF_RETURN_IF_ERROR(sent);
  const int64_t waited_ms = (MonotonicNanoseconds() - start_ns) / 1'000'000;
  return Status(StatusCode::kDeadlineExceeded,
                "the peer process gave no answer within " +
                    std::to_string(waited_ms) +
                    " ms; it lives, but may be stopped or starved of CPU");
}

void ShmLink::Notify(const ShmControlMessage& message) {
  // A peer that lets its socket fill up is beyond help; the connection's end
  // tells it the same, so nothing is lost.
  if (!ShmSend(fd(), message, {}, Deadline()).ok()) Shutdown();
}

void ShmLink::Deliver(ShmReceived reply) {
  std::lock_guard<std::mutex> lock(mutex_);
  const auto found = pending_.find(reply.message.serial);
  if (found == pending_.end()) return;  // its requester gave up
  Pending& pending = *found->second;
  const auto code = static_cast<StatusCode>(reply.message.code);
  if (code != StatusCode::kOk) {
    pending.status = Status(code, std::string(reply.message.Text()));
  } else if (pending.key != 0) {
    pending.status = Adopt(pending.key, reply, pending.mapping);
  } else {
    pending.reply = std::move(reply);
  }
  pending.done = true;
  replied_.notify_all();
}

// Done by the control thread, under mutex_: a kRegionGone that follows the
// reply then finds the mapping.
Status ShmLink::Adopt(uint64_t key, ShmReceived& reply,
                      std::shared_ptr<ShmMapping>& mapping) {
  auto mapped = std::make_shared<ShmMapping>();
  JF_ASSIGN_OR_RETURN(
      mapped->memory,
      SharedMemory::Attach(std::move(reply.fds[0]), reply.message.length));
  mapped->domain = reply.message.target.domain;
  std::erase_if(mappings_,
                [](const auto& entry) { return entry.second.expired(); });
  mappings_[key] = mapped;
  mapping = std::move(mapped);
  return OkStatus();
}

void ShmLink::Forget(uint64_t key) {
  std::lock_guard<std::mutex> lock(mutex_);
  const auto found = mappings_.find(key);
  if (found == mappings_.end()) return;
  if (std::shared_ptr<ShmMapping> mapping = found->second.lock()) {
    mapping->gone.store(true, std::memory_order_release);
  }
  mappings_.erase(found);
}

void ShmLink::Fail(Status why) {
  std::lock_guard<std::mutex> lock(mutex_);
  if (!failed_.ok()) return;
  failed_ = std::move(why);
  for (auto& [serial, pending] : pending_) {
    pending->status = failed_;
    pending->done = true;
  }
  pending_.clear();
  replied_.notify_all();
}

void ShmLink::Shutdown() { shutdown(fd(), SHUT_RDWR); }

}  // namespace jaxfabric
