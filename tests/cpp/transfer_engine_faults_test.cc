// What goes wrong: lost, altered and replayed handshakes, peers that die or
// fall silent, descriptions that lie, operations that run out of time.

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <atomic>
#include <cstring>
#include <mutex>

#include "engine/transfer_engine.h"
#include "tests/cpp/tampering_transport.h"
#include "tests/cpp/transfer_node.h"

namespace jaxfabric {
namespace {

using testing::HasSubstr;

class TransferFaultsTest : public testing::Test {
 protected:
  std::unique_ptr<TransferNode> Open(TransferEngineOptions options = {},
                                     Tamper tamper = nullptr,
                                     FakeOptions fake = {}) {
    if (options.job.empty()) options.job = "test";
    if (options.token.empty()) options.token = "secret";
    options.name = "node" + std::to_string(next_node_++);
    fake.network = "faults";
    auto transport = *OpenFakeTransport(fake);
    if (tamper != nullptr) {
      transport = std::make_unique<TamperingTransport>(std::move(transport),
                                                       std::move(tamper));
    }
    return std::make_unique<TransferNode>(std::move(transport), options);
  }
  // The node still does its work for others.
  void ExpectAlive(TransferNode& node) {
    auto other = Open();
    other->Connect(node);
    ASSERT_TRUE(EndsWell(other->engine->SubmitSingleWrite(
        other->region, 0, node.address, 0, 10, 77)));
    ASSERT_TRUE(EndsWell(node.engine->ExpectImmCount(77, 1)));
  }
  static void Kill(TransferNode& node) {
    const auto address = EngineAddress::Decode(node.engine->address());
    for (const NetAddr& domain : address->domains) {
      EXPECT_TRUE(KillFakeDomain("faults", domain));
    }
  }
  template <typename Predicate>
  static void Until(Predicate met) {
    const Deadline deadline = Patience();
    while (!met()) ASSERT_FALSE(deadline.Expired()) << "nothing happens";
  }

