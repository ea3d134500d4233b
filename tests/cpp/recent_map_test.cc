#include "engine/recent_map.h"

#include <gtest/gtest.h>

#include <string>

namespace jaxfabric {
namespace {

TEST(RecentMapTest, TheOldestIsForgottenFirst) {
  RecentMap<int, std::string> map(2);
  EXPECT_TRUE(map.Add(1, "a"));
  EXPECT_TRUE(map.Add(2, "b"));
  EXPECT_FALSE(map.Add(1, "other"));
  EXPECT_EQ(*map.Find(1), "a");
  EXPECT_TRUE(map.Add(3, "c"));
  EXPECT_EQ(map.Find(1), nullptr);
  EXPECT_EQ(*map.Find(2), "b");
  EXPECT_EQ(map.values().size(), 2u);
}

TEST(RecentMapTest, WhatIsForgottenMayBeAddedAgainAndIsThenTheNewest) {
  RecentMap<int, int> map(2);
  map.Add(1, 0);
  map.Add(2, 0);
  map.Forget(1);
  map.Forget(7);
  EXPECT_EQ(map.Find(1), nullptr);
  EXPECT_TRUE(map.Add(1, 5));
  EXPECT_TRUE(map.Add(3, 0));
  EXPECT_EQ(map.Find(2), nullptr);
  EXPECT_EQ(*map.Find(1), 5);
}

}  // namespace
}  // namespace jaxfabric
