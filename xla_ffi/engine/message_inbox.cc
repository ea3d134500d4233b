#include "engine/message_inbox.h"

#include <chrono>
#include <utility>

#include "engine/callback_queue.h"

namespace jaxfabric {

bool MessageInbox::Push(TransferMessage message) {
  std::lock_guard<std::mutex> lock(mutex_);
  if (closed_) return false;
  const bool fits = messages_.size() < kMessagesMax &&
                    bytes_ + message.text.size() <= kBytesMax;
  if (fits) {
    for (const auto& [peer, count] : std::exchange(dropped_, {})) {
      messages_.push_back({.peer = peer, .text = "", .dropped = count});
    }
    bytes_ += message.text.size();
    messages_.push_back(std::move(message));
  } else {
    ++dropped_[message.peer];
  }
  changed_.notify_one();
  WakeLocked();
  StartLocked();
  return fits;
}

void MessageInbox::SetCallback(Callback callback) {
  // `callback` is then the old one, destroyed after the lock is released.
  std::lock_guard<std::mutex> lock(mutex_);
  callback_.swap(callback);
  StartLocked();
}

void MessageInbox::StartLocked() {
  if (delivering_ || !callback_ || EmptyLocked()) return;
  delivering_ = true;
  CallbackQueue::Get().Post([self = shared_from_this()] { self->Deliver(); });
}

void MessageInbox::Deliver() {
  Callback callback;  // destroyed after the lock is released
  std::optional<TransferMessage> message;
  {
    std::lock_guard<std::mutex> lock(mutex_);
    if (callback_) message = TakeLocked();
    in_callback_ = message ? 1 : 0;
    callback = callback_;
  }
  if (message) callback(*std::move(message));
  // The next one waits its turn among other callbacks.
  std::lock_guard<std::mutex> lock(mutex_);
  delivering_ = false;
  in_callback_ = 0;
  StartLocked();
}

std::optional<TransferMessage> MessageInbox::TakeLocked() {
  TransferMessage message;
  if (!messages_.empty()) {
    message = std::move(messages_.front());
    messages_.pop_front();
    bytes_ -= message.text.size();
  } else if (!dropped_.empty()) {
    message.peer = dropped_.begin()->first;
    message.dropped = dropped_.begin()->second;
    dropped_.erase(dropped_.begin());
  } else {
    return std::nullopt;
  }
  ++taken_;
  return message;
}

std::optional<TransferMessage> MessageInbox::Take(Deadline deadline) {
  const std::chrono::steady_clock::time_point until{
      std::chrono::nanoseconds(deadline.nanoseconds())};
  std::unique_lock<std::mutex> lock(mutex_);
  changed_.wait_until(lock, until, [&] { return closed_ || !EmptyLocked(); });
  return TakeLocked();
}

void MessageInbox::OnReady(std::function<void()> callback) {
  std::lock_guard<std::mutex> lock(mutex_);
  // Those who gave up cannot say so; the others ask again.
  if (waiting_.size() >= kWaitingMax) WakeLocked();
  waiting_.push_back(std::move(callback));
  if (closed_ || !EmptyLocked()) WakeLocked();
}

void MessageInbox::WakeLocked() {
  for (std::function<void()>& callback : std::exchange(waiting_, {})) {
    CallbackQueue::Get().Post(std::move(callback));
  }
}

uint64_t MessageInbox::arrived() const {
  std::lock_guard<std::mutex> lock(mutex_);
  return taken_ + messages_.size() + dropped_.size();
}

uint64_t MessageInbox::handled() const {
  std::lock_guard<std::mutex> lock(mutex_);
  return taken_ - in_callback_;
}

bool MessageInbox::closed() const {
  std::lock_guard<std::mutex> lock(mutex_);
  return closed_;
}

void MessageInbox::Close() {
  Callback dropped;  // destroyed after the lock is released
  std::lock_guard<std::mutex> lock(mutex_);
  dropped.swap(callback_);
  closed_ = true;
  changed_.notify_all();
  WakeLocked();
}

}  // namespace jaxfabric