  int next_node_ = 0;
};

// --- The handshake ---

TEST_F(TransferFaultsTest, FaultALostHelloHangsForEver) {
  std::atomic<int> hellos{0};
  auto a = Open({}, [&](std::string&) {
    return hellos.fetch_add(1, std::memory_order_relaxed) >= 2;
  });
  auto b = Open();
  a->Connect(*b);
  EXPECT_EQ(hellos.load(std::memory_order_relaxed), 3);
  EXPECT_EQ(b->engine->stats().handshakes, 1u);
}

TEST_F(TransferFaultsTest, FaultALostWelcomeHangsForEver) {
  std::atomic<int> welcomes{0};
  auto a = Open();
  auto b = Open({}, [&](std::string&) {
    return welcomes.fetch_add(1, std::memory_order_relaxed) >= 2;
  });
  a->Connect(*b);
  const TransferEngineStats stats = b->engine->stats();
  EXPECT_EQ(stats.handshakes, 1u) << "a hello that came again is the same";
  EXPECT_EQ(stats.peers.size(), 1u);
  EXPECT_EQ(stats.refused_replay, 0u);
}

TEST_F(TransferFaultsTest, WhoNeverAnswersIsNamedAtTheDeadline) {
  auto a = Open({}, [](std::string&) { return false; });
  auto b = Open();
  const Status late = EndOf(a->engine->Connect(
      b->engine->address(), Deadline::AfterNanoseconds(300'000'000)));
  EXPECT_EQ(late.code(), StatusCode::kDeadlineExceeded);
  EXPECT_THAT(late.message(), HasSubstr("no answer from peer 0 node1"));
  EXPECT_THAT(late.message(), HasSubstr("into a time limit of 0.3 s"));
  Until([&] { return a->engine->stats().peers.empty(); });
}

TEST_F(TransferFaultsTest, BothMayConnectAtOnce) {
  for (int round = 0; round < 30; ++round) {
    const FakeOptions slow = {.seed = static_cast<uint64_t>(round),
                              .delay_max_ns = 1'000'000};
    auto a = Open({}, nullptr, slow);
    auto b = Open({}, nullptr, slow);
    const auto from_a = a->engine->Connect(b->engine->address());
    const auto from_b = b->engine->Connect(a->engine->address());
    ASSERT_TRUE(EndsWell(from_a));
    ASSERT_TRUE(EndsWell(from_b));
    ASSERT_TRUE(EndsWell(a->engine->SubmitSend((*from_a)->peer(), "to b")));
    ASSERT_TRUE(EndsWell(b->engine->SubmitSend((*from_b)->peer(), "to a")));
    EXPECT_EQ(b->engine->inbox().Take(Patience())->text, "to b");
    EXPECT_EQ(a->engine->inbox().Take(Patience())->text, "to a");
    for (TransferNode* node : {a.get(), b.get()}) {
      const TransferEngineStats stats = node->engine->stats();
      EXPECT_EQ(stats.peers.size(), 1u);
      EXPECT_EQ(stats.peers_lost, 0u);
    }
  }
}

TEST_F(TransferFaultsTest, BadAddressesAreRefusedHere) {
  auto b = Open();
  const std::string good = b->engine->address();
  const auto refusal = [&](TransferEngineOptions options,
                           const std::string& address) {
    auto a = Open(std::move(options));
    const auto connecting = a->engine->Connect(address);
    EXPECT_FALSE(connecting.ok());
    EXPECT_TRUE(a->engine->stats().peers.empty());
    return connecting.status();
  };
  EXPECT_EQ(refusal({.token = "guess"}, good).code(),
            StatusCode::kUnauthenticated);
  const Status other_job = refusal({.job = "other"}, good);
  EXPECT_EQ(other_job.code(), StatusCode::kPermissionDenied);
  EXPECT_THAT(other_job.message(), HasSubstr("is of job 'test'"));
  std::string other_version = good;
  other_version[4] = 9;
  EXPECT_THAT(refusal({}, other_version).message(), HasSubstr("version 9"));
  std::string altered = good;
  altered[altered.size() / 2] ^= 1;
  EXPECT_FALSE(refusal({}, altered).ok());
  EXPECT_THAT(refusal({}, "").message(), HasSubstr("not the address"));
  EXPECT_THAT(refusal({}, good + "x").message(), HasSubstr("not the address"));
  for (size_t size = 1; size < good.size(); size += 7) {
    (void)refusal({}, good.substr(0, size));
  }
  EXPECT_THAT(b->engine->Connect(good).status().message(),
              HasSubstr("own address"));
  EXPECT_TRUE(b->engine->stats().peers.empty());
  ExpectAlive(*b);
}

TEST_F(TransferFaultsTest, AStaleAddressIsRefused) {
  auto a = Open();
  auto b = Open();
  const std::string address = b->engine->address();
  b.reset();
  const Status stale = EndOf(a->engine->Connect(address));
  EXPECT_FALSE(stale.ok());
  EXPECT_THAT(stale.message(), HasSubstr("connect to node1"));
}

// Somebody who can send messages, but is no engine.
class Attacker {
 public:
  explicit Attacker(const TransferNode& victim) {
    std::vector<std::unique_ptr<Domain>> domains;
    domains.push_back(*transport_->OpenDomain());
    group_ = std::make_unique<DomainGroup>(std::move(domains));
    victim_ = *EngineAddress::Decode(victim.engine->address());
    EXPECT_TRUE(IsOk(group_->AddPeer(0, victim_.domains, Patience())));
  }
  void Send(std::string message) {
    group_->SubmitSend(0, std::move(message));
    std::vector<DomainGroup::Event> events;
    const Deadline deadline = Patience();
    while (!group_->Idle() && !deadline.Expired()) group_->Poll(&events);
  }
  Hello MakeHello() const {
    EngineAddress self = {.id = RandomId::Make(), .job = "test", .name = "eve"};
    self.domains = group_->addresses();
    return {victim_.id, RandomId::Make(), self};
  }
  static std::string Frame(const Hello& hello, std::string_view token) {
    return TransferFrame{.type = TransferFrame::Type::kHello,
                         .body = hello.Encode(token)}
        .Encode();
  }

