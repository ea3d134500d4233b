// The protocol of outbox and inbox: both ends, with the network between them
// played by a generator that reorders what a network may reorder.

#include "engine/mailbox.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <cstring>
#include <map>
#include <vector>

#include "engine/immediate.h"
#include "engine/inbox.h"
#include "engine/outbox.h"
#include "tests/cpp/seeded.h"

namespace jaxfabric {
namespace {

TEST(MailboxTest, HeapPartsAreDisjointAndInRange) {
  for (const uint32_t ranks : {1u, 2u, 7u}) {
    for (const uint64_t bytes : {uint64_t{1}, uint64_t{4096}, uint64_t{5000}}) {
      const HeapLayout heap = {ranks, bytes, /*window_bytes=*/100};
      uint64_t end = 0;
      for (uint32_t source = 0; source < ranks; ++source) {
        EXPECT_GE(heap.Descriptor(source, 0), end);
        EXPECT_EQ(heap.Descriptor(source, 0) % kCacheLineBytes, 0u);
        EXPECT_EQ(heap.Data(source), heap.Descriptor(source, kMailboxSlots));
        end = heap.Data(source) + bytes;
      }
      EXPECT_GE(heap.Windows(), end);
      EXPECT_EQ(heap.TotalBytes(), heap.Windows() + 100);
    }
  }
}

// One direction of one pair. Everything under way is picked at random.
class Pair {
 public:
  Pair(Seeded& seeded, uint64_t mailbox_bytes)
      : seeded_(seeded),
        mailbox_bytes_(mailbox_bytes),
        outbox_(mailbox_bytes),
        inbox_(mailbox_bytes) {}

  void Submit(uint64_t bytes) {
    if (waiting_.empty() && Send(bytes)) return;
    if (waiting_.empty()) wants_under_way_ += 1;
    waiting_.push_back(bytes);
  }

  bool idle() const {
    return waiting_.empty() && arriving_.empty() && unwritten_.empty() &&
           unread_.empty() && credits_.empty() && wants_under_way_ == 0;
  }
  // Nothing moves any more, yet somebody waits.
  bool stuck() const { return !waiting_.empty() && !moving(); }
  size_t sent() const { return sent_; }
  size_t read() const { return read_; }

  // Lets one thing happen.
  void Step() {
    std::vector<void (Pair::*)()> possible;
    if (!arriving_.empty()) possible.push_back(&Pair::Arrive);
    if (!unwritten_.empty()) possible.push_back(&Pair::Written);
    if (!unread_.empty()) possible.push_back(&Pair::Read);
    if (!credits_.empty()) possible.push_back(&Pair::Credit);
    if (wants_under_way_ > 0) possible.push_back(&Pair::Want);
    if (possible.empty()) return;
    (this->*possible[seeded_.Below(possible.size())])();
  }
  // A message goes the other way and takes the credits along.
  void Piggyback() {
    if (unread_.empty()) return;
    credits_.push_back(inbox_.TakeCredits());
  }

 private:
  struct Share {
    uint32_t slot;
    uint64_t units;
  };
  struct Live {
    uint64_t offset;
    uint64_t end;
  };

  bool moving() const {
    return !arriving_.empty() || !unwritten_.empty() || !unread_.empty() ||
           !credits_.empty() || wants_under_way_ > 0;
  }

  template <typename T>
  T TakeAny(std::vector<T>& items) {
    const auto at =
        items.begin() + static_cast<ptrdiff_t>(seeded_.Below(items.size()));
    const T item = *at;
    items.erase(at);
    return item;
  }

