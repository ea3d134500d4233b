// Regions that are unregistered while peers write into them.

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <atomic>
#include <cstring>
#include <string>

#include "engine/transfer_engine.h"
#include "tests/cpp/transfer_faults.h"

namespace jaxfabric {
namespace {

using testing::HasSubstr;

class TransferWithdrawTest : public TransferFaultsTest {
 protected:
  static constexpr uint64_t kLength = 200'000;
  static FakeOptions Slow() {
    return {
        .delay_max_ns = 20'000'000, .queue_depth = 16, .write_bytes_max = 1000};
  }
  static TransferEngine::Submitted Write(TransferNode& from,
                                         const RegionAddress& to, uint32_t id) {
    return from.engine->SubmitSingleWrite(from.region, 0, to, 0, kLength, id);
  }
};

TEST_F(TransferWithdrawTest, UnregisteringWaitsForPeersWritesAndEndsThem) {
  auto a = Open({}, nullptr, Slow());
  auto b = Open({}, nullptr, Slow());
  a->Connect(*b);
  const RegionId region = *b->engine->AllocateMemory(kLength);
  const RegionAddress address = *b->engine->Describe(region);
  const auto memory = b->engine->Memory(region);
  const auto write = Write(*a, address, 1);
  const auto gone = b->engine->UnregisterMemory(region);
  ASSERT_TRUE(EndsWell(gone));
  EXPECT_TRUE((*write)->done()) << "unregistered while a peer was writing";
  EXPECT_TRUE(EndsWell(write));
  EXPECT_TRUE(EndsWell(b->engine->ExpectImmCount(1, 1)));
  // All is still: what is stored here now stays.
  std::memset(memory->data(), 3, kLength);
  const Status refused = EndOf(Write(*a, address, 2));
  EXPECT_EQ(refused.code(), StatusCode::kFailedPrecondition);
  EXPECT_THAT(refused.message(), HasSubstr("unregisters the target region"));
  for (uint64_t i = 0; i < kLength; ++i) {
    ASSERT_EQ(memory->data()[i], std::byte{3});
  }
  EXPECT_TRUE(EndsWell(Write(*a, b->address, 3)));
}

TEST_F(TransferWithdrawTest, BothMayUnregisterWhileTheOtherWrites) {
  auto a = Open({}, nullptr, Slow());
  auto b = Open({}, nullptr, Slow());
  a->Connect(*b);
  const auto there = Write(*a, b->address, 1);
  const auto back = Write(*b, a->address, 1);
  const auto gone_a = a->engine->UnregisterMemory(a->region);
  const auto gone_b = b->engine->UnregisterMemory(b->region);
  for (const auto& end : {gone_a, gone_b, there, back}) {
    EXPECT_TRUE(EndsWell(end));
  }
}

TEST_F(TransferWithdrawTest, APeerThatDoesNotAnswerIsNamedAndTheRegionStays) {
  std::atomic<bool> mute{false};
  auto a = Open(
      {}, [&](std::string&) { return !mute.load(std::memory_order_relaxed); });
  auto b = Open();
  auto c = Open();
  a->Connect(*b);
  c->Connect(*b);
  mute.store(true, std::memory_order_relaxed);
  const Status late = EndOf(b->engine->UnregisterMemory(
      b->region, Deadline::AfterNanoseconds(300'000'000)));
  EXPECT_EQ(late.code(), StatusCode::kDeadlineExceeded);
  EXPECT_THAT(late.message(), HasSubstr("unregister_memory"));
  EXPECT_THAT(late.message(), HasSubstr("node0"));
  EXPECT_THAT(late.message(), testing::Not(HasSubstr("node2")));
  EXPECT_THAT(late.message(), HasSubstr("stays registered"));
  EXPECT_TRUE(b->engine->Describe(b->region).ok());
  // Once the peer is lost, or answers, it goes.
  const auto gone = b->engine->UnregisterMemory(b->region);
  ASSERT_TRUE(IsOk(b->engine->Disconnect(0)));
  EXPECT_TRUE(EndsWell(gone));
}

TEST_F(TransferWithdrawTest, WhoConnectsMeanwhileIsAskedToo) {
  std::atomic<bool> mute{false};
  auto a = Open(
      {}, [&](std::string&) { return !mute.load(std::memory_order_relaxed); });
  auto b = Open();
  auto c = Open();
  a->Connect(*b);
  mute.store(true, std::memory_order_relaxed);
  const auto gone = b->engine->UnregisterMemory(b->region);
  c->Connect(*b);
  const auto write = [&] {
    return EndOf(
        c->engine->SubmitSingleWrite(c->region, 0, b->address, 0, 1, {}));
  };
  Until([&] { return write().code() == StatusCode::kFailedPrecondition; });
  EXPECT_FALSE((*gone)->done());
  ASSERT_TRUE(IsOk(b->engine->Disconnect(0)));
  EXPECT_TRUE(EndsWell(gone));
}

// What a peer had under way when it was lost may land where software writes.
TEST_F(TransferWithdrawTest, ARegionStaysWhereALostPeerMayStillWrite) {
  Emulation software;
  auto a = Open();
  auto b = Open({}, nullptr, {}, nullptr, &software);
  auto memory = std::make_shared<std::string>(100, 'x');
  auto* const base = reinterpret_cast<std::byte*>(memory->data());
  const std::weak_ptr<std::string> alive = memory;
  const RegionId region =
      *b->engine->RegisterMemory(base, 100, std::move(memory));
  ASSERT_TRUE(b->engine->Describe(region).ok());
  a->Connect(*b);
  ASSERT_TRUE(IsOk(b->engine->Disconnect(0)));
  const RegionId unknown = *b->engine->AllocateMemory(100);
  EXPECT_TRUE(EndsWell(b->engine->UnregisterMemory(unknown)));
  for (int round = 0; round < 2; ++round) {
    const Status refused = EndOf(b->engine->UnregisterMemory(region));
    EXPECT_EQ(refused.code(), StatusCode::kFailedPrecondition);
    EXPECT_THAT(refused.message(),
                HasSubstr("unregister_memory: peer 0 node0"));
    EXPECT_THAT(refused.message(), HasSubstr("stays registered"));
  }
  EXPECT_FALSE(alive.expired());
  b.reset();
  EXPECT_TRUE(alive.expired());
  EXPECT_EQ(software.asked.load(std::memory_order_relaxed), 0);
}

// Where it can be cut off, only regions that it knew of wait for that, and only
// when they end.
TEST_F(TransferWithdrawTest, ALostPeerIsCutOffBeforeARegionEnds) {
  Emulation software;
  software.fences = true;
  auto a = Open();
  auto c = Open();
  auto b = Open({}, nullptr, {}, nullptr, &software);
  a->Connect(*b);
  c->Connect(*b);
  ASSERT_TRUE(IsOk(b->engine->Disconnect(0)));
  EXPECT_EQ(software.asked.load(std::memory_order_relaxed), 0);
  const RegionId unknown = *b->engine->AllocateMemory(100);
  EXPECT_TRUE(EndsWell(b->engine->UnregisterMemory(unknown)));
  EXPECT_EQ(software.asked.load(std::memory_order_relaxed), 0);

  software.fenced.store(false, std::memory_order_relaxed);
  const Status late = EndOf(b->engine->UnregisterMemory(
      b->region, Deadline::AfterNanoseconds(200'000'000)));
  EXPECT_EQ(late.code(), StatusCode::kDeadlineExceeded);
  EXPECT_THAT(late.message(), HasSubstr("cut off"));
  EXPECT_THAT(late.message(), HasSubstr("stays registered"));
  EXPECT_EQ(software.asked.load(std::memory_order_relaxed), 1);
  const auto gone = b->engine->UnregisterMemory(b->region);
  // Another is lost while that goes on: it takes a second time.
  ASSERT_TRUE(IsOk(b->engine->Disconnect(1)));
  EXPECT_FALSE((*gone)->done());
  software.fenced.store(true, std::memory_order_relaxed);
  EXPECT_TRUE(EndsWell(gone));
  EXPECT_EQ(software.asked.load(std::memory_order_relaxed), 2);
}

TEST_F(TransferWithdrawTest, AFenceCoversThoseThatWereLostBeforeIt) {
  Emulation software;
  software.fences = true;
  auto a = Open();
  auto c = Open();
  auto b = Open({}, nullptr, {}, nullptr, &software);
  a->Connect(*b);
  c->Connect(*b);
  EXPECT_TRUE(EndsWell(b->engine->SubmitFence()));
  EXPECT_EQ(software.asked.load(std::memory_order_relaxed), 0);

  software.fenced.store(false, std::memory_order_relaxed);
  ASSERT_TRUE(IsOk(b->engine->Disconnect(0)));
  const auto first = b->engine->SubmitFence();
  const Status late =
      EndOf(b->engine->SubmitFence(Deadline::AfterNanoseconds(100'000'000)));
  EXPECT_EQ(late.code(), StatusCode::kDeadlineExceeded);
  EXPECT_THAT(late.message(), HasSubstr("being cut off"));
  EXPECT_EQ(software.asked.load(std::memory_order_relaxed), 1);
  // This one was lost too late for the fence that is under way.
  ASSERT_TRUE(IsOk(b->engine->Disconnect(1)));
  const auto second = b->engine->SubmitFence();
  EXPECT_FALSE((*first)->done());
  software.fenced.store(true, std::memory_order_relaxed);
  EXPECT_TRUE(EndsWell(first));
  EXPECT_TRUE(EndsWell(second));
  EXPECT_EQ(software.asked.load(std::memory_order_relaxed), 2);
  EXPECT_TRUE(EndsWell(b->engine->SubmitFence()));
  EXPECT_EQ(software.asked.load(std::memory_order_relaxed), 2);

  const auto refused = a->engine->SubmitFence();
  EXPECT_EQ(refused.status().code(), StatusCode::kUnimplemented);
  EXPECT_THAT(refused.status().message(), HasSubstr("nothing can stop"));
}

TEST_F(TransferWithdrawTest, AClosedEngineRefusesFencesForBeingClosed) {
  auto node = Open();  // its transport has no fences
  node->engine->BeginClose();
  const auto refused = node->engine->SubmitFence();
  EXPECT_EQ(refused.status().code(), StatusCode::kFailedPrecondition);
  EXPECT_THAT(refused.status().message(), HasSubstr("closed"));
}

TEST_F(TransferWithdrawTest, WhoTookLeaveHoldsNoRegion) {
  Emulation software;
  auto a = Open();
  auto b = Open({}, nullptr, {}, nullptr, &software);
  const uint32_t peer = a->Connect(*b);
  ASSERT_TRUE(IsOk(a->engine->Disconnect(peer)));
  Until([&] { return b->engine->stats().peers.empty(); });
  EXPECT_TRUE(EndsWell(b->engine->UnregisterMemory(b->region)));
}

TEST_F(TransferWithdrawTest, WhatNoPeerKnowsOfGoesAtOnce) {
  auto a = Open({}, [](std::string&) { return true; });
  auto b = Open();
  a->Connect(*b);
  Kill(*a);
  const RegionId region = *b->engine->AllocateMemory(100);
  const auto gone = b->engine->UnregisterMemory(region);
  ASSERT_TRUE(gone.ok());
  EXPECT_TRUE((*gone)->done());
}

TEST_F(TransferWithdrawTest, ARegionKeepsItsOwnerUntilItEnds) {
  auto a = Open();
  auto memory = std::make_shared<std::string>(100, 'x');
  auto* const base = reinterpret_cast<std::byte*>(memory->data());
  const std::weak_ptr<std::string> alive = memory;
  const RegionId first = *a->engine->RegisterMemory(base, 100, memory);
  const RegionId second = *a->engine->RegisterMemory(base, 50, memory);
  memory.reset();
  ASSERT_TRUE(EndsWell(a->engine->UnregisterMemory(first)));
  EXPECT_FALSE(alive.expired());
  ASSERT_TRUE(EndsWell(a->engine->UnregisterMemory(second)));
  Until([&] { return alive.expired(); });

  auto kept = std::make_shared<std::string>(100, 'y');
  const std::weak_ptr<std::string> closed = kept;
  auto* const kept_base = reinterpret_cast<std::byte*>(kept->data());
  ASSERT_TRUE(a->engine->RegisterMemory(kept_base, 100, kept).ok());
  kept.reset();
  EXPECT_FALSE(closed.expired());
  a.reset();
  EXPECT_TRUE(closed.expired());
}

}  // namespace
}  // namespace jaxfabric
