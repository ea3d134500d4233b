#include "engine/outbox.h"

#include <gtest/gtest.h>

#include <set>

namespace jaxfabric {
namespace {

constexpr uint64_t kMailboxBytes = 1 << 16;

TEST(OutboxTest, SlotsAndSpansAreDistinctUntilAllAreUsed) {
  Outbox outbox(kMailboxBytes);
  std::set<uint32_t> slots;
  std::set<uint64_t> offsets;
  for (uint32_t i = 0; i < kMailboxSlots; ++i) {
    const auto place = outbox.Reserve(0);
    ASSERT_TRUE(place);
    EXPECT_LT(place->slot, kMailboxSlots);
    slots.insert(place->slot);
    offsets.insert(place->offset);
  }
  EXPECT_EQ(slots.size(), kMailboxSlots);
  EXPECT_EQ(offsets.size(), kMailboxSlots);
  EXPECT_FALSE(outbox.Reserve(0));
}

TEST(OutboxTest, ASlotIsFreeOnlyOnceWrittenAndCredited) {
  for (const bool credit_first : {false, true}) {
    Outbox outbox(kMailboxBytes);
    const auto place = outbox.Reserve(kMailboxBytes);
    ASSERT_TRUE(place);
    EXPECT_FALSE(outbox.Reserve(1));
    if (credit_first) {
      outbox.Credit(uint64_t{1} << place->slot);
    } else {
      outbox.Written(place->slot);
    }
    EXPECT_FALSE(outbox.Reserve(1)) << "one of the two is not enough";
    if (credit_first) {
      outbox.Written(place->slot);
    } else {
      outbox.Credit(uint64_t{1} << place->slot);
    }
    EXPECT_TRUE(outbox.Reserve(kMailboxBytes));
  }
}

TEST(OutboxTest, InventedAndRepeatedCreditsChangeNothing) {
  Outbox outbox(kMailboxBytes);
  outbox.Credit(~uint64_t{0});
  const auto first = outbox.Reserve(kMailboxBytes / 2);
  ASSERT_TRUE(first);
  outbox.Credit(~(uint64_t{1} << first->slot));  // for all others
  outbox.Written(first->slot);
  const auto second = outbox.Reserve(kMailboxBytes / 2);
  ASSERT_TRUE(second);
  EXPECT_NE(second->slot, first->slot);
  EXPECT_NE(second->offset, first->offset);
  outbox.Credit(uint64_t{1} << first->slot);
  // The credit is used up: it does not count for the next message in the slot.
  const auto third = outbox.Reserve(kMailboxBytes / 2);
  ASSERT_TRUE(third);
  EXPECT_EQ(third->slot, first->slot);
  outbox.Written(third->slot);
  EXPECT_FALSE(outbox.Reserve(1));
}

TEST(OutboxTest, LackOfBytesCostsNoSlot) {
  Outbox outbox(kMailboxBytes);
  for (int i = 0; i < 100; ++i) EXPECT_FALSE(outbox.Reserve(kMailboxBytes + 1));
  for (uint32_t i = 0; i < kMailboxSlots; ++i) EXPECT_TRUE(outbox.Reserve(0));
}

}  // namespace
}  // namespace jaxfabric
