// Transfers that end badly when a part of them has been counted: the part must
// never stand for what somebody sends later under the same id.

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <cstring>

#include "engine/transfer_engine.h"
#include "tests/cpp/transfer_faults.h"

namespace jaxfabric {
namespace {

using testing::HasSubstr;

constexpr uint64_t kLength = 600'000;

class TransferSpoiltTest : public TransferFaultsTest {
 protected:
  // Many small writes, so that a kill comes between them.
  static FakeOptions Slow(bool names_peer) {
    return {.delay_max_ns = 30'000'000,
            .queue_depth = 64,
            .write_bytes_max = 1000,
            .immediate_names_peer = names_peer};
  }
  static TransferEngine::Submitted Write(TransferNode& from, TransferNode& to,
                                         uint32_t id, char value) {
    std::memset(from.data(), value, kLength);
    return WriteAgain(from, to, id);
  }
  // The same bytes, which a NIC may still be reading.
  static TransferEngine::Submitted WriteAgain(TransferNode& from,
                                              TransferNode& to, uint32_t id) {
    return from.engine->SubmitSingleWrite(from.region, 0, to.address, 0,
                                          kLength, id);
  }
  // A third of `value` has arrived at `node`.
  static void UntilSomeCame(TransferNode& node, char value) {
    Until([&] { return Arrived(node, value) > kLength / 3000; });
  }
  // It looks while the NIC writes, as nobody but this test may.
  __attribute__((no_sanitize("thread"))) static uint64_t Arrived(
      TransferNode& node, char value) {
    const auto* const bytes =
        reinterpret_cast<const volatile char*>(node.data());
    uint64_t here = 0;
    for (uint64_t i = 0; i < kLength; i += 1000) here += bytes[i] == value;
    return here;
  }
};

TEST_F(TransferSpoiltTest, ADeadSendersPartIsNotCountedForItsSuccessor) {
  const FakeOptions slow = Slow(true);
  auto b = Open({}, nullptr, slow);
  auto a = Open({}, nullptr, slow);
  a->Connect(*b);
  ASSERT_TRUE(Write(*a, *b, 7, 'a').ok());
  UntilSomeCame(*b, 'a');
  Kill(*a);
  Until([&] { return b->engine->stats().peers.empty(); });

  auto successor = Open({}, nullptr, slow);
  successor->Connect(*b);
  const auto write = Write(*successor, *b, 7, 's');
  ASSERT_TRUE(EndsWell(b->engine->ExpectImmCount(7, 1)));
  for (uint64_t i = 0; i < kLength; ++i) {
    ASSERT_EQ(static_cast<char>(b->data()[i]), 's') << "counted early, " << i;
  }
  EXPECT_TRUE(EndsWell(write));
  EXPECT_EQ(b->engine->ImmCount(7), 0u);
}

TEST_F(TransferSpoiltTest, WhereNobodyKnowsWhoseTheIdOfADeadSenderIsRefused) {
  const FakeOptions slow = Slow(false);
  auto b = Open({}, nullptr, slow);
  auto a = Open({}, nullptr, slow);
  auto bystander = Open({}, nullptr, slow);
  a->Connect(*b);
  bystander->Connect(*b);
  const auto waiting = b->engine->ExpectImmCount(7, 1);
  ASSERT_TRUE(EndsWell(Write(*a, *b, 6, 'w')));
  ASSERT_TRUE(Write(*a, *b, 7, 'a').ok());
  UntilSomeCame(*b, 'a');
  const auto other = Write(*bystander, *b, 8, 'o');
  Kill(*a);
  for (const auto& refused : {waiting, b->engine->ExpectImmCount(7, 1)}) {
    const Status spoilt = EndOf(refused);
    EXPECT_EQ(spoilt.code(), StatusCode::kFailedPrecondition);
    EXPECT_THAT(spoilt.message(), HasSubstr("under id 7"));
    EXPECT_THAT(spoilt.message(), HasSubstr("node1"));
    EXPECT_THAT(spoilt.message(), HasSubstr("new id"));
    Until([&] { return b->engine->stats().peers.size() == 1; });
  }
  // Ids that are whole, or not of the dead, are as good as before.
  EXPECT_TRUE(EndsWell(b->engine->ExpectImmCount(6, 1)));
  EXPECT_TRUE(EndsWell(b->engine->ExpectImmCount(8, 1)));
  EXPECT_TRUE(EndsWell(other));
}

TEST_F(TransferSpoiltTest, ACancelledTransfersIdIsRefusedOnBothSides) {
  for (const bool names_peer : {true, false}) {
    const FakeOptions slow = Slow(names_peer);
    auto b = Open({}, nullptr, slow);
    auto a = Open({}, nullptr, slow);
    const uint32_t peer = a->Connect(*b);
    const auto waiting = b->engine->ExpectImmCount(5, 1);
    const auto write = Write(*a, *b, 5, 'c');
    UntilSomeCame(*b, 'c');
    ASSERT_TRUE(a->engine->Cancel(**write));
    EXPECT_EQ(EndOf(write).code(), StatusCode::kCancelled);
    const auto refuses = [&](const TransferEngine::Submitted& submitted,
                             const char* who) {
      const Status spoilt = EndOf(submitted);
      EXPECT_EQ(spoilt.code(), StatusCode::kFailedPrecondition);
      EXPECT_THAT(spoilt.message(), HasSubstr("under id 5"));
      EXPECT_THAT(spoilt.message(), HasSubstr(who));
      EXPECT_THAT(spoilt.message(), HasSubstr("new id"));
    };
    const std::string sender = a->engine->options().name;
    const std::string receiver = b->engine->options().name;
    refuses(waiting, sender.c_str());
    refuses(b->engine->ExpectImmCount(5, 1), sender.c_str());
    refuses(Write(*a, *b, 5, 'd'), receiver.c_str());

    // A new connection to the same engine is no better.
    ASSERT_TRUE(IsOk(a->engine->Disconnect(peer)));
    Until([&] { return b->engine->stats().peers.empty(); });
    a->Connect(*b);
    refuses(Write(*a, *b, 5, 'd'), receiver.c_str());
    refuses(b->engine->ExpectImmCount(5, 1), sender.c_str());
    EXPECT_TRUE(EndsWell(Write(*a, *b, 6, 'e')));
    EXPECT_TRUE(EndsWell(b->engine->ExpectImmCount(6, 1)));
  }
}

TEST_F(TransferSpoiltTest, WhatWasNeverPostedSpoilsNothing) {
  auto a = Open({}, nullptr, Slow(true));
  auto b = Open({}, nullptr, Slow(true));
  a->Connect(*b);
  const auto first = Write(*a, *b, 1, 'a');
  const auto waiting = WriteAgain(*a, *b, 2);
  ASSERT_TRUE(a->engine->Cancel(**waiting));
  EXPECT_EQ(EndOf(waiting).code(), StatusCode::kCancelled);
  EXPECT_TRUE(EndsWell(first));
  EXPECT_TRUE(EndsWell(Write(*a, *b, 2, 'b')));
  EXPECT_TRUE(EndsWell(b->engine->ExpectImmCount(2, 1)));
}

}  // namespace
}  // namespace jaxfabric
