// Outbox: what one rank has in one peer's mailbox, and what still waits to go
// there. Not thread-safe.

#ifndef JAXFABRIC_ENGINE_OUTBOX_H_
#define JAXFABRIC_ENGINE_OUTBOX_H_

#include <array>
#include <cstddef>
#include <cstdint>
#include <deque>
#include <functional>
#include <optional>
#include <string>

#include "engine/mailbox.h"
#include "engine/operation.h"
#include "engine/span_allocator.h"

namespace jaxfabric {

// A message on its way out.
struct Outgoing {
  // Writes exactly `bytes` bytes, front to back, without reading them again:
  // the memory may be the peer's.
  using Pack = std::function<void(std::byte*)>;

  uint32_t destination = 0;
  MatchKey key;
  uint64_t bytes = 0;
  int64_t run_id = 0;
  std::string label;
  Pack pack;
  OperationPtr operation;  // kept until `pack` has run
};

class Outbox {
 public:
  struct Place {
    uint32_t slot = 0;
    uint64_t offset = 0;  // in the data area
  };

  explicit Outbox(uint64_t mailbox_bytes) : spans_(mailbox_bytes) {}

  // A free slot and span, which are then in use; nothing if credit is lacking.
  std::optional<Place> Reserve(uint64_t bytes);

  // The two events after which a slot is free again, in either order: our NIC
  // does not read the source any more, and the destination not its copy.
  void Written(uint32_t slot);
  void Credit(uint64_t slots);

  // Messages that wait for credit, first come first served.
  std::deque<Outgoing>& waiting() { return waiting_; }

 private:
  struct Sent {
    uint64_t offset = 0;
    bool written = false;
    bool credited = false;
  };

  void FreeIfDone(uint32_t slot);

  uint64_t slots_used_ = 0;
  std::array<Sent, kMailboxSlots> sent_;
  SpanAllocator spans_;
  std::deque<Outgoing> waiting_;
};

}  // namespace jaxfabric

#endif  // JAXFABRIC_ENGINE_OUTBOX_H_
