#include "transport/verbs_greeting.h"

#include <gtest/gtest.h>

#include <cstring>
#include <functional>
#include <random>

#include "transport/verbs_credits.h"
#include "transport/verbs_frame.h"

namespace jaxfabric {
namespace {

constexpr uint64_t kTarget = 9;
const JobKey kKey("the job's secret");

VerbsGreeting Hello() {
  VerbsGreeting greeting;
  greeting.target = kTarget;
  greeting.attempt = 3;
  greeting.added = 2;
  greeting.queue_pair = 18;
  greeting.sequence = 100;
  greeting.word_address = 4096;
  greeting.quota = kVerbsQuotaMax;
  greeting.mtu = 5;
  greeting.sender.queue_pair = 17;
  greeting.sender.nonce = 5;
  greeting.sender.job = kKey.JobId();
  greeting.sender.gid[15] = 1;
  greeting.sender.queue_key = 1;
  return greeting;
}

std::optional<VerbsGreeting> Open(const VerbsGreeting& greeting,
                                  size_t bytes = sizeof(VerbsGreeting)) {
  std::byte raw[sizeof(VerbsGreeting) + 1] = {};
  std::memcpy(raw, &greeting, sizeof(greeting));
  return OpenGreeting({raw, bytes}, kKey, kTarget, VerbsLinkLayer::kEthernet);
}

TEST(VerbsGreetingTest, SurvivesItsBytes) {
  VerbsGreeting greeting = Hello();
  SealGreeting(&greeting, kKey);
  const auto opened = Open(greeting);
  ASSERT_TRUE(opened.has_value());
  EXPECT_EQ(opened->attempt, 3u);
  EXPECT_EQ(opened->sender, greeting.sender);
}

TEST(VerbsGreetingTest, WhatCannotBeIsRefusedThoughItIsSealed) {
  const std::function<void(VerbsGreeting&)> faults[] = {
      [](VerbsGreeting& g) { g.kind = VerbsGreetingKind{77}; },
      [](VerbsGreeting& g) { ++g.target; },
      [](VerbsGreeting& g) { g.attempt = 0; },
      [](VerbsGreeting& g) { g.added = g.attempt + 1; },
      [](VerbsGreeting& g) { g.queue_pair = 0; },
      [](VerbsGreeting& g) { g.queue_pair = 1u << 24; },
      [](VerbsGreeting& g) { g.sequence = 1u << 24; },
      [](VerbsGreeting& g) { g.quota = 0; },
      [](VerbsGreeting& g) { g.quota = kVerbsQuotaMax + 1; },
      [](VerbsGreeting& g) { g.mtu = 0; },
      [](VerbsGreeting& g) { g.mtu = 6; },
      [](VerbsGreeting& g) { ++g.word_address; },
      [](VerbsGreeting& g) { ++g.sender.job; },
      [](VerbsGreeting& g) { g.sender.queue_pair = 0; },
      [](VerbsGreeting& g) { g.sender.gid = {}; },
      [](VerbsGreeting& g) {
        g.sender.link_layer = VerbsLinkLayer::kInfiniBand;
      },
  };
  for (const auto& fault : faults) {
    VerbsGreeting greeting = Hello();
    fault(greeting);
    SealGreeting(&greeting, kKey);
    EXPECT_FALSE(Open(greeting).has_value()) << &fault - faults;
  }
}

TEST(VerbsGreetingTest, NoAlteredByteAndNoOtherLengthPasses) {
  VerbsGreeting greeting = Hello();
  SealGreeting(&greeting, kKey);
  for (size_t i = 0; i < sizeof(greeting); ++i) {
    VerbsGreeting altered = greeting;
    reinterpret_cast<std::byte*>(&altered)[i] ^= std::byte{1};
    EXPECT_FALSE(Open(altered).has_value()) << "byte " << i;
    EXPECT_FALSE(Open(greeting, i).has_value()) << i << " bytes";
  }
  EXPECT_FALSE(Open(greeting, sizeof(greeting) + 1).has_value());
  SealGreeting(&greeting, JobKey("a guess"));
  EXPECT_FALSE(Open(greeting).has_value());
}

TEST(VerbsFrameTest, SurvivesItsBytesAndNothingElseDoes) {
  std::byte bytes[kVerbsFrameBytesMax];
  const std::string most(kVerbsMessageBytesMax, 'x');
  for (const std::string& payload : {std::string(), std::string("a"), most}) {
    const uint32_t length =
        EncodeVerbsFrame({VerbsFrameKind::kAsk, 7, payload}, bytes);
    const auto frame = DecodeVerbsFrame({bytes, length});
    ASSERT_TRUE(frame.has_value());
    EXPECT_EQ(frame->kind, VerbsFrameKind::kAsk);
    EXPECT_EQ(frame->argument, 7u);
    EXPECT_EQ(frame->payload, payload);
    EXPECT_FALSE(DecodeVerbsFrame({bytes, length - 1}).has_value());
  }
  EXPECT_FALSE(DecodeVerbsFrame({bytes, 0}).has_value());
  EXPECT_FALSE(
      DecodeVerbsFrame({bytes, sizeof(VerbsFrameHeader) - 1}).has_value());
}

}  // namespace
}  // namespace jaxfabric
