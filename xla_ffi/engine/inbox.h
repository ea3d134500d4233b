// Inbox: what one peer has in this rank's mailbox for it. Not thread-safe.

#ifndef JAXFABRIC_ENGINE_INBOX_H_
#define JAXFABRIC_ENGINE_INBOX_H_

#include <array>
#include <cstdint>

#include "base/status.h"
#include "engine/mailbox.h"

namespace jaxfabric {

class Inbox {
 public:
  explicit Inbox(uint64_t mailbox_bytes) : mailbox_bytes_(mailbox_bytes) {}

  // `units` of a transfer came under `slot`; true if they complete a message.
  // kDataLoss if no honest peer could have sent them.
  StatusOr<bool> Count(uint32_t slot, uint64_t units);
  // The message in `slot` goes to a reader, who will give it back.
  void Hold(uint32_t slot);
  // The slot is free for its owner again. True if credits should travel now,
  // and not wait for a message going back.
  bool GiveBack(uint32_t slot, uint64_t bytes);

  // The peer waits for credit. True if there is some.
  bool Want();
  // Takes all credits, to be sent; zero if there are none.
  uint64_t TakeCredits();

 private:
  const uint64_t mailbox_bytes_;
  std::array<uint64_t, kMailboxSlots> units_{};
  uint64_t held_ = 0;
  uint64_t credits_ = 0;
  uint64_t credit_bytes_ = 0;
  bool wanted_ = false;
};

}  // namespace jaxfabric

#endif  // JAXFABRIC_ENGINE_INBOX_H_