  bool Send(uint64_t bytes) {
    const auto place = outbox_.Reserve(bytes);
    if (!place) return false;
    const Live span = {place->offset, place->offset + bytes};
    EXPECT_LE(span.end, mailbox_bytes_);
    EXPECT_FALSE(live_.contains(place->slot)) << "the slot is in use";
    for (const auto& [slot, other] : live_) {
      EXPECT_TRUE(span.end <= other.offset || other.end <= span.offset)
          << "slots " << place->slot << " and " << slot << " overlap";
    }
    live_[place->slot] = span;
    unwritten_.push_back(place->slot);
    const auto writes = static_cast<uint32_t>(1 + seeded_.Below(5));
    for (uint32_t i = 0; i < writes; ++i) {
      arriving_.push_back(
          {place->slot, kTransferUnits >> ShareOfWrite(i, writes)});
    }
    ++sent_;
    return true;
  }
  void Arrive() {
    const Share share = TakeAny(arriving_);
    const auto whole = inbox_.Count(share.slot, share.units);
    ASSERT_TRUE(whole.ok()) << whole.status().message();
    if (!*whole) return;
    inbox_.Hold(share.slot);
    unread_.push_back(share.slot);
  }
  void Written() {
    const uint32_t slot = TakeAny(unwritten_);
    // Until here our NIC may read the source, until it is read our peer its
    // copy.
    if (read_slots_.erase(slot) > 0) {
      live_.erase(slot);
    } else {
      written_slots_.insert({slot, true});
    }
    outbox_.Written(slot);
    SendWaiting();  // its credit may have come before
  }
  void Read() {
    const uint32_t slot = TakeAny(unread_);
    ++read_;
    if (written_slots_.erase(slot) > 0) {
      live_.erase(slot);
    } else {
      read_slots_.insert({slot, true});
    }
    const uint64_t bytes = 64;
    if (inbox_.GiveBack(slot, bytes)) credits_.push_back(inbox_.TakeCredits());
  }
  void Credit() {
    outbox_.Credit(TakeAny(credits_));
    SendWaiting();
    if (!waiting_.empty()) ++wants_under_way_;
  }
  void SendWaiting() {
    while (!waiting_.empty() && Send(waiting_.front())) {
      waiting_.erase(waiting_.begin());
    }
  }
  void Want() {
    --wants_under_way_;
    if (inbox_.Want()) credits_.push_back(inbox_.TakeCredits());
  }

  Seeded& seeded_;
  const uint64_t mailbox_bytes_;
  Outbox outbox_;
  Inbox inbox_;
  std::vector<uint64_t> waiting_;
  std::vector<Share> arriving_;
  std::vector<uint32_t> unwritten_;
  std::vector<uint32_t> unread_;
  std::vector<uint64_t> credits_;
  int wants_under_way_ = 0;
  std::map<uint32_t, Live> live_;
  std::map<uint32_t, bool> read_slots_;
  std::map<uint32_t, bool> written_slots_;
  size_t sent_ = 0;
  size_t read_ = 0;
};

TEST(MailboxTest, RandomTrafficNeverOverlapsAndNeverGetsStuck) {
  Seeded seeded;
  for (int round = 0; round < 60; ++round) {
    const uint64_t mailbox_bytes = 64 + seeded.Below(1 << 14);
    Pair pair(seeded, mailbox_bytes);
    constexpr size_t kMessages = 400;
    const uint64_t bytes_max =
        seeded.OneIn(2) ? mailbox_bytes + 1 : mailbox_bytes / 16 + 1;
    size_t submitted = 0;
    while (submitted < kMessages || !pair.idle()) {
      ASSERT_FALSE(pair.stuck() && submitted == kMessages)
          << "nobody tells the sender that there is room";
      if (submitted < kMessages && seeded.OneIn(3)) {
        pair.Submit(seeded.Below(bytes_max));
        ++submitted;
      } else if (seeded.OneIn(20)) {
        pair.Piggyback();
      } else {
        pair.Step();
      }
      if (testing::Test::HasFailure()) return;
    }
    EXPECT_EQ(pair.sent(), kMessages);
    EXPECT_EQ(pair.read(), kMessages);
  }
}

}  // namespace
}  // namespace jaxfabric
