#include "transport/verbs_credits.h"

#include <gtest/gtest.h>

#include <deque>
#include <random>

namespace jaxfabric {
namespace {

TEST(CreditsTest, AreNeverExceededAndNeverRunDry) {
  std::mt19937 random(1);
  for (const uint32_t quota : {4u, 5u, 17u, 64u}) {
    SendCredits sender(quota);
    ReceiveCredits receiver(quota);
    uint32_t under_way = 0;
    uint32_t free_receives = quota;
    std::deque<uint32_t> words;  // under way, in order
    uint64_t sent = 0;
    for (uint64_t step = 0; sent < 100'000; ++step) {
      ASSERT_LT(step, 10'000'000u) << "nobody goes on";
      switch (random() % 3) {
        case 0:
          if (!sender.available()) break;
          sender.Use();
          ++sent;
          ++under_way;
          ASSERT_LE(under_way, free_receives) << "the receiver is not ready";
          break;
        case 1:
          if (under_way == 0) break;
          --under_way;
          ASSERT_TRUE(receiver.Consume());
          if (receiver.due()) words.push_back(receiver.Tell());
          break;
        default:
          if (words.empty()) break;
          sender.Update(words.front());
          words.pop_front();
      }
    }
  }
}

TEST(CreditsTest, CountsMayWrapAround) {
  SendCredits sender(4);
  ReceiveCredits receiver(4);
  for (uint64_t i = 0; i < (uint64_t{1} << 32) + 100; ++i) {
    if (!sender.available()) sender.Update(receiver.Tell());
    sender.Use();
    if (!receiver.Consume()) FAIL() << i;
  }
}

TEST(CreditsTest, AWordThatCannotBeSaysNothing) {
  SendCredits sender(4);
  for (int i = 0; i < 4; ++i) sender.Use();
  ASSERT_FALSE(sender.available());
  for (const uint32_t word : {9u, 1000u, 3u, 0u, ~0u, 1u << 31}) {
    sender.Update(word);
    EXPECT_FALSE(sender.available()) << word;
  }
  sender.Update(8);
  EXPECT_TRUE(sender.available());
}

TEST(CreditsTest, WhoSendsWithoutACreditIsFoundOut) {
  ReceiveCredits receiver(4);
  for (int i = 0; i < 4; ++i) EXPECT_TRUE(receiver.Consume());
  EXPECT_FALSE(receiver.Consume());
  EXPECT_EQ(receiver.Tell(), 8u);
  EXPECT_TRUE(receiver.Consume());
}

TEST(ChooseQuotaTest, AllPeersTogetherStayWithinTheCapacity) {
  for (const uint32_t capacity : {0u, 3u, 4u, 100u, 1024u, 16384u}) {
    uint32_t reserved = 0;
    uint32_t peers = 0;
    uint32_t last = kVerbsQuotaMax;
    while (const uint32_t quota = ChooseQuota(capacity, reserved)) {
      EXPECT_GE(quota, kVerbsQuotaMin);
      EXPECT_LE(quota, last);
      last = quota;
      reserved += quota;
      ++peers;
      ASSERT_LE(reserved, capacity);
    }
    EXPECT_LT(capacity - reserved, kVerbsQuotaMin);
    if (capacity == 16384) {
      EXPECT_GE(peers, 900u);
      EXPECT_EQ(ChooseQuota(capacity, 0), kVerbsQuotaMax);
    }
  }
  EXPECT_EQ(ChooseQuota(4, 100), 0u);
}

}  // namespace
}  // namespace jaxfabric
