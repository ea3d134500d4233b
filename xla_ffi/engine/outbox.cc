#include "engine/outbox.h"

#include <bit>

namespace jaxfabric {

std::optional<Outbox::Place> Outbox::Reserve(uint64_t bytes) {
  if (~slots_used_ == 0) return std::nullopt;
  const auto offset = spans_.Allocate(bytes);
  if (!offset) return std::nullopt;
  const auto slot = static_cast<uint32_t>(std::countr_one(slots_used_));
  slots_used_ |= uint64_t{1} << slot;
  sent_[slot] = {.offset = *offset, .written = false, .credited = false};
  return Place{slot, *offset};
}

void Outbox::Written(uint32_t slot) {
  sent_[slot].written = true;
  FreeIfDone(slot);
}

void Outbox::Credit(uint64_t slots) {
  // Credit for what was not sent is a peer's invention, and changes nothing.
  for (uint64_t rest = slots & slots_used_; rest != 0; rest &= rest - 1) {
    const auto slot = static_cast<uint32_t>(std::countr_zero(rest));
    sent_[slot].credited = true;
    FreeIfDone(slot);
  }
}

void Outbox::FreeIfDone(uint32_t slot) {
  const Sent& sent = sent_[slot];
  if (!sent.written || !sent.credited) return;
  spans_.Free(sent.offset);
  slots_used_ &= ~(uint64_t{1} << slot);
}

}  // namespace jaxfabric
