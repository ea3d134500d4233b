#include "engine/rank_address.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include "tests/cpp/seeded.h"

namespace jaxfabric {
namespace {

RankAddress Example(size_t domains) {
  RankAddress address = {.generation = 0x89abcdef, .domains = {}, .heap = {}};
  address.heap = {.base = ~uint64_t{0}, .length = 12345, .keys = {}};
  for (size_t i = 0; i < domains; ++i) {
    address.domains.push_back({std::string(i * 7, static_cast<char>(i))});
    address.heap.keys.push_back(uint64_t{1} << 63 | i);
  }
  return address;
}

TEST(RankAddressTest, RoundTrips) {
  for (size_t domains = 1; domains <= DomainGroup::kDomainsMax; ++domains) {
    const RankAddress sent = Example(domains);
    const auto got = RankAddress::Decode(sent.Encode());
    ASSERT_TRUE(got.ok()) << got.status().message();
    EXPECT_EQ(got->generation, sent.generation);
    EXPECT_EQ(got->domains, sent.domains);
    EXPECT_EQ(got->heap.base, sent.heap.base);
    EXPECT_EQ(got->heap.length, sent.heap.length);
    EXPECT_EQ(got->heap.keys, sent.heap.keys);
  }
}

TEST(RankAddressTest, NoneAndTooManyDomainsAreRefused) {
  EXPECT_FALSE(RankAddress::Decode(Example(0).Encode()).ok());
  EXPECT_FALSE(
      RankAddress::Decode(Example(DomainGroup::kDomainsMax + 1).Encode()).ok());
}

TEST(RankAddressTest, AnyOtherLengthIsRefused) {
  const std::string bytes = Example(3).Encode();
  for (size_t length = 0; length < bytes.size(); ++length) {
    const auto got = RankAddress::Decode(bytes.substr(0, length));
    EXPECT_EQ(got.status().code(), StatusCode::kInvalidArgument) << length;
  }
  EXPECT_FALSE(RankAddress::Decode(bytes + "x").ok());
}

TEST(RankAddressTest, AnotherVersionIsNamed) {
  std::string bytes = Example(1).Encode();
  bytes[4] = 9;
  const auto got = RankAddress::Decode(bytes);
  EXPECT_EQ(got.status().code(), StatusCode::kFailedPrecondition);
  EXPECT_THAT(got.status().message(), testing::HasSubstr("version 9"));
  bytes = Example(1).Encode();
  bytes[0] = 'x';
  EXPECT_EQ(RankAddress::Decode(bytes).status().code(),
            StatusCode::kInvalidArgument);
}

TEST(RankAddressTest, NoDamageIsFatal) {
  Seeded seeded;
  for (int i = 0; i < 20'000; ++i) {
    std::string bytes = Example(1 + seeded.Below(8)).Encode();
    bytes.resize(seeded.OneIn(2) ? bytes.size() : seeded.Below(bytes.size()));
    for (uint64_t flips = seeded.Below(4); flips > 0 && !bytes.empty();
         --flips) {
      const size_t at = seeded.Below(bytes.size());
      bytes[at] = static_cast<char>(bytes[at] ^ (1 << seeded.Below(8)));
    }
    const auto got = RankAddress::Decode(bytes);
    if (got.ok()) {
      EXPECT_EQ(got->Encode().size(), bytes.size());
      EXPECT_EQ(got->heap.keys.size(), got->domains.size());
    } else {
      EXPECT_FALSE(got.status().message().empty());
    }
  }
}

}  // namespace
}  // namespace jaxfabric
