#include "engine/engine.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <algorithm>
#include <array>
#include <cstring>

#include "engine/immediate.h"
#include "tests/cpp/engine_cluster.h"
#include "tests/cpp/seeded.h"
#include "transport/fake.h"
#include "transport/shm.h"

namespace jaxfabric {
namespace {

using testing::ElementsAre;
using testing::HasSubstr;

constexpr MatchKey kKey = {.channel = 1, .sequence = 0};
constexpr char kNetwork[] = "engine";

std::unique_ptr<Transport> OpenShm() {
  return *OpenShmTransport({.job_secret = "test"});
}
EngineCluster::OpenTransport Fake(FakeOptions options) {
  options.network = kNetwork;
  return [options] { return *OpenFakeTransport(options); };
}
FakeOptions Chaos(uint64_t seed) {
  return {.seed = seed,
          .pieces_max = 4,
          .delay_max_ns = 200'000,
          .again_share = 0.2,
          .queue_depth = 16};
}

struct Kind {
  std::string name;
  EngineCluster::OpenTransport open;
  uint32_t domains = 1;
};

class EngineTest : public testing::TestWithParam<Kind> {
 protected:
  EngineCluster Open(uint32_t ranks,
                     const EngineCluster::Configure& configure = nullptr) {
    return EngineCluster(ranks, GetParam().open, [&](EngineOptions& options) {
      options.domains_per_rank = GetParam().domains;
      if (configure) configure(options);
    });
  }
};

INSTANTIATE_TEST_SUITE_P(
    Kinds, EngineTest,
    testing::Values(Kind{"Shm", OpenShm}, Kind{"ShmTwoDomains", OpenShm, 2},
                    Kind{"Fake", Fake({})}, Kind{"FakeChaos", Fake(Chaos(1))},
                    Kind{"FakeChaosFourDomains", Fake(Chaos(2)), 4}),
    [](const auto& info) { return info.param.name; });

// Many calls under way at once, in an order of its own on each rank; lengths
// from nothing to half a mailbox.
TEST_P(EngineTest, CallsInAnyOrderGetTheirOwnBytes) {
  Seeded seeded;
  constexpr uint32_t kRanks = 3;
  constexpr uint64_t kChannels = 40;
  EngineCluster cluster = Open(kRanks, [](EngineOptions& options) {
    options.mailbox_bytes = 5000;  // no multiple of a cache line
  });
  const auto bytes_of = [](uint64_t channel) {
    return [channel](uint32_t from, uint32_t to) -> uint64_t {
      const uint64_t mixed = channel * 7 + uint64_t{from} * 3 + to;
      return mixed % 4 == 0 ? 0 : mixed * 977 % (mixed % 5 == 0 ? 2500 : 200);
    };
  };
  std::vector<EndedCall> calls;
  for (uint32_t rank = 0; rank < kRanks; ++rank) {
    std::vector<uint64_t> channels(kChannels);
    for (uint64_t i = 0; i < kChannels; ++i) channels[i] = i;
    // Calls that all ranks start late fill mailboxes; no rank starts one while
    // more than a mailbox of others waits for it, so the shuffle is local.
    for (auto at = channels.begin(); at != channels.end(); at += 8) {
      std::shuffle(at, at + 8, seeded.random());
    }
    for (const uint64_t channel : channels) {
      calls.push_back(StartCall(cluster[rank], {.rank = rank,
                                                .key = {channel, channel % 3},
                                                .peers = cluster.Others(rank),
                                                .bytes = bytes_of(channel)}));
    }
  }
  for (EndedCall& call : calls) {
    const Status status = Await(call);
    EXPECT_TRUE(status.ok()) << status.message();
  }
}

// More messages than a mailbox has slots, and more bytes than it has room for:
// the sender runs ahead until credit ends.
TEST_P(EngineTest, ASenderFarAheadWaitsForCredit) {
  EngineCluster cluster =
      Open(2, [](EngineOptions& options) { options.mailbox_bytes = 4096; });
  constexpr uint64_t kMessages = uint64_t{3} * kMailboxSlots;
  const auto bytes = [](uint32_t, uint32_t) -> uint64_t { return 70; };
  std::vector<EndedCall> calls;
  for (uint64_t i = 0; i < kMessages; ++i) {
    calls.push_back(StartCall(cluster[0], {.rank = 0,
                                           .key = {1, i},
                                           .peers = {1},
                                           .bytes = bytes,
                                           .waits = false}));
  }
  for (uint64_t i = 0; i < kMessages; ++i) {
    calls.push_back(StartCall(cluster[1], {.rank = 1,
                                           .key = {1, i},
                                           .peers = {0},
                                           .bytes = bytes,
                                           .sends = false}));
  }
  for (EndedCall& call : calls) {
    const Status status = Await(call);
    EXPECT_TRUE(status.ok()) << status.message();
  }
  const PeerStats stats = cluster[0].endpoint(0)->stats().at(1);
  EXPECT_EQ(stats.messages_sent, kMessages);
  EXPECT_EQ(stats.message_bytes_sent, kMessages * 70);
  EXPECT_GT(stats.control_messages, 0u) << "credit never ran out";
}

TEST_P(EngineTest, MessagesAsLargeAsTheMailboxGoOneAfterTheOther) {
  constexpr uint64_t kBytes = 4097;
  EngineCluster cluster =
      Open(2, [](EngineOptions& options) { options.mailbox_bytes = kBytes; });
  std::vector<EndedCall> calls;
  for (uint64_t i = 0; i < 6; ++i) {
    calls.push_back(cluster.Start(0, {1, i}, kBytes));
    calls.push_back(cluster.Start(1, {1, i}, kBytes));
  }
  for (EndedCall& call : calls) {
    const Status status = Await(call);
    EXPECT_TRUE(status.ok()) << status.message();
  }
}

TEST_P(EngineTest, FaultARankWithoutTokensHangsTheWorld) {
  EngineCluster cluster = Open(3);
  std::vector<EndedCall> calls;
  for (uint32_t rank = 0; rank < 3; ++rank) {
    calls.push_back(
        StartCall(cluster[rank], {.rank = rank,
                                  .key = kKey,
                                  .peers = cluster.Others(rank),
                                  .bytes = [](uint32_t from, uint32_t) {
                                    return from == 1 ? 0u : 99u;
                                  }}));
  }
  for (EndedCall& call : calls) EXPECT_TRUE(Await(call).ok());
}

TEST_P(EngineTest, FaultFlagsLeftStaleByAnEmptyStep) {
  EngineCluster cluster = Open(2);
  for (uint64_t step = 0; step < 20; ++step) {
    cluster.ExpectCallWorks({1, step}, step % 2 == 0 ? 0 : 300 + step);
  }
}

TEST_P(EngineTest, FaultEmptyListOfPeers) {
  EngineCluster cluster = Open(2);
  EndedCall alone = StartCall(cluster[0], {.rank = 0, .key = kKey});
  EXPECT_TRUE(Await(alone).ok());
}

TEST_P(EngineTest, PutsLandAndAreCounted) {
  constexpr uint32_t kPuts = 50;
  constexpr uint64_t kBytes = 333;
  EngineCluster cluster = Open(2);
  const uint64_t window = *cluster[0].AllocateWindow(kPuts * kBytes);
  EXPECT_EQ(*cluster[1].AllocateWindow(kPuts * kBytes), window);
  std::vector<std::byte> source(kPuts * kBytes);
  for (size_t i = 0; i < source.size(); ++i) {
    source[i] = MessageByte(0, 1, kKey, i);
  }
  std::promise<void> all_here;
  EXPECT_NE(cluster[1].endpoint(1)->window_counters().Expect(
                7, kPuts, [&] { all_here.set_value(); }),
            0u);
  auto ended = std::make_shared<std::promise<Status>>();
  {
    const OperationPtr operation = *cluster[0].Begin(
        "put", 0, [ended](const Status& status) { ended->set_value(status); });
    for (uint32_t i = 0; i < kPuts; ++i) {
      cluster[0].endpoint(0)->Put(
          1, {{source.data() + i * kBytes, window + i * kBytes, kBytes}}, 7,
          operation);
    }
  }
  EndedCall call = ended->get_future();
  EXPECT_TRUE(Await(call).ok());
  ASSERT_EQ(all_here.get_future().wait_for(std::chrono::seconds(60)),
            std::future_status::ready);
  const Endpoint& target = *cluster[1].endpoint(1);
  EXPECT_EQ(std::memcmp(target.heap() + target.heap_layout().Windows() + window,
                        source.data(), source.size()),
            0);
  EXPECT_EQ(cluster[1].endpoint(1)->window_counters().Transfers(7), 0u);
  EXPECT_TRUE(
      cluster[0].Drain(Deadline::AfterSeconds(kEnginePatienceSeconds)).ok());
}

TEST_P(EngineTest, ADeadlineNamesTheMissingRankAndReachesThePeers) {
  EngineCluster cluster = Open(3);
  // Rank 2 never calls. Rank 1 would wait much longer.
  EndedCall patient = cluster.Start(1, kKey, 8);
  EndedCall hasty = cluster.Start(0, kKey, 8, /*timeout_s=*/0.2);
  const Status expired = Await(hasty);
  EXPECT_EQ(expired.code(), StatusCode::kDeadlineExceeded);
  EXPECT_THAT(expired.message(), HasSubstr("test call"));
  EXPECT_THAT(expired.message(), HasSubstr("waiting for rank 2"));
  EXPECT_THAT(expired.message(), HasSubstr("timeout_s="));
  const Status told = Await(patient);
  EXPECT_EQ(told.code(), StatusCode::kDeadlineExceeded);
  EXPECT_THAT(told.message(), HasSubstr("rank 0 gave up"));
  EXPECT_TRUE(cluster[1].lost_ranks().empty());
  // It is over for good.
  EndedCall after = cluster.Start(0, {1, 1}, 8);
  EXPECT_EQ(Await(after).code(), StatusCode::kDeadlineExceeded);
}

TEST_P(EngineTest, AMessageThatFitsNoMailboxFailsAllRanksAtOnce) {
  EngineCluster cluster =
      Open(2, [](EngineOptions& options) { options.mailbox_bytes = 4096; });
  const auto start = [&](uint32_t rank) {
    return StartCall(cluster[rank], {.rank = rank,
                                     .key = kKey,
                                     .peers = {1 - rank},
                                     .bytes = [](uint32_t from, uint32_t) {
                                       return uint64_t{from} * 5000;
                                     }});
  };
  // What rank 1 waits for comes, so that its own call is over.
  EndedCall waits = start(0);
  EndedCall too_large = start(1);
  for (EndedCall* call : {&too_large, &waits}) {
    const Status status = Await(*call);
    EXPECT_EQ(status.code(), StatusCode::kResourceExhausted);
    EXPECT_THAT(status.message(), HasSubstr("does not fit a mailbox"));
  }
}

TEST_P(EngineTest, WhoClosesFailsThoseThatStillNeedIt) {
  EngineCluster cluster = Open(2);
  cluster.ExpectCallWorks(kKey, 8);
  EndedCall waiting = cluster.Start(0, {1, 1}, 8);
  cluster[1].SayGoodbye();
  cluster.Close(1);
  const Status status = Await(waiting);
  EXPECT_THAT(status.message(), HasSubstr("rank 1 is lost"));
  EXPECT_THAT(status.message(), HasSubstr("closed its Fabric"));
}

TEST_P(EngineTest, WhoSaysGoodbyeDisturbsNobody) {
  EngineCluster cluster = Open(3);
  for (uint64_t i = 0; i < 5; ++i) cluster.ExpectCallWorks({1, i}, 8);
  EXPECT_TRUE(
      cluster[1].Drain(Deadline::AfterSeconds(kEnginePatienceSeconds)).ok());
  cluster[1].SayGoodbye();
  cluster.Close(1);
  const auto one = [](uint32_t, uint32_t) -> uint64_t { return 1; };
  for (uint64_t i = 0; i < 30; ++i) {
    EndedCall a = StartCall(
        cluster[0], {.rank = 0, .key = {2, i}, .peers = {2}, .bytes = one});
    EndedCall b = StartCall(
        cluster[2], {.rank = 2, .key = {2, i}, .peers = {0}, .bytes = one});
    EXPECT_TRUE(Await(a).ok());
    EXPECT_TRUE(Await(b).ok());
  }
  EXPECT_TRUE(cluster[0].failure().ok()) << cluster[0].failure().message();
  EXPECT_TRUE(cluster[2].lost_ranks().empty());
}

TEST_P(EngineTest, ClosingEndsWhatIsUnderWay) {
  EngineCluster cluster = Open(2);
  EndedCall waiting = cluster.Start(0, kKey, 8);
  cluster.Close(0);
  EXPECT_THAT(Await(waiting).message(), HasSubstr("'test' was closed"));
}

TEST_P(EngineTest, SeveralRanksOfOneEngine) {
  EngineOptions options = RankOptions(3, 0);
  options.local_ranks = {0, 1, 2};
  options.domains_per_rank = GetParam().domains;
  auto engine = *Engine::Open(options, GetParam().open());
  for (uint32_t rank = 0; rank < 3; ++rank) {
    ASSERT_TRUE(engine
                    ->Connect(rank, *engine->LocalAddress(rank),
                              Deadline::AfterSeconds(kEnginePatienceSeconds))
                    .ok());
  }
  for (uint64_t i = 0; i < 10; ++i) {
    std::vector<EndedCall> calls;
    for (uint32_t rank = 0; rank < 3; ++rank) {
      calls.push_back(StartCall(
          *engine, {.rank = rank,
                    .key = {1, i},
                    .peers = {(rank + 1) % 3, (rank + 2) % 3},
                    .bytes = [i](uint32_t, uint32_t) { return i * 100; }}));
    }
    for (EndedCall& call : calls) EXPECT_TRUE(Await(call).ok());
  }
}

// Calm fake, for faults that only it can bring.
class FakeEngineTest : public testing::Test {
 protected:
  static void Kill(Engine& engine, uint32_t rank) {
    const auto address = RankAddress::Decode(*engine.LocalAddress(rank));
    ASSERT_TRUE(address.ok());
    for (const NetAddr& domain : address->domains) {
      EXPECT_TRUE(KillFakeDomain(kNetwork, domain));
    }
  }
};

TEST_F(FakeEngineTest, AKilledPeerFailsCallsAtOnceAndIsNamed) {
  EngineCluster cluster(3, Fake({}));
  cluster.ExpectCallWorks(kKey, 8);
  EndedCall a = cluster.Start(0, {1, 1}, 8);
  EndedCall b = cluster.Start(1, {1, 1}, 8);
  const int64_t begin_ns = MonotonicNanoseconds();
  Kill(cluster[2], 2);
  for (EndedCall* call : {&a, &b}) {
    const Status status = Await(*call);
    EXPECT_EQ(status.code(), StatusCode::kUnavailable);
    EXPECT_THAT(status.message(), HasSubstr("rank 2 is lost"));
  }
  EXPECT_LT(MonotonicNanoseconds() - begin_ns,
            static_cast<int64_t>(kEnginePatienceSeconds * 0.5e9));
  EXPECT_THAT(cluster[0].lost_ranks(), ElementsAre(2));
  EXPECT_THAT(cluster[1].lost_ranks(), ElementsAre(2));
}

TEST_F(FakeEngineTest, FaultALostHandshakeHangsForEver) {
  auto engine = *Engine::Open(RankOptions(2, 0), Fake({})());
  std::string address;
  {
    auto gone = *Engine::Open(RankOptions(2, 1), Fake({})());
    address = *gone->LocalAddress(1);
  }
  const Status status = engine->Connect(1, address, Deadline::AfterSeconds(1));
  EXPECT_FALSE(status.ok());
  EXPECT_THAT(status.message(), HasSubstr("connecting to rank 1"));
  EXPECT_THAT(engine->Connect(1, "nonsense", Deadline()).message(),
              HasSubstr("connecting to rank 1"));
}

TEST_F(FakeEngineTest, ADrainSaysWhatIsLeft) {
  EngineCluster cluster(2, Fake({.delay_max_ns = 2'000'000'000}));
  const EndedCall call = cluster.Start(0, kKey, 30'000);
  EXPECT_TRUE(call.valid());
  EXPECT_EQ(cluster[0].Drain(Deadline::AfterSeconds(0.01)).code(),
            StatusCode::kDeadlineExceeded);
}

TEST_F(FakeEngineTest, WindowsThatDoNotFitAreRefused) {
  auto engine = *Engine::Open(RankOptions(1, 0), Fake({})());
  EXPECT_EQ(*engine->AllocateWindow(100), 0u);
  EXPECT_EQ(*engine->AllocateWindow((1 << 16) - 128), 128u);
  const auto refused = engine->AllocateWindow(1);
  EXPECT_EQ(refused.status().code(), StatusCode::kResourceExhausted);
  EXPECT_THAT(refused.status().message(), HasSubstr("JAXFABRIC_WINDOW_BYTES"));
  EXPECT_EQ(engine->endpoint(7), nullptr);
  EXPECT_FALSE(engine->LocalAddress(7).ok());
}

}  // namespace
}  // namespace jaxfabric
