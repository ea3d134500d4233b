#include "engine/immediate.h"

#include <gtest/gtest.h>

#include "tests/cpp/seeded.h"

namespace jaxfabric {
namespace {

// What all writes of a transfer of `count` writes add up to, each share going
// through its encoding.
uint64_t UnitsOfTransfer(uint32_t count) {
  uint64_t sum = 0;
  for (uint32_t index = 0; index < count; ++index) {
    const Immediate sent = {.id = 77, .share = ShareOfWrite(index, count)};
    sum += Immediate::Decode(sent.Encode()).Units();
  }
  return sum;
}

TEST(ImmediateTest, SharesOfATransferAddUpToOne) {
  for (uint32_t count = 1; count <= 4096; ++count) {
    ASSERT_EQ(UnitsOfTransfer(count), kTransferUnits) << count << " writes";
  }
}

TEST(ImmediateTest, SharesOfHugeTransfersAddUpToOne) {
  Seeded seeded;
  for (int i = 0; i < 20; ++i) {
    const auto count =
        static_cast<uint32_t>(1 + seeded.Below(kWritesPerTransferMax));
    ASSERT_EQ(UnitsOfTransfer(count), kTransferUnits) << count << " writes";
  }
  for (uint32_t below : {0, 1, 2}) {
    const uint32_t count = kWritesPerTransferMax - below;
    EXPECT_EQ(UnitsOfTransfer(count), kTransferUnits) << count << " writes";
  }
}

TEST(ImmediateTest, NoProperPartOfATransferLooksWhole) {
  for (uint32_t count = 2; count <= 300; ++count) {
    for (uint32_t index = 0; index < count; ++index) {
      ASSERT_GT((Immediate{1, ShareOfWrite(index, count)}.Units()), 0u);
    }
  }
}

TEST(ImmediateTest, SharesThatNobodySendsAreWorthNothing) {
  EXPECT_EQ((Immediate{1, kUnitBits}.Units()), 1u);
  for (uint32_t share = kUnitBits + 1; share < 1u << kShareBits; ++share) {
    EXPECT_EQ((Immediate{1, share}.Units()), 0u) << share;
  }
}

TEST(ImmediateTest, WordsRoundTrip) {
  Seeded seeded;
  for (int i = 0; i < 10'000; ++i) {
    const auto word = static_cast<uint32_t>(seeded.random()());
    EXPECT_EQ(Immediate::Decode(word).Encode(), word);
    const uint32_t id = word >> kShareBits;
    EXPECT_EQ(TransferId::Decode(id).Encode(), id);
  }
}

TEST(ImmediateTest, IdsOfDifferentTransfersDiffer) {
  const TransferId corners[] = {
      {0, IdKind::kMailbox, 0},
      {0, IdKind::kMailbox, kSlotsMax - 1},
      {0, IdKind::kWindow, 0},
      {0, IdKind::kWindow, kSlotsMax - 1},
      {kRanksMax - 1, IdKind::kMailbox, 0},
      {kRanksMax - 1, IdKind::kWindow, kSlotsMax - 1},
  };
  for (const TransferId& a : corners) {
    const TransferId back = TransferId::Decode(a.Encode());
    EXPECT_EQ(back.source, a.source);
    EXPECT_EQ(back.kind, a.kind);
    EXPECT_EQ(back.slot, a.slot);
    EXPECT_LT(a.Encode(), 1u << kIdBits);
    for (const TransferId& b : corners) {
      EXPECT_EQ(a.Encode() == b.Encode(), &a == &b);
    }
  }
}

}  // namespace
}  // namespace jaxfabric
