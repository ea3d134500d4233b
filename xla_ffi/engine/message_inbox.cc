#include "engine/message_inbox.h"

#include <chrono>
#include <utility>

#include "base/elastic_pool.h"

namespace jaxfabric {

bool MessageInbox::Push(TransferMessage message) {
  std::lock_guard<std::mutex> lock(mutex_);
  if (closed_ || messages_.size() >= kMessagesMax ||
      bytes_ + message.text.size() > kBytesMax) {
    return false;
  }
  bytes_ += message.text.size();
  messages_.push_back(std::move(message));
  changed_.notify_one();
  StartLocked();
  return true;
}

void MessageInbox::SetCallback(Callback callback) {
  // `callback` is then the old one, destroyed after the lock is released.
  std::lock_guard<std::mutex> lock(mutex_);
  callback_.swap(callback);
  StartLocked();
}

void MessageInbox::StartLocked() {
  if (delivering_ || !callback_ || messages_.empty()) return;
  delivering_ = true;
  ElasticPool::Get().Post([self = shared_from_this()] { self->Deliver(); });
}

void MessageInbox::Deliver() {
  for (;;) {
    Callback callback;
    TransferMessage message;
    {
      std::lock_guard<std::mutex> lock(mutex_);
      if (!callback_ || messages_.empty()) {
        delivering_ = false;
        return;
      }
      callback = callback_;
      message = std::move(messages_.front());
      messages_.pop_front();
      bytes_ -= message.text.size();
    }
    callback(std::move(message));
  }
}

std::optional<TransferMessage> MessageInbox::Take(Deadline deadline) {
  const std::chrono::steady_clock::time_point until{
      std::chrono::nanoseconds(deadline.nanoseconds())};
  std::unique_lock<std::mutex> lock(mutex_);
  changed_.wait_until(lock, until,
                      [&] { return closed_ || !messages_.empty(); });
  if (messages_.empty()) return std::nullopt;
  TransferMessage message = std::move(messages_.front());
  messages_.pop_front();
  bytes_ -= message.text.size();
  return message;
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
}

}  // namespace jaxfabric
