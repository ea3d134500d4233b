// MessageInbox: the messages that peers sent, until somebody takes them.

#ifndef JAXFABRIC_ENGINE_MESSAGE_INBOX_H_
#define JAXFABRIC_ENGINE_MESSAGE_INBOX_H_

#include <condition_variable>
#include <cstdint>
#include <deque>
#include <functional>
#include <memory>
#include <mutex>
#include <optional>
#include <string>

#include "base/deadline.h"

namespace jaxfabric {

struct TransferMessage {
  uint32_t peer = 0;
  std::string text;
};

class MessageInbox : public std::enable_shared_from_this<MessageInbox> {
 public:
  using Callback = std::function<void(TransferMessage)>;

  // Messages that nobody takes, at most. Beyond it a peer floods us.
  static constexpr size_t kMessagesMax = 1u << 16;
  static constexpr uint64_t kBytesMax = uint64_t{1} << 30;

  // False if it is full: the message is lost.
  bool Push(TransferMessage message);

  // From now on messages go to `callback`, one at a time, in order, on the
  // ElasticPool; nullptr keeps them again.
  void SetCallback(Callback callback);
  // The next message; nothing at the deadline, and once closed.
  std::optional<TransferMessage> Take(Deadline deadline);
  bool closed() const;
  // Wakes who waits. A callback may still be under way.
  void Close();

 private:
  // Starts handing messages to the callback, if it is not under way. Needs
  // mutex_.
  void StartLocked();
  void Deliver();

  mutable std::mutex mutex_;
  std::condition_variable changed_;
  std::deque<TransferMessage> messages_;  // guarded by mutex_
  uint64_t bytes_ = 0;                    // guarded by mutex_
  Callback callback_;                     // guarded by mutex_
  bool delivering_ = false;               // guarded by mutex_
  bool closed_ = false;                   // guarded by mutex_
};

}  // namespace jaxfabric

#endif  // JAXFABRIC_ENGINE_MESSAGE_INBOX_H_