 private:
  const std::unique_ptr<Transport> transport_ =
      *OpenFakeTransport({.network = "faults"});
  std::unique_ptr<DomainGroup> group_;
  EngineAddress victim_;
};

TEST_F(TransferFaultsTest, BadHellosAreRefusedAndCounted) {
  auto b = Open();
  Attacker eve(*b);
  const auto stats = [&] { return b->engine->stats(); };
  eve.Send("garbage");
  Until([&] { return stats().refused_other == 1; });
  eve.Send(Attacker::Frame(eve.MakeHello(), "guess"));
  Until([&] { return stats().refused_seal == 1; });
  const std::string good = Attacker::Frame(eve.MakeHello(), "secret");
  eve.Send(good.substr(0, good.size() - 1));
  Until([&] { return stats().refused_seal == 2; });
  std::string altered = good;
  altered[TransferFrame::kHeaderBytes] ^= 1;
  eve.Send(altered);
  Until([&] { return stats().refused_seal == 3; });
  std::string newer = good;
  newer[4] = 7;
  eve.Send(newer);
  Until([&] { return stats().refused_version == 1; });
  EXPECT_THAT(stats().last_refusal, HasSubstr("version 7"));
  Hello other_job = eve.MakeHello();
  other_job.sender.job = "other";
  eve.Send(Attacker::Frame(other_job, "secret"));
  Until([&] { return stats().refused_other == 2; });
  EXPECT_THAT(stats().last_refusal, HasSubstr("job 'other'"));
  Hello misled = eve.MakeHello();
  misled.target = RandomId::Make();
  eve.Send(Attacker::Frame(misled, "secret"));
  Until([&] { return stats().refused_other == 3; });
  eve.Send(TransferFrame{.type = TransferFrame::Type::kBarrier}.Encode());
  Until([&] { return stats().strangers_dropped == 1; });
  EXPECT_TRUE(stats().peers.empty());
  EXPECT_EQ(stats().handshakes, 0u);
  ExpectAlive(*b);
}

TEST_F(TransferFaultsTest, AReplayedHelloIsRefused) {
  std::mutex mutex;
  std::string hello;
  auto a = Open({}, [&](std::string& message) {
    std::lock_guard<std::mutex> lock(mutex);
    if (hello.empty()) hello = message;
    return true;
  });
  auto b = Open();
  const uint32_t peer = a->Connect(*b);
  // The bytes that an engine sends have a frame of the group around them.
  const size_t begin = hello.find("JFTF");
  ASSERT_NE(begin, std::string::npos);
  hello = hello.substr(begin);
  ASSERT_TRUE(IsOk(a->engine->Disconnect(peer)));
  Until([&] { return b->engine->stats().peers.empty(); });
  Attacker eve(*b);
  eve.Send(hello);
  Until([&] { return b->engine->stats().refused_replay == 1; });
  EXPECT_TRUE(b->engine->stats().peers.empty());
  EXPECT_EQ(b->engine->stats().handshakes, 1u);
  // Its first sender is welcome, with a new one.
  a->Connect(*b);
  EXPECT_EQ(b->engine->stats().handshakes, 2u);
}

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

// --- Ends of operations ---

TEST_F(TransferFaultsTest, FaultErrorCallbackWhileOtherWritesStillRun) {
  auto a = Open({.nics = 2}, nullptr,
                {.delay_max_ns = 30'000'000, .write_bytes_max = 2000});
  auto b = Open();
  auto c = Open();
  a->Connect(*b);
  a->Connect(*c);
  const RegionId gone = *b->engine->AllocateMemory(100);
  const RegionAddress stale = *b->engine->Describe(gone);
  ASSERT_TRUE(EndsWell(b->engine->UnregisterMemory(gone)));
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
