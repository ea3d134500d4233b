// What goes wrong later: peers that die or fall silent, descriptions that lie,
// operations that run out of time.

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <atomic>
#include <cmath>
#include <cstring>

#include "engine/transfer_engine.h"
#include "tests/cpp/transfer_faults.h"

namespace jaxfabric {
namespace {

using testing::HasSubstr;

// --- Death ---

TEST_F(TransferFaultsTest, WhatIsPendingWithADeadPeerFailsAndTheRestGoesOn) {
  auto a = Open(
      {}, nullptr,
      {.delay_max_ns = 20'000'000, .queue_depth = 4, .write_bytes_max = 1000});
  auto b = Open();
  auto c = Open();
  const uint32_t to_b = a->Connect(*b);
  const uint32_t to_c = a->Connect(*c);
  const auto write_to = [&](TransferNode& node, uint64_t bytes) {
    return a->engine->SubmitSingleWrite(a->region, 0, node.address, 0, bytes,
                                        5);
  };
  std::vector<TransferEngine::Submitted> doomed = {
      write_to(*b, 500'000),
      a->engine->SubmitScatter(
          a->region, {{c->address, 0, 0, 100}, {b->address, 0, 0, 100'000}}, 6),
      a->engine->SubmitBarrier(*a->engine->AddPeerGroup({to_b, to_c}), 1),
      a->engine->ExpectImmCount(9, 1, {to_b}),
      a->engine->SubmitSend(to_b, std::string(500'000, 'x'))};
  const auto unrelated = a->engine->ExpectImmCount(10, 1);
  const auto fine = write_to(*c, 20'000);
  Kill(*b);
  for (const auto& submitted : doomed) {
    ASSERT_TRUE(submitted.ok()) << submitted.status().message();
    const Status failed = EndOf(submitted);
    EXPECT_EQ(failed.code(), StatusCode::kUnavailable) << failed.message();
    EXPECT_THAT(failed.message(), HasSubstr("peer 0 node1"));
    EXPECT_EQ((*submitted)->peer(), to_b);
  }
  EXPECT_TRUE(EndsWell(fine));
  EXPECT_TRUE(EndsWell(c->engine->ExpectImmCount(5, 1)));
  EXPECT_FALSE((*unrelated)->done());
  EXPECT_EQ(a->engine->SubmitSend(to_b, "?").status().code(),
            StatusCode::kUnavailable);
  EXPECT_EQ(write_to(*b, 1).status().code(), StatusCode::kUnavailable);
  const auto stats = a->engine->stats();
  EXPECT_EQ(stats.peers_lost, 1u);
  EXPECT_EQ(stats.peers.size(), 1u);

  // It comes back as another incarnation, with another address.
  b = Open();
  const uint32_t again = a->Connect(*b);
  EXPECT_NE(again, to_b);
  EXPECT_TRUE(EndsWell(write_to(*b, 5000)));
  EXPECT_TRUE(EndsWell(b->engine->ExpectImmCount(5, 1)));
}

TEST_F(TransferFaultsTest, APeerThatClosesDeliversItsLastWordsFirst) {
  for (int round = 0; round < 10; ++round) {
    const FakeOptions chaos = {.seed = static_cast<uint64_t>(round),
                               .pieces_max = 4,
                               .delay_max_ns = 3'000'000};
    auto a = Open({}, nullptr, chaos);
    auto b = Open({}, nullptr, chaos);
    const uint32_t peer = a->Connect(*b);
    for (int i = 0; i < 5; ++i) {
      ASSERT_TRUE(a->engine->SubmitSend(peer, std::to_string(i)).ok());
      ASSERT_TRUE(
          a->engine->SubmitSingleWrite(a->region, 0, b->address, 0, 5000, 3)
              .ok());
    }
    ASSERT_TRUE(IsOk(a->engine->Drain(Patience())));
    a->engine.reset();
    ASSERT_TRUE(EndsWell(b->engine->ExpectImmCount(3, 5)));
    for (int i = 0; i < 5; ++i) {
      const auto message = b->engine->inbox().Take(Patience());
      ASSERT_TRUE(message);
      EXPECT_EQ(message->text, std::to_string(i));
    }
    Until([&] { return b->engine->stats().peers.empty(); });
  }
}

TEST_F(TransferFaultsTest, APeerThatFallsSilentIsLost) {
  std::atomic<bool> mute{false};
  auto a = Open({.heartbeat_s = 0.05, .peer_timeout_s = 0.5});
  auto b = Open(
      {}, [&](std::string&) { return !mute.load(std::memory_order_relaxed); });
  const uint32_t peer = a->Connect(*b);
  // An idle peer that answers is not lost.
  EXPECT_FALSE((*a->engine->ExpectImmCount(1, 1, {peer}))
                   ->Wait(Deadline::AfterSeconds(1)));
  mute.store(true, std::memory_order_relaxed);
  const Status lost = EndOf(a->engine->ExpectImmCount(2, 1, {peer}));
  EXPECT_EQ(lost.code(), StatusCode::kUnavailable);
  EXPECT_THAT(lost.message(), HasSubstr("silent"));
}

TEST_F(TransferFaultsTest, ManyLostPeersAreNotAllListed) {
  auto b = Open();
  for (int i = 0; i < 6; ++i) {
    auto a = Open();
    a->Connect(*b);
  }
  Until([&] { return b->engine->stats().peers.empty(); });
  const Status late = EndOf(b->engine->ExpectImmCount(
      6, 3, {}, Deadline::AfterNanoseconds(100'000'000)));
  EXPECT_THAT(late.message(), HasSubstr("peer 5 node6"));
  EXPECT_THAT(late.message(), HasSubstr("and 3 more"));
  EXPECT_THAT(late.message(), testing::Not(HasSubstr("peer 2 ")));
}

TEST_F(TransferFaultsTest, HeartbeatsThatMakeNoSenseAreRefused) {
  const auto refuse = [](double heartbeat_s, double peer_timeout_s) {
    const auto opened = TransferEngine::Open(
        {.heartbeat_s = heartbeat_s, .peer_timeout_s = peer_timeout_s},
        *OpenFakeTransport({}));
    EXPECT_EQ(opened.status().code(), StatusCode::kInvalidArgument);
  };
  refuse(0, 1);
  refuse(-1, 1);
  refuse(std::nan(""), 1);
  refuse(1, std::nan(""));
  refuse(1, HUGE_VAL);
  refuse(2, 2);
}

// --- Ends of operations ---

TEST_F(TransferFaultsTest, FaultErrorCallbackWhileOtherWritesStillRun) {
  auto a = Open({.nics = 2}, nullptr,
                {.delay_max_ns = 30'000'000, .write_bytes_max = 2000});
  auto b = Open();
  auto c = Open();
  // Before it has peers, that would be told.
  const RegionId gone = *b->engine->AllocateMemory(100);
  const RegionAddress stale = *b->engine->Describe(gone);
  ASSERT_TRUE(EndsWell(b->engine->UnregisterMemory(gone)));
  a->Connect(*b);
  a->Connect(*c);
  std::memset(a->data(), 1, TransferNode::kBytes);
  const auto scatter = a->engine->SubmitScatter(
      a->region, {{stale, 0, 0, 100}, {c->address, 0, 0, 40'000}}, 4);
  std::atomic<int> calls{0};
  (*scatter)->OnDone(
      [&](const Status&) { calls.fetch_add(1, std::memory_order_release); });
  EXPECT_FALSE(EndOf(scatter).ok());
  // Now the source is ours again: what we store there must not arrive.
  std::memset(a->data(), 2, TransferNode::kBytes);
  EXPECT_TRUE(EndsWell(c->engine->ExpectImmCount(4, 1)));
  for (uint64_t i = 0; i < 40'000; ++i) {
    ASSERT_EQ(c->data()[i], std::byte{1}) << i;
  }
  Until([&] { return calls.load(std::memory_order_acquire) > 0; });
  EXPECT_EQ(calls.load(std::memory_order_acquire), 1);
}

TEST_F(TransferFaultsTest, ACancelledWriteGivesItsBuffersBackAndItsIdNot) {
  auto a = Open(
      {}, nullptr,
      {.delay_max_ns = 20'000'000, .queue_depth = 4, .write_bytes_max = 1000});
  auto b = Open();
  a->Connect(*b);
  const auto write = [&](uint32_t id, TransferEngine::MaybeDeadline deadline) {
    return a->engine->SubmitSingleWrite(a->region, 0, b->address, 0, 500'000,
                                        id, deadline);
  };
  const auto cancelled = write(1, {});
  EXPECT_TRUE(a->engine->Cancel(**cancelled));
  EXPECT_EQ(EndOf(cancelled).code(), StatusCode::kCancelled);
  EXPECT_FALSE(a->engine->Cancel(**cancelled));
  const auto late = write(2, Deadline::AfterNanoseconds(100'000'000));
  const Status expired = EndOf(late);
  EXPECT_EQ(expired.code(), StatusCode::kDeadlineExceeded);
  EXPECT_THAT(expired.message(),
              HasSubstr("single write of 500000 bytes under id 2 to peer 0"));
  EXPECT_THAT(expired.message(), HasSubstr("into a time limit of 0.1 s"));
  // Fractions of both may have been counted.
  for (const uint32_t id : {1u, 2u}) {
    EXPECT_EQ(EndOf(write(id, {})).code(), StatusCode::kFailedPrecondition);
    EXPECT_EQ(b->engine->ImmCount(id), 0u);
  }
  ASSERT_TRUE(EndsWell(
      a->engine->SubmitSingleWrite(a->region, 0, b->address, 0, 10, 3)));
  EXPECT_TRUE(EndsWell(b->engine->ExpectImmCount(3, 1)));
}

TEST_F(TransferFaultsTest, AWaitThatExpiresSaysWhatIsMissing) {
  auto a = Open();
  auto b = Open();
  a->Connect(*b);
  ASSERT_TRUE(EndsWell(
      a->engine->SubmitSingleWrite(a->region, 0, b->address, 0, 10, 6)));
  const Status late = EndOf(b->engine->ExpectImmCount(
      6, 3, {0}, Deadline::AfterNanoseconds(200'000'000)));
  EXPECT_EQ(late.code(), StatusCode::kDeadlineExceeded);
  EXPECT_THAT(late.message(), HasSubstr("wait for 3 transfers under id 6"));
  EXPECT_THAT(late.message(),
              HasSubstr("1 of 3 transfers have come from peer 0 node0"));
  // What came is still there.
  EXPECT_TRUE(EndsWell(b->engine->ExpectImmCount(6, 1)));
  const auto cancelled = b->engine->ExpectImmCount(6, 1);
  EXPECT_TRUE(b->engine->Cancel(**cancelled));
  EXPECT_EQ(EndOf(cancelled).code(), StatusCode::kCancelled);
}

// --- Descriptions that lie ---

TEST_F(TransferFaultsTest, BadTargetsAreRefusedAtTheSender) {
  auto a = Open();
  auto b = Open({.nics = 2});
  a->Connect(*b);
  const auto write = [&](const RegionAddress& target, uint64_t from,
                         uint64_t to, uint64_t length) {
    return EndOf(
        a->engine->SubmitSingleWrite(a->region, from, target, to, length, 1));
  };
  constexpr uint64_t kBytes = TransferNode::kBytes;
  constexpr uint64_t kHuge = ~uint64_t{0};
  EXPECT_EQ(write(b->address, 0, kBytes - 1, 2).code(),
            StatusCode::kOutOfRange);
  EXPECT_EQ(write(b->address, kBytes, 0, 1).code(), StatusCode::kOutOfRange);
  EXPECT_EQ(write(b->address, 1, 0, kHuge).code(), StatusCode::kOutOfRange);
  EXPECT_EQ(write(b->address, 0, kHuge, 2).code(), StatusCode::kOutOfRange);
  EXPECT_EQ(
      EndOf(a->engine->SubmitPagedWrites(a->region, {{kHuge}, 4096, 0},
                                         b->address, {{0}, 4096, 0}, 4096, 1))
          .code(),
      StatusCode::kOutOfRange);
  // Pages that seem to follow each other, where their sizes overflow.
  constexpr uint64_t kHalf = uint64_t{1} << 63;
  const PageList halves = {{0, 1, 2}, kHalf - 1, 0};
  const PageList wraps = {{0, 1}, kHalf, 0};
  for (const PageList& pages : {halves, wraps}) {
    EXPECT_EQ(EndOf(a->engine->SubmitPagedWrites(a->region, pages, b->address,
                                                 pages, pages.stride, 1))
                  .code(),
              StatusCode::kOutOfRange);
  }
  EXPECT_EQ(
      EndOf(a->engine->SubmitPagedWrites(a->region, {{1}, 4096, 0}, b->address,
                                         {{}, 4096, 0}, 4096, 1))
          .code(),
      StatusCode::kInvalidArgument);
  RegionAddress lie = b->address;
  lie.memory.keys.pop_back();
  EXPECT_THAT(write(lie, 0, 0, 1).message(), HasSubstr("1 keys"));
  lie = b->address;
  lie.owner = RandomId::Make();
  EXPECT_EQ(write(lie, 0, 0, 1).code(), StatusCode::kUnavailable);
  EXPECT_THAT(write(a->address, 0, 0, 1).message(), HasSubstr("own"));
  // The sender believes these; the peer's NICs do not.
  lie = b->address;
  lie.memory.length *= 2;
  EXPECT_FALSE(write(lie, 0, kBytes - 1, 2).ok());
  EXPECT_EQ(EndOf(a->engine->SubmitSingleWrite(a->region, 0, b->address, 0, 1,
                                               1u << 27))
                .code(),
            StatusCode::kInvalidArgument);
  for (uint64_t i = 0; i < kBytes; ++i) ASSERT_EQ(b->data()[i], kPoison);
  EXPECT_EQ(b->engine->ImmCount(1), 0u);
  ExpectAlive(*b);
}

TEST_F(TransferFaultsTest, ATransferOfTooManyWritesIsRefused) {
  auto a = Open();
  auto b = Open();
  a->Connect(*b);
  const uint64_t pages = (uint64_t{1} << 20) + 1;
  const PageList same = {std::vector<uint64_t>(pages, 0), 1, 0};
  const Status refused = EndOf(
      a->engine->SubmitPagedWrites(a->region, same, b->address, same, 1, 1));
  EXPECT_EQ(refused.code(), StatusCode::kInvalidArgument);
  EXPECT_THAT(refused.message(), HasSubstr("2^20"));
  // Pages that follow each other are few writes, however many they are.
  PageList next = {std::vector<uint64_t>(pages - 1), 1, 0};
  for (uint64_t i = 0; i + 1 < pages; ++i) next.indices[i] = i;
  EXPECT_TRUE(EndsWell(
      a->engine->SubmitPagedWrites(a->region, next, b->address, next, 1, 2)));
}

TEST_F(TransferFaultsTest, DescriptionsAreCheckedWhenTheyAreRead) {
  auto b = Open();
  const std::string good = b->address.Encode();
  EXPECT_EQ(RegionAddress::Decode(good)->memory.keys, b->address.memory.keys);
  for (size_t size = 0; size < good.size(); ++size) {
    EXPECT_FALSE(RegionAddress::Decode(good.substr(0, size)).ok());
  }
  EXPECT_FALSE(RegionAddress::Decode(good + "x").ok());
  std::string newer = good;
  newer[4] = 8;
  EXPECT_THAT(RegionAddress::Decode(newer).status().message(),
              HasSubstr("version 8"));
}

TEST_F(TransferFaultsTest, MemoryThatIsNotThereIsNotRegistered) {
  auto a = Open();
  const auto refuse = [&](std::byte* base, uint64_t length) {
    const auto region = a->engine->RegisterMemory(base, length);
    EXPECT_EQ(region.status().code(), StatusCode::kInvalidArgument);
  };
  std::byte* freed = nullptr;
  {
    const SharedMemory memory = *SharedMemory::Create("test", 1 << 16);
    freed = memory.data();
  }
  refuse(freed, 1 << 16);
  refuse(nullptr, 10);
  refuse(a->data(), 0);
  refuse(a->data(), ~uint64_t{0});
  EXPECT_EQ(a->engine->AllocateMemory(0).status().code(),
            StatusCode::kInvalidArgument);
}

}  // namespace
}  // namespace jaxfabric
