#include "transport/verbs_gid.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <vector>

namespace jaxfabric {
namespace {

constexpr VerbsGid kLinkLocal = {0xfe, 0x80, 0, 0, 0, 0, 0, 0,
                                 0,    1,    2, 3, 4, 5, 6, 7};
constexpr VerbsGid kGlobal = {0x20, 1, 0xd, 0xb8, 0, 0, 0, 0,
                              0,    0, 0,   0,    0, 0, 0, 9};
constexpr VerbsGid kIpv4 = {0, 0, 0,    0,    0,  0, 0, 0,
                            0, 0, 0xff, 0xff, 10, 1, 2, 3};

// As a ConnectX port on Ethernet has them: each address twice.
std::vector<VerbsGidEntry> RoceTable() {
  return {{0, VerbsGidType::kRoceV1, kLinkLocal},
          {1, VerbsGidType::kRoceV2, kLinkLocal},
          {2, VerbsGidType::kRoceV1, kIpv4},
          {3, VerbsGidType::kRoceV2, kIpv4},
          {4, VerbsGidType::kRoceV1, kGlobal},
          {5, VerbsGidType::kRoceV2, kGlobal}};
}

uint32_t Chosen(const std::vector<VerbsGidEntry>& entries, int wanted = -1) {
  const VerbsGidEntry* const entry = ChooseGid(entries, wanted);
  return entry == nullptr ? ~uint32_t{0} : entry->index;
}

TEST(ChooseGidTest, PrefersRoutableRoceV2WhateverTheOrder) {
  std::vector<VerbsGidEntry> table = RoceTable();
  EXPECT_EQ(Chosen(table), 3u);
  std::reverse(table.begin(), table.end());
  EXPECT_EQ(Chosen(table), 3u);
  std::erase_if(table, [](const auto& entry) { return entry.gid == kIpv4; });
  EXPECT_EQ(Chosen(table), 5u);
  std::erase_if(table, [](const auto& entry) { return entry.gid == kGlobal; });
  EXPECT_EQ(Chosen(table), 1u);
}

TEST(ChooseGidTest, OfEqualOnesTheFirst) {
  EXPECT_EQ(Chosen({{7, VerbsGidType::kRoceV2, kIpv4},
                    {8, VerbsGidType::kRoceV2, kIpv4}}),
            7u);
}

TEST(ChooseGidTest, InfiniBandHasOneOfItsOwn) {
  EXPECT_EQ(Chosen({{0, VerbsGidType::kInfiniBand, kLinkLocal}}), 0u);
}

TEST(ChooseGidTest, NeitherRoceV1NorNothing) {
  EXPECT_EQ(ChooseGid({}, -1), nullptr);
  std::vector<VerbsGidEntry> table = RoceTable();
  std::erase_if(table, [](const auto& entry) {
    return entry.type == VerbsGidType::kRoceV2;
  });
  EXPECT_EQ(ChooseGid(table, -1), nullptr);
  EXPECT_EQ(Chosen({{0, VerbsGidType::kRoceV2, {}}}), ~uint32_t{0});
}

TEST(ChooseGidTest, TheUserHasTheLastWord) {
  EXPECT_EQ(Chosen(RoceTable(), 2), 2u);
  EXPECT_EQ(ChooseGid(RoceTable(), 6), nullptr);
}

TEST(DescribeGidTest, AsPeopleWriteAddresses) {
  EXPECT_EQ(DescribeGid(kIpv4), "10.1.2.3");
  EXPECT_EQ(DescribeGid(kGlobal), "2001:db8::9");
}

}  // namespace
}  // namespace jaxfabric
