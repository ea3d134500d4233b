#include "engine/inbox.h"

#include <gtest/gtest.h>

#include "engine/immediate.h"

namespace jaxfabric {
namespace {

constexpr uint64_t kMailboxBytes = 1 << 16;

bool Arrives(Inbox& inbox, uint32_t slot) {
  const auto whole = inbox.Count(slot, kTransferUnits);
  EXPECT_TRUE(whole.ok());
  return whole.ok() && *whole;
}

TEST(InboxTest, FractionsMakeAMessageOnce) {
  Inbox inbox(kMailboxBytes);
  for (uint32_t i = 0; i < 7; ++i) {
    const auto whole = inbox.Count(3, kTransferUnits >> ShareOfWrite(i, 7));
    ASSERT_TRUE(whole.ok());
    EXPECT_EQ(*whole, i == 6) << i;
  }
  EXPECT_TRUE(Arrives(inbox, 4));
}

TEST(InboxTest, HostileCountsAreRefused) {
  Inbox inbox(kMailboxBytes);
  EXPECT_EQ(inbox.Count(kMailboxSlots, 1).status().code(),
            StatusCode::kDataLoss);
  EXPECT_EQ(inbox.Count(kSlotsMax - 1, 1).status().code(),
            StatusCode::kDataLoss);
  // More than a whole transfer.
  ASSERT_TRUE(inbox.Count(0, kTransferUnits / 2).ok());
  EXPECT_EQ(inbox.Count(0, kTransferUnits).status().code(),
            StatusCode::kDataLoss);
  // Into a slot that a reader holds.
  ASSERT_TRUE(Arrives(inbox, 1));
  inbox.Hold(1);
  EXPECT_EQ(inbox.Count(1, kTransferUnits).status().code(),
            StatusCode::kDataLoss);
}

TEST(InboxTest, ASlotGivenBackTakesTheNextMessage) {
  Inbox inbox(kMailboxBytes);
  for (int i = 0; i < 3; ++i) {
    ASSERT_TRUE(Arrives(inbox, 63));
    inbox.Hold(63);
    inbox.GiveBack(63, 1);
    EXPECT_EQ(inbox.TakeCredits(), uint64_t{1} << 63);
    EXPECT_EQ(inbox.TakeCredits(), 0u);
  }
}

TEST(InboxTest, CreditsTravelAloneWhenManySlotsStayHere) {
  Inbox inbox(kMailboxBytes);
  uint32_t kept = 0;
  while (kept < kMailboxSlots && !inbox.GiveBack(kept, 1)) ++kept;
  EXPECT_GT(kept, 0u);
  EXPECT_LT(kept, kMailboxSlots / 2) << "the peer would wait too long";
}

TEST(InboxTest, CreditsTravelAloneWhenMuchOfTheMailboxStaysHere) {
  Inbox inbox(kMailboxBytes);
  EXPECT_FALSE(inbox.GiveBack(0, 1));
  EXPECT_TRUE(inbox.GiveBack(1, kMailboxBytes / 2));
  inbox.TakeCredits();
  EXPECT_FALSE(inbox.GiveBack(2, 1)) << "bytes were counted twice";
}

TEST(InboxTest, WhoWantsCreditsGetsTheNext) {
  Inbox inbox(kMailboxBytes);
  EXPECT_FALSE(inbox.Want()) << "there is none yet";
  EXPECT_TRUE(inbox.GiveBack(0, 1));
  inbox.TakeCredits();
  EXPECT_FALSE(inbox.GiveBack(1, 1)) << "the wish was granted";
  EXPECT_TRUE(inbox.Want()) << "there is one";
}

}  // namespace
}  // namespace jaxfabric
