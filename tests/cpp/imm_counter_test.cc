#include "engine/imm_counter.h"

#include <gtest/gtest.h>

#include <atomic>
#include <memory>
#include <thread>

#include "engine/immediate.h"
#include "tests/cpp/seeded.h"

namespace jaxfabric {
namespace {

constexpr uint32_t kId = 5;

// The table, with callbacks that note who was called.
class Counters {
 public:
  void Add(uint64_t units, uint32_t id = kId) {
    std::vector<std::function<void()>> ready;
    EXPECT_TRUE(table.Add(id, units, &ready).ok());
    for (const auto& callback : ready) callback();
  }
  void AddTransfers(uint64_t count, uint32_t id = kId) {
    for (uint64_t i = 0; i < count; ++i) Add(kTransferUnits, id);
  }
  ImmCounterTable::Handle Expect(uint64_t transfers, int who) {
    return table.Expect(kId, transfers, [this, who] { called.push_back(who); });
  }

  ImmCounterTable table;
  std::vector<int> called;
};

using Order = std::vector<int>;

TEST(ImmCounterTest, WhatCameEarlyIsKept) {
  Counters counters;
  counters.AddTransfers(3);
  EXPECT_EQ(counters.Expect(2, 1), 0u);
  EXPECT_EQ(counters.table.Transfers(kId), 1u);
  EXPECT_NE(counters.Expect(2, 2), 0u);
  EXPECT_EQ(counters.called, Order{});
  counters.AddTransfers(1);
  EXPECT_EQ(counters.called, Order{2});
  EXPECT_EQ(counters.table.Transfers(kId), 0u);
}

TEST(ImmCounterTest, NothingIsThereAtOnce) {
  Counters counters;
  EXPECT_EQ(counters.Expect(0, 1), 0u);
  EXPECT_EQ(counters.table.Transfers(kId), 0u);
}

TEST(ImmCounterTest, FractionsCountOnlyWhenWhole) {
  Counters counters;
  counters.Expect(1, 1);
  counters.Add(kTransferUnits - 1);
  EXPECT_EQ(counters.called, Order{});
  counters.Add(1);
  EXPECT_EQ(counters.called, Order{1});
}

TEST(ImmCounterTest, SurplusCarriesOverToTheNext) {
  Counters counters;
  counters.Expect(1, 1);
  counters.Add(kTransferUnits / 2);
  counters.Add(kTransferUnits);
  EXPECT_EQ(counters.called, Order{1});
  EXPECT_NE(counters.Expect(1, 2), 0u);
  counters.Add(kTransferUnits / 2);
  EXPECT_EQ(counters.called, (Order{1, 2}));
}

TEST(ImmCounterTest, FirstComeFirstServed) {
  Counters counters;
  counters.Expect(2, 1);
  counters.AddTransfers(1);
  // The one that is there belongs to the first.
  EXPECT_NE(counters.Expect(1, 2), 0u);
  counters.Expect(1, 3);
  EXPECT_EQ(counters.called, Order{});
  counters.AddTransfers(1);
  EXPECT_EQ(counters.called, Order{1});
  counters.Add(2 * kTransferUnits);
  EXPECT_EQ(counters.called, (Order{1, 2, 3}));
}

TEST(ImmCounterTest, IdsAreIndependent) {
  Counters counters;
  counters.Expect(1, 1);
  counters.AddTransfers(1, kId + 1);
  EXPECT_EQ(counters.called, Order{});
  EXPECT_EQ(counters.table.Transfers(kId + 1), 1u);
}

TEST(ImmCounterTest, CancelConsumesNothing) {
  Counters counters;
  const auto first = counters.Expect(2, 1);
  counters.AddTransfers(1);
  std::vector<std::function<void()>> ready;
  EXPECT_TRUE(counters.table.Cancel(first, &ready));
  EXPECT_FALSE(counters.table.Cancel(first, &ready));
  EXPECT_FALSE(counters.table.Cancel(12345, &ready));
  EXPECT_TRUE(ready.empty());
  EXPECT_EQ(counters.table.Transfers(kId), 1u);
  EXPECT_EQ(counters.Expect(1, 2), 0u);
  counters.AddTransfers(2);
  EXPECT_EQ(counters.called, Order{});
}

TEST(ImmCounterTest, WhatACancelledOneHeldBackGoesToTheNext) {
  Counters counters;
  const auto first = counters.Expect(3, 1);
  counters.Expect(1, 2);
  counters.Expect(1, 3);
  counters.AddTransfers(1);
  std::vector<std::function<void()>> ready;
  EXPECT_TRUE(counters.table.Cancel(first, &ready));
  for (const auto& callback : ready) callback();
  EXPECT_EQ(counters.called, Order{2});
  counters.AddTransfers(1);
  EXPECT_EQ(counters.called, (Order{2, 3}));
}

TEST(ImmCounterTest, MetExpectationsCannotBeCancelled) {
  Counters counters;
  const auto handle = counters.Expect(1, 1);
  counters.AddTransfers(1);
  std::vector<std::function<void()>> ready;
  EXPECT_FALSE(counters.table.Cancel(handle, &ready));
}

TEST(ImmCounterTest, TakeAllEndsItForGood) {
  Counters counters;
  auto held = std::make_shared<int>(0);
  counters.table.Expect(kId, 1, [held] {});
  counters.table.Expect(kId + 1, 1, [held] {});
  EXPECT_EQ(held.use_count(), 3);
  auto taken = counters.table.TakeExpectations();
  EXPECT_EQ(taken.size(), 2u);
  EXPECT_EQ(held.use_count(), 3);
  taken.clear();
  EXPECT_EQ(held.use_count(), 1);
  // Who comes later is let go of at once, and never called.
  EXPECT_NE(counters.table.Expect(kId, 1, [held] { ++*held; }), 0u);
  EXPECT_EQ(held.use_count(), 1);
  counters.AddTransfers(2);
  EXPECT_EQ(*held, 0);
  EXPECT_EQ(counters.table.Transfers(kId), 2u);
}

TEST(ImmCounterTest, IdsThatNobodyWaitsForAreBounded) {
  Counters counters;
  for (uint32_t id = 0; id < ImmCounterTable::kIdsMax; ++id) {
    counters.Add(1, id);
  }
  std::vector<std::function<void()>> ready;
  const Status flooded =
      counters.table.Add(ImmCounterTable::kIdsMax, 1, &ready);
  EXPECT_EQ(flooded.code(), StatusCode::kResourceExhausted);
  counters.Add(kTransferUnits, 0);  // one that is known still counts
  // What is consumed makes room again.
  counters.Add(kTransferUnits - 1, 1);
  EXPECT_EQ(counters.table.Expect(1, 1, [] {}), 0u);
  counters.Add(1, ImmCounterTable::kIdsMax);
}

TEST(ImmCounterTest, NoSourceTakesTheRoomOfOthers) {
  ImmCounterTable table;
  std::vector<std::function<void()>> ready;
  uint32_t next_id = 0;
  const auto flood = [&](uint32_t source) {
    size_t taken = 0;
    while (table.Add(next_id, kTransferUnits, &ready, source).ok()) {
      ++next_id;
      ++taken;
    }
    return taken;
  };
  EXPECT_EQ(flood(1), ImmCounterTable::kIdsMax / 2);
  EXPECT_EQ(flood(2), ImmCounterTable::kIdsMax / 4);
  EXPECT_EQ(flood(1), 0u);
  // What somebody waits for is no burden.
  EXPECT_EQ(table.Expect(0, 1, [] {}), 0u);
  EXPECT_NE(table.Expect(1, 2, [] {}), 0u);
  EXPECT_EQ(flood(2), 1u);
  // What is there when a source leaves stays as long as nobody needs the room,
  // and then the oldest goes.
  table.Leave(1);
  EXPECT_EQ(table.evicted(), 0u);
  EXPECT_EQ(table.Transfers(next_id - 1), 1u);
  EXPECT_EQ(flood(3), ImmCounterTable::kIdsMax * 3 / 8);
  EXPECT_GT(table.evicted(), 0u);
  EXPECT_EQ(table.Transfers(1), 1u) << "somebody waits for it";
  EXPECT_EQ(table.Transfers(2), 0u);
}

TEST(ImmCounterTest, WhatIsWaitedForAgainIsYoungAgain) {
  ImmCounterTable table;
  std::vector<std::function<void()>> ready;
  // Given up with a half of a transfer there: nobody's, in this order.
  const auto give_up = [&](uint32_t id) {
    const auto handle = table.Expect(id, 1, [] {});
    EXPECT_TRUE(table.Cancel(handle, &ready));
  };
  for (const uint32_t id : {1, 2}) {
    EXPECT_TRUE(table.Add(id, kTransferUnits / 2, &ready).ok());
    give_up(id);
  }
  give_up(1);  // so that 2 is the oldest
  uint32_t next_id = 3;
  for (; next_id <= ImmCounterTable::kIdsMax; ++next_id) {
    EXPECT_TRUE(table.Add(next_id, 1, &ready).ok());
  }
  EXPECT_EQ(table.evicted(), 0u);
  EXPECT_TRUE(table.Add(next_id, 1, &ready).ok());
  EXPECT_EQ(table.evicted(), 1u);
  EXPECT_TRUE(table.HasPart(1));
  EXPECT_FALSE(table.HasPart(2));
}

TEST(ImmCounterTest, NoCountIsLostOrDoubledBetweenThreads) {
  constexpr int kThreads = 4;
  constexpr int kTransfersEach = 2000;
  constexpr int kTransfersPerWait = 5;
  ImmCounterTable table;
  std::atomic<int> met{0};
  std::vector<std::thread> threads;
  for (int t = 0; t < kThreads; ++t) {
    threads.emplace_back([&] {
      for (int i = 0; i < kTransfersEach; ++i) {
        for (int half = 0; half < 2; ++half) {
          std::vector<std::function<void()>> ready;
          EXPECT_TRUE(table.Add(kId, kTransferUnits / 2, &ready).ok());
          for (const auto& callback : ready) callback();
        }
      }
    });
  }
  constexpr int kWaits = kThreads * kTransfersEach / kTransfersPerWait;
  for (int i = 0; i < kWaits; ++i) {
    const auto count = [&] { met.fetch_add(1, std::memory_order_relaxed); };
    if (table.Expect(kId, kTransfersPerWait, count) == 0) count();
  }
  for (std::thread& thread : threads) thread.join();
  EXPECT_EQ(met.load(std::memory_order_relaxed), kWaits);
  EXPECT_EQ(table.Transfers(kId), 0u);
}

// Against a list of who waits for how much.
TEST(ImmCounterTest, AgreesWithASimpleModel) {
  Seeded seeded;
  Counters counters;
  struct Waiting {
    ImmCounterTable::Handle handle;
    uint64_t units;
    int who;
  };
  std::vector<Waiting> waiting;
  uint64_t units = 0;
  Order expected;
  const auto settle = [&] {
    while (!waiting.empty() && units >= waiting.front().units) {
      units -= waiting.front().units;
      expected.push_back(waiting.front().who);
      waiting.erase(waiting.begin());
    }
  };
  for (int step = 0; step < 5000; ++step) {
    const uint64_t dice = seeded.Below(10);
    if (dice < 6) {
      const uint64_t added = kTransferUnits >> seeded.Below(4);
      counters.Add(added);
      units += added;
    } else if (dice < 9 || waiting.empty()) {
      const uint64_t transfers = 1 + seeded.Below(3);
      const auto handle = counters.Expect(transfers, step);
      if (handle == 0) counters.called.push_back(step);
      waiting.push_back({handle, transfers * kTransferUnits, step});
    } else {
      const auto one = waiting.begin() +
                       static_cast<ptrdiff_t>(seeded.Below(waiting.size()));
      std::vector<std::function<void()>> ready;
      ASSERT_TRUE(counters.table.Cancel(one->handle, &ready));
      for (const auto& callback : ready) callback();
      waiting.erase(one);
    }
    settle();
    ASSERT_EQ(counters.called, expected) << "step " << step;
    ASSERT_EQ(counters.table.Transfers(kId), units / kTransferUnits);
  }
}

}  // namespace
}  // namespace jaxfabric
