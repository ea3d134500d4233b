#include "engine/transfer_future.h"

#include <chrono>
#include <utility>

#include "engine/callback_queue.h"

namespace jaxfabric {

std::string OperationLabel::ToString() const {
  std::string label = text;
  if (text.empty()) {
    label = "single write of " + std::to_string(bytes) + " bytes";
    if (id) label += " under id " + std::to_string(*id);
  }
  if (peer != nullptr) label += " to " + *peer;
  return label;
}

std::optional<Status> TransferFuture::Wait(Deadline deadline) const {
  const std::chrono::steady_clock::time_point until{
      std::chrono::nanoseconds(deadline.nanoseconds())};
  std::unique_lock<std::mutex> lock(mutex_);
  const bool met = changed_.wait_until(
      lock, until, [&] { return done_.load(std::memory_order_relaxed); });
  if (!met) return std::nullopt;
  return status_;
}

uint32_t TransferFuture::peer() const {
  std::lock_guard<std::mutex> lock(mutex_);
  return peer_;
}

void TransferFuture::OnDone(Callback callback) {
  Status status;
  {
    std::lock_guard<std::mutex> lock(mutex_);
    if (!done_.load(std::memory_order_relaxed)) {
      callbacks_.push_back(std::move(callback));
      return;
    }
    status = status_;
  }
  CallbackQueue::Get().Post([callback = std::move(callback),
                             status = std::move(status)] { callback(status); });
}

void TransferFuture::Finish(const Status& status, uint32_t peer) {
  std::vector<Callback> callbacks;
  {
    std::lock_guard<std::mutex> lock(mutex_);
    if (done_.load(std::memory_order_relaxed)) return;
    status_ = status;
    peer_ = peer;
    callbacks.swap(callbacks_);
    done_.store(true, std::memory_order_release);
    changed_.notify_all();
  }
  for (Callback& callback : callbacks) {
    CallbackQueue::Get().Post(
        [callback = std::move(callback), status] { callback(status); });
  }
}

}  // namespace jaxfabric
