#include "engine/match_table.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <algorithm>
#include <memory>
#include <optional>
#include <set>

#include "tests/cpp/seeded.h"

namespace jaxfabric {
namespace {

using testing::ElementsAre;
using testing::HasSubstr;

constexpr MatchKey kKey = {.channel = 7, .sequence = 0};

Arrival From(uint32_t source, MatchKey key = kKey, uint32_t slot = 0) {
  return {.source = source, .slot = slot, .key = key};
}

std::vector<uint32_t> SourcesOf(const std::vector<Arrival>& arrivals) {
  std::vector<uint32_t> sources;
  for (const Arrival& arrival : arrivals) sources.push_back(arrival.source);
  return sources;
}

TEST(MatchTableTest, TheLastArrivalMakesItReady) {
  MatchTable table;
  std::vector<Arrival> now;
  std::vector<uint32_t> got;
  const auto ready = [&](std::vector<Arrival> a) { got = SourcesOf(a); };
  ASSERT_FALSE(table.Expect(kKey, {4, 2, 9}, nullptr, ready, &now));
  EXPECT_EQ(table.Add(From(9), "call"), nullptr);
  EXPECT_EQ(table.Add(From(4), "call"), nullptr);
  EXPECT_THAT(table.Missing(kKey), ElementsAre(2));
  const auto run = table.Add(From(2), "call");
  ASSERT_NE(run, nullptr);
  EXPECT_TRUE(got.empty()) << "it is for the caller to run";
  run();
  EXPECT_THAT(got, ElementsAre(4, 2, 9));
  EXPECT_THAT(table.Missing(kKey), ElementsAre());
}

TEST(MatchTableTest, EarlyArrivalsAreKept) {
  MatchTable table;
  table.Add(From(1), "call");
  table.Add(From(0), "call");
  std::vector<Arrival> now;
  EXPECT_TRUE(table.Expect(
      kKey, {0, 1}, nullptr, [](std::vector<Arrival>) { FAIL(); }, &now));
  EXPECT_THAT(SourcesOf(now), ElementsAre(0, 1));
  // They are used up.
  EXPECT_FALSE(table.Expect(kKey, {0}, nullptr, [](auto) {}, &now));
}

TEST(MatchTableTest, NoSourcesNeedNoArrivals) {
  MatchTable table;
  std::vector<Arrival> now = {From(3)};
  EXPECT_TRUE(table.Expect(
      kKey, {}, nullptr, [](std::vector<Arrival>) { FAIL(); }, &now));
  EXPECT_TRUE(now.empty());
}

TEST(MatchTableTest, ADuplicateIsIgnored) {
  MatchTable table;
  table.Add(From(1, kKey, /*slot=*/5), "call");
  table.Add(From(1, kKey, /*slot=*/6), "call");
  std::vector<Arrival> now;
  ASSERT_FALSE(table.Expect(kKey, {1, 2}, nullptr, [](auto) {}, &now));
  EXPECT_THAT(table.Missing(kKey), ElementsAre(2));
  const MatchKey other = {.channel = 8, .sequence = 0};
  table.Add(From(1, other, /*slot=*/5), "call");
  table.Add(From(1, other, /*slot=*/6), "call");
  ASSERT_TRUE(table.Expect(other, {1}, nullptr, [](auto) {}, &now));
  EXPECT_EQ(now[0].slot, 5u);
}

TEST(MatchTableTest, KeysDifferInChannelAndSequence) {
  MatchTable table;
  std::vector<Arrival> now;
  ASSERT_FALSE(table.Expect(kKey, {1}, nullptr, [](auto) {}, &now));
  EXPECT_EQ(table.Add(From(1, {.channel = 7, .sequence = 1}), "a"), nullptr);
  EXPECT_EQ(table.Add(From(1, {.channel = 8, .sequence = 0}), "b"), nullptr);
  EXPECT_NE(table.Add(From(1), "c"), nullptr);
}

TEST(MatchTableTest, SaysWhomACallAwaits) {
  MatchTable table;
  std::vector<Arrival> now;
  table.Add(From(1), "call");
  EXPECT_FALSE(table.Awaits(1)) << "nobody waits yet";
  ASSERT_FALSE(table.Expect(kKey, {1, 2}, nullptr, [](auto) {}, &now));
  EXPECT_FALSE(table.Awaits(1)) << "it is here";
  EXPECT_TRUE(table.Awaits(2));
  EXPECT_FALSE(table.Awaits(3));
}

TEST(MatchTableTest, DescribesWhatMatchesNothing) {
  MatchTable table;
  EXPECT_EQ(table.DescribeUnmatched(), "");
  std::vector<Arrival> now;
  ASSERT_FALSE(table.Expect(kKey, {1, 2}, nullptr, [](auto) {}, &now));
  table.Add(From(1), "awaited");
  EXPECT_EQ(table.DescribeUnmatched(), "");
  table.Add(From(2, {.channel = 1}), "put (jit_f, call 0)");
  EXPECT_EQ(table.DescribeUnmatched(), "put (jit_f, call 0) from rank 2");
  for (uint64_t channel = 100; channel < 150; ++channel) {
    table.Add(From(3, {.channel = channel}), "flood");
  }
  const std::string text = table.DescribeUnmatched();
  EXPECT_THAT(text, HasSubstr("flood from rank 3"));
  EXPECT_THAT(text, HasSubstr("and more"));
  EXPECT_LT(text.size(), 500u);
}

TEST(MatchTableTest, TakeAllEndsItForGood) {
  MatchTable table;
  const auto held = std::make_shared<int>(0);
  std::vector<Arrival> now;
  const auto ready = [held](const std::vector<Arrival>&) { ++*held; };
  ASSERT_FALSE(table.Expect(kKey, {1, 2}, nullptr, ready, &now));
  table.Add(From(1), "call");
  auto taken = table.TakeExpectations();
  ASSERT_EQ(taken.size(), 1u);
  EXPECT_GE(held.use_count(), 3) << "destroyed under the caller's locks";
  EXPECT_EQ(table.Add(From(2), "call"), nullptr) << "nobody waits any more";
  EXPECT_FALSE(table.Expect(kKey, {1, 2}, nullptr, ready, &now));
  EXPECT_FALSE(table.Awaits(3));
  taken.clear();
  EXPECT_EQ(held.use_count(), 2);
  EXPECT_EQ(*held, 0);
}

// Whatever the order, every call gets its own messages, once.
TEST(MatchTableTest, AnyOrderOfCallsAndArrivals) {
  Seeded seeded;
  constexpr uint32_t kSources = 5;
  for (int round = 0; round < 200; ++round) {
    MatchTable table;
    struct Action {
      MatchKey key;
      std::optional<uint32_t> source;  // none: the call itself
    };
    std::vector<Action> actions;
    const uint64_t keys = 1 + seeded.Below(12);
    for (uint64_t k = 0; k < keys; ++k) {
      const MatchKey key = {.channel = k % 4, .sequence = k / 4};
      actions.push_back({key, std::nullopt});
      for (uint32_t s = 0; s < kSources; ++s) actions.push_back({key, s});
    }
    std::shuffle(actions.begin(), actions.end(), seeded.random());
    std::set<MatchKey> finished;
    const auto check = [&](MatchKey key, const std::vector<Arrival>& arrivals) {
      EXPECT_THAT(SourcesOf(arrivals), ElementsAre(4, 3, 2, 1, 0));
      for (const Arrival& one : arrivals) EXPECT_EQ(one.key, key);
      EXPECT_TRUE(finished.insert(key).second) << "twice";
    };
    for (const Action& action : actions) {
      if (action.source) {
        const auto run = table.Add(From(*action.source, action.key), "call");
        if (run) run();
        continue;
      }
      std::vector<Arrival> now;
      const MatchKey key = action.key;
      if (table.Expect(
              key, {4, 3, 2, 1, 0}, nullptr,
              [&check, key](const std::vector<Arrival>& arrivals) {
                check(key, arrivals);
              },
              &now)) {
        check(key, now);
      }
    }
    EXPECT_EQ(finished.size(), keys);
    EXPECT_EQ(table.DescribeUnmatched(), "");
  }
}

}  // namespace
}  // namespace jaxfabric
