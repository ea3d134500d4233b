#include "transport/verbs_address.h"

#include <gtest/gtest.h>

#include <functional>
#include <random>
#include <set>
#include <string>

namespace jaxfabric {
namespace {

constexpr uint64_t kJob = 77;

VerbsAddress Roce() {
  VerbsAddress address;
  address.queue_pair = 17;
  address.nonce = 5;
  address.job = kJob;
  address.gid = {0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0xff, 0xff, 10, 0, 0, 2};
  address.queue_key = 0x1234;
  return address;
}

TEST(VerbsAddressTest, SurvivesItsBytes) {
  const VerbsAddress address = Roce();
  const StatusOr<VerbsAddress> parsed =
      ParseVerbsAddress(ToNetAddr(address), VerbsLinkLayer::kEthernet, kJob);
  ASSERT_TRUE(parsed.ok()) << parsed.status().message();
  EXPECT_EQ(*parsed, address);
  EXPECT_EQ(Describe(address), "10.0.0.2 (queue pair 17)");
}

TEST(VerbsAddressTest, InfiniBandHasALid) {
  VerbsAddress address = Roce();
  address.link_layer = VerbsLinkLayer::kInfiniBand;
  address.lid = 3;
  EXPECT_TRUE(
      ParseVerbsAddress(ToNetAddr(address), VerbsLinkLayer::kInfiniBand, kJob)
          .ok());
}

TEST(VerbsAddressTest, EachFaultIsRefused) {
  const std::function<void(VerbsAddress&)> faults[] = {
      [](VerbsAddress& a) { a.magic ^= 1; },
      [](VerbsAddress& a) { ++a.version; },
      [](VerbsAddress& a) { ++a.job; },
      [](VerbsAddress& a) { a.queue_pair = 1; },
      [](VerbsAddress& a) { a.queue_pair = 1u << 24; },
      [](VerbsAddress& a) { a.queue_key = 0; },
      [](VerbsAddress& a) { a.queue_key = 0x8000'0000; },
      [](VerbsAddress& a) { a.gid = {}; },
      [](VerbsAddress& a) { a.gid[0] = 0xff; },
      [](VerbsAddress& a) { a.lid = 1; },
      [](VerbsAddress& a) { a.link_layer = VerbsLinkLayer{9}; },
      [](VerbsAddress& a) { a.link_layer = VerbsLinkLayer::kInfiniBand; },
  };
  std::set<std::string> sentences;
  for (const auto& fault : faults) {
    VerbsAddress address = Roce();
    fault(address);
    const StatusOr<VerbsAddress> parsed =
        ParseVerbsAddress(ToNetAddr(address), VerbsLinkLayer::kEthernet, kJob);
    ASSERT_FALSE(parsed.ok());
    sentences.insert(parsed.status().message());
  }
  EXPECT_EQ(sentences.size(), 5u);
}

TEST(VerbsAddressTest, AnyBytesAreRefusedOrWellFormed) {
  std::mt19937 random(1);
  const std::string good = ToNetAddr(Roce()).bytes;
  for (size_t size = 0; size <= good.size() + 1; ++size) {
    std::string bytes = good + "x";
    bytes.resize(size);
    const bool parsed =
        ParseVerbsAddress({bytes}, VerbsLinkLayer::kEthernet, kJob).ok();
    EXPECT_EQ(parsed, size == good.size());
  }
  for (int i = 0; i < 10'000; ++i) {
    std::string bytes = good;
    bytes[random() % bytes.size()] ^= static_cast<char>(1 + random() % 255);
    const auto parsed =
        ParseVerbsAddress({bytes}, VerbsLinkLayer::kEthernet, kJob);
    if (!parsed.ok()) continue;
    EXPECT_EQ(ToNetAddr(*parsed).bytes, bytes);
    EXPECT_GE(parsed->queue_pair, 2u);
    EXPECT_LT(parsed->queue_pair, 1u << 24);
  }
}

}  // namespace
}  // namespace jaxfabric
