#include "engine/inbox.h"

#include <bit>
#include <utility>

#include "engine/immediate.h"

namespace jaxfabric {
namespace {

// Credits ride on messages going back; they travel alone when this many slots,
// or this share of the data area, would otherwise stay with us.
constexpr int kSlotsKeptMax = kMailboxSlots / 4;
constexpr uint64_t kBytesKeptShare = 4;

}  // namespace

StatusOr<bool> Inbox::Count(uint32_t slot, uint64_t units) {
  if (slot >= kMailboxSlots) {
    return Status(StatusCode::kDataLoss, "a slot that no mailbox has");
  }
  units_[slot] += units;
  if (units_[slot] < kTransferUnits) return false;
  if (units_[slot] > kTransferUnits || (held_ >> slot & 1) != 0) {
    return Status(StatusCode::kDataLoss,
                  "a message into a slot that is in use");
  }
  units_[slot] = 0;
  return true;
}

void Inbox::Hold(uint32_t slot) { held_ |= uint64_t{1} << slot; }

bool Inbox::GiveBack(uint32_t slot, uint64_t bytes) {
  held_ &= ~(uint64_t{1} << slot);
  credits_ |= uint64_t{1} << slot;
  credit_bytes_ += bytes;
  return wanted_ || std::popcount(credits_) >= kSlotsKeptMax ||
         credit_bytes_ >= mailbox_bytes_ / kBytesKeptShare;
}

bool Inbox::Want() {
  wanted_ = true;
  return credits_ != 0;
}

uint64_t Inbox::TakeCredits() {
  wanted_ = false;
  credit_bytes_ = 0;
  return std::exchange(credits_, 0);
}

}  // namespace jaxfabric
