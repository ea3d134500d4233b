// MessageInbox: the messages that peers sent, until somebody takes them.

#ifndef JAXFABRIC_ENGINE_MESSAGE_INBOX_H_
#define JAXFABRIC_ENGINE_MESSAGE_INBOX_H_

#include <condition_variable>
#include <cstdint>
#include <deque>
#include <functional>
#include <map>
#include <memory>
#include <mutex>
#include <optional>
#include <string>
#include <vector>

#include "base/deadline.h"

namespace jaxfabric {

struct TransferMessage {
  uint32_t peer = 0;
  std::string text;
  // Above 0: this is no message, but says that so many of the peer's were lost
  // here, since nobody took those before.
  uint64_t dropped = 0;
};

class MessageInbox : public std::enable_shared_from_this<MessageInbox> {
 public:
  using Callback = std::function<void(TransferMessage)>;

  // Messages that nobody takes, at most. Beyond it a peer floods us.
  static constexpr size_t kMessagesMax = 1u << 16;
  static constexpr uint64_t kBytesMax = uint64_t{1} << 30;

  static constexpr size_t kWaitingMax = 1024;

  // False if it is full: the message is lost, which the receiver hears in its
  // place.
  bool Push(TransferMessage message);

  // From now on messages go to `callback`, one at a time, in order, on the
  // CallbackQueue; nullptr keeps them again.
  void SetCallback(Callback callback);
  // The next message; nothing at the deadline, and once closed.
  std::optional<TransferMessage> Take(Deadline deadline);
  // Calls once, on the CallbackQueue, when there is something to take, or the
  // inbox is closed; soon, if that is so already, or if many others wait.
  void OnReady(std::function<void()> callback);
  bool closed() const;
  // Messages so far: all, and those of them that somebody has taken, and whose
  // callback is over. Who hears otherwise that a peer is gone may wait for what
  // it said before.
  uint64_t arrived() const;
  uint64_t handled() const;
  // Wakes who waits. A callback may still be under way.
  void Close();

 private:
  // Starts handing messages to the callback, if it is not under way. Needs
  // mutex_.
  void StartLocked();
  void Deliver();
  // Take without waiting. Needs mutex_.
  std::optional<TransferMessage> TakeLocked();
  bool EmptyLocked() const { return messages_.empty() && dropped_.empty(); }
  void WakeLocked();

  mutable std::mutex mutex_;
  std::condition_variable changed_;
  std::deque<TransferMessage> messages_;  // guarded by mutex_
  uint64_t bytes_ = 0;                    // guarded by mutex_
  // Of messages that came after all of messages_, by peer; guarded by mutex_.
  std::map<uint32_t, uint64_t> dropped_;
  Callback callback_;                           // guarded by mutex_
  std::vector<std::function<void()>> waiting_;  // guarded by mutex_
  bool delivering_ = false;                     // guarded by mutex_
  uint64_t taken_ = 0;                          // guarded by mutex_
  uint64_t in_callback_ = 0;                    // guarded by mutex_
  bool closed_ = false;                         // guarded by mutex_
};

}  // namespace jaxfabric

#endif  // JAXFABRIC_ENGINE_MESSAGE_INBOX_H_
