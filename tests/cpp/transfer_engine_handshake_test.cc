// Handshakes that are lost, altered, replayed, or meant for others.

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <atomic>
#include <map>
#include <mutex>

#include "engine/transfer_engine.h"
#include "tests/cpp/transfer_faults.h"

namespace jaxfabric {
namespace {

using testing::HasSubstr;

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

// Either side: what could not be added for lack of time is tried again.
TEST_F(TransferFaultsTest, WhoCannotBeAddedForNowIsAddedLater) {
  for (const bool at_target : {false, true}) {
    std::atomic<int> refusals{2};
    const RefuseAdd busy = [&] {
      return refusals.fetch_sub(1, std::memory_order_relaxed) > 0
                 ? Status(StatusCode::kDeadlineExceeded, "busy")
                 : OkStatus();
    };
    auto a = Open({}, nullptr, {}, at_target ? nullptr : busy);
    auto b = Open({}, nullptr, {}, at_target ? busy : nullptr);
    const uint32_t peer = a->Connect(*b);
    EXPECT_LE(refusals.load(std::memory_order_relaxed), 0);
    ASSERT_TRUE(EndsWell(a->engine->SubmitSend(peer, "hello")));
    EXPECT_EQ(b->engine->inbox().Take(Patience())->text, "hello");
    EXPECT_EQ(b->engine->stats().refused_replay, 0u);
  }
}

// What fails for another reason is refused, but not for ever: the same Hello
// may come again.
TEST_F(TransferFaultsTest, AHelloThatFailedIsNoReplayWhenItComesAgain) {
  std::atomic<int> refusals{1};
  auto a = Open();
  auto b = Open({}, nullptr, {}, [&] {
    return refusals.fetch_sub(1, std::memory_order_relaxed) > 0
               ? Status(StatusCode::kUnavailable, "no way to it")
               : OkStatus();
  });
  a->Connect(*b);
  EXPECT_EQ(b->engine->stats().refused_other, 1u);
  EXPECT_EQ(b->engine->stats().refused_replay, 0u);
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
    Take(events);
  }
  // How many frames of this type have come before the next pong.
  int CountBeforePong(TransferFrame::Type type) {
    Send(TransferFrame{.type = TransferFrame::Type::kPing}.Encode());
    const Deadline deadline = Patience();
    while (!came_[TransferFrame::Type::kPong] && !deadline.Expired()) {
      std::vector<DomainGroup::Event> events;
      group_->Poll(&events);
      Take(events);
    }
    EXPECT_FALSE(deadline.Expired()) << "no pong, but " << came_[type];
    return came_[type];
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
  void Take(const std::vector<DomainGroup::Event>& events) {
    for (const DomainGroup::Event& event : events) {
      const auto frame = TransferFrame::Decode(event.message);
      if (frame.ok()) ++came_[frame->type];
    }
  }

  std::map<TransferFrame::Type, int> came_;
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

// --- Peers that have the token, and mean no good ---

TEST_F(TransferFaultsTest, AHelloWithTheAddressesOfAnotherEngineIsRefused) {
  auto a = Open();
  auto b = Open();
  const uint32_t peer = a->Connect(*b);
  Attacker eve(*b);
  Hello theft = eve.MakeHello();
  theft.sender.domains = EngineAddress::Decode(a->engine->address())->domains;
  eve.Send(Attacker::Frame(theft, "secret"));
  Until([&] { return b->engine->stats().refused_other == 1; });
  EXPECT_THAT(b->engine->stats().last_refusal, HasSubstr("another peer"));
  ASSERT_TRUE(EndsWell(a->engine->SubmitSend(peer, "me")));
  EXPECT_EQ(b->engine->inbox().Take(Patience())->peer, 0u);
  EXPECT_EQ(b->engine->stats().peers.size(), 1u);
}

TEST_F(TransferFaultsTest, APeerSpoilsNoIdOfAnother) {
  auto a = Open();
  auto b = Open();
  a->Connect(*b);
  Attacker eve(*b);
  eve.Send(Attacker::Frame(eve.MakeHello(), "secret"));
  Until([&] { return b->engine->stats().handshakes == 2; });
  const auto waiting = b->engine->ExpectImmCount(7, 1);
  eve.Send(
      TransferFrame{.type = TransferFrame::Type::kSpoilt, .a = 7}.Encode());
  eve.CountBeforePong(TransferFrame::Type::kPong);
  ASSERT_TRUE(EndsWell(
      a->engine->SubmitSingleWrite(a->region, 0, b->address, 0, 10, 7)));
  EXPECT_TRUE(EndsWell(waiting));
}

TEST_F(TransferFaultsTest, WhoAsksFasterThanItListensIsAnsweredOnce) {
  using Type = TransferFrame::Type;
  auto b = Open({}, nullptr, {.delay_max_ns = 20'000'000, .queue_depth = 4});
  Attacker eve(*b);
  const std::string hello = Attacker::Frame(eve.MakeHello(), "secret");
  eve.Send(hello);
  Until([&] { return b->engine->stats().handshakes == 1; });
  for (int i = 0; i < 50; ++i) eve.Send(hello);
  EXPECT_LT(eve.CountBeforePong(Type::kWelcome), 10);
  Attacker bob(*b);
  bob.Send(Attacker::Frame(bob.MakeHello(), "secret"));
  Until([&] { return b->engine->stats().handshakes == 2; });
  for (uint64_t i = 1; i <= 50; ++i) {
    bob.Send(TransferFrame{.type = Type::kWithdraw, .a = i, .b = 3}.Encode());
  }
  EXPECT_LT(bob.CountBeforePong(Type::kWithdrawn), 10);
}

TEST_F(TransferFaultsTest, NamesThatAreNoTextAreRefused) {
  for (const std::string bad :
       {"a\nb", "\x7f", "\xff", "\xc3", "\xc0\x80", "\xed\xa0\x80",
        "\xf4\x90\x80\x80", "\xe2\x82"}) {
    const EngineAddress address = {
        .id = RandomId::Make(), .job = "j", .name = bad, .domains = {{"d"}}};
    EXPECT_FALSE(EngineAddress::Decode(address.Encode("t")).ok()) << bad;
    EXPECT_FALSE(
        TransferEngine::Open({.job = bad}, *OpenFakeTransport({.network = "n"}))
            .ok());
  }
  for (const std::string good :
       {"", "worker-0", "\xc3\xbc", "\xe2\x82\xac", "\xf0\x9f\x90\x8d"}) {
    const EngineAddress address = {
        .id = RandomId::Make(), .job = "j", .name = good, .domains = {{"d"}}};
    EXPECT_TRUE(EngineAddress::Decode(address.Encode("t")).ok()) << good;
  }
}

}  // namespace
}  // namespace jaxfabric
