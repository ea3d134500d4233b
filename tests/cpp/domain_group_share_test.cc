// How a DomainGroup shares links and peers: slow links, peers that never
// finish, messages beside full queues. By a simulated clock.

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <cstring>

#include "engine/domain_group.h"
#include "engine/immediate.h"
#include "tests/cpp/group_node.h"
#include "tests/cpp/seeded.h"
#include "transport/fake_link.h"

namespace jaxfabric {
namespace {

constexpr uint64_t kMiB = uint64_t{1} << 20;

FakeOptions Options(int64_t delay_max_ns = 50'000) {
  return {.network = "share",
          .seed = 1,
          .delay_max_ns = delay_max_ns,
          .clock_ns = SimulatedClock::Now};
}

// A sender whose Domains have these rates, in bytes per second.
struct Paced {
  Paced(const std::vector<double>& rates, size_t there, uint64_t bytes)
      : from(Options(), rates.size(), bytes), to(Options(), there, bytes) {
    from.Connect(1, to);
    to.Connect(0, from);
    const auto addresses = from.group->addresses();
    for (size_t i = 0; i < rates.size(); ++i) {
      EXPECT_TRUE(PaceFakeDomain(from.network, addresses[i], rates[i]));
      sum += rates[i];
    }
  }
  // Sends `pieces` and returns the rate as a share of the sum of the links.
  double Share(const std::vector<Piece>& pieces) {
    uint64_t bytes = 0;
    for (const Piece& piece : pieces) bytes += piece.length;
    const int64_t start_ns = clock.Now();
    const uint32_t id = next_id++;
    bool done = false;
    EXPECT_TRUE(from.group
                    ->SubmitWrite(1, from.local, to.remote, pieces, id,
                                  [&](const Status&) { done = true; })
                    .ok());
    EXPECT_TRUE(clock.Run({&from, &to}, [&] {
      return done && to.units[{0, id}] == kTransferUnits;
    }));
    const double took_s = static_cast<double>(clock.Now() - start_ns) * 1e-9;
    return static_cast<double>(bytes) / took_s / sum;
  }

  SimulatedClock clock;
  GroupNode from;
  GroupNode to;
  double sum = 0;
  uint32_t next_id = 0;
};

TEST(DomainGroupShareTest, ThreeFastLinksAndASlowOne) {
  Paced paced({125e6, 125e6, 125e6, 31.25e6}, 4, 64 * kMiB);
  // The first transfer has to find out.
  EXPECT_GE(paced.Share({{0, 0, 64 * kMiB}}), 0.95);
  EXPECT_GE(paced.Share({{0, 0, 64 * kMiB}}), 0.97);
  EXPECT_GE(paced.Share({{0, 0, 16 * kMiB}}), 0.95);
  EXPECT_GE(paced.Share({{0, 0, 5 * kMiB + 77}}), 0.90);
}

TEST(DomainGroupShareTest, AVerySlowLinkHoldsNobodyUp) {
  Paced paced({125e6, 1e6}, 2, 16 * kMiB);
  (void)paced.Share({{0, 0, 16 * kMiB}});
  for (int i = 0; i < 5; ++i) {
    EXPECT_GE(paced.Share({{0, 0, 16 * kMiB}}), 0.93);
  }
}

TEST(DomainGroupShareTest, ALinkThatBecomesSlowAndFastAgain) {
  Paced paced({125e6, 125e6}, 2, 32 * kMiB);
  EXPECT_GE(paced.Share({{0, 0, 32 * kMiB}}), 0.97);
  const NetAddr second = paced.from.group->addresses()[1];
  ASSERT_TRUE(PaceFakeDomain("share", second, 25e6));
  paced.sum = 150e6;
  (void)paced.Share({{0, 0, 32 * kMiB}});
  EXPECT_GE(paced.Share({{0, 0, 32 * kMiB}}), 0.95);
  ASSERT_TRUE(PaceFakeDomain("share", second, 125e6));
  paced.sum = 250e6;
  for (int i = 0; i < 3; ++i) (void)paced.Share({{0, 0, 32 * kMiB}});
  EXPECT_GE(paced.Share({{0, 0, 32 * kMiB}}), 0.95);
}

TEST(DomainGroupShareTest, PagesAreSharedToo) {
  Paced paced({125e6, 125e6, 125e6, 31.25e6}, 4, 16 * kMiB);
  std::vector<Piece> pages;
  for (uint64_t at = 0; at < 16 * kMiB; at += 8192) {
    pages.push_back({at, at, 8192});
  }
  (void)paced.Share(pages);
  EXPECT_GE(paced.Share(pages), 0.95);
}

class EvenLinksTest : public testing::TestWithParam<std::pair<size_t, size_t>> {
};

TEST_P(EvenLinksTest, EachOfOurDomainsWorksAndTheirsAreAllReached) {
  const auto [here, there] = GetParam();
  Paced paced(std::vector<double>(here, 100e6), there, 32 * kMiB);
  EXPECT_GE(paced.Share({{0, 0, 32 * kMiB}}), 0.95);
  for (const DomainStats& one : paced.from.group->stats()) {
    const double share = static_cast<double>(one.write_bytes) *
                         static_cast<double>(here) / (32.0 * kMiB);
    EXPECT_NEAR(share, 1, 0.2);
  }
  EXPECT_EQ(paced.from.Total().write_bytes, 32 * kMiB);
}

INSTANTIATE_TEST_SUITE_P(Domains, EvenLinksTest,
                         testing::Values(std::pair(1, 1), std::pair(2, 2),
                                         std::pair(4, 4), std::pair(8, 8),
                                         std::pair(1, 4), std::pair(4, 1),
                                         std::pair(8, 3), std::pair(3, 8)),
                         [](const auto& info) {
                           return std::to_string(info.param.first) + "To" +
                                  std::to_string(info.param.second);
                         });

TEST(DomainGroupShareTest, SmallTransfersGoWholeToTheLeastLoaded) {
  Paced paced({100e6, 100e6}, 2, 4 * kMiB);
  for (int i = 0; i < 20; ++i) (void)paced.Share({{0, 0, kSplitBytes}});
  EXPECT_EQ(paced.from.Total().writes, 20u);
  for (const DomainStats& one : paced.from.group->stats()) {
    EXPECT_EQ(one.writes, 10u) << "in turn, where loads are equal";
  }
}

TEST(DomainGroupShareTest, ASmallTransferDoesNotWaitForALargeOne) {
  Paced paced({100e6, 100e6}, 2, 64 * kMiB);
  const auto large =
      paced.from.group->SubmitWrite(1, paced.from.local, paced.to.remote,
                                    Pieces{{0, 0, 64 * kMiB}}, 100, nullptr);
  ASSERT_TRUE(large.ok());
  const int64_t start_ns = SimulatedClock::Now();
  (void)paced.Share({{0, 0, 100}});
  EXPECT_LT(SimulatedClock::Now() - start_ns, 60'000'000);
  EXPECT_LT((paced.to.units[{0, 100}]), kTransferUnits);
}

// One sender with several peers, some of whom never complete anything.
class StuckPeersTest : public testing::Test {
 protected:
  static constexpr uint64_t kBytes = 8 * kMiB;

  void Open(size_t domains, uint32_t queue_depth, uint32_t peers) {
    FakeOptions options = Options();
    options.queue_depth = queue_depth;
    from = std::make_unique<GroupNode>(options, domains, kBytes);
    for (uint32_t name = 0; name < peers; ++name) {
      to.push_back(std::make_unique<GroupNode>(options, domains, kBytes));
      from->Connect(name, *to.back());
      to.back()->Connect(99, *from);
    }
  }
  void Stick(uint32_t name) {
    const auto ours = from->group->addresses();
    const auto theirs = to[name]->group->addresses();
    for (size_t i = 0; i < ours.size(); ++i) {
      ASSERT_TRUE(StallFakeLink(from->network, ours[i], theirs[i]));
    }
  }
  void Submit(uint32_t name, uint64_t length, uint32_t id) {
    ASSERT_TRUE(from->group
                    ->SubmitWrite(name, from->local, to[name]->remote,
                                  Pieces{{0, 0, length}}, id, nullptr)
                    .ok());
  }

  SimulatedClock clock;
  std::unique_ptr<GroupNode> from;
  std::vector<std::unique_ptr<GroupNode>> to;
};

TEST_F(StuckPeersTest, WritesThatNeverCompleteBlockNoOtherPeer) {
  for (const size_t domains : {1, 2}) {
    to.clear();
    Open(domains, 64, 8);
    for (uint32_t name = 0; name < 7; ++name) {
      Stick(name);
      for (uint32_t id = 0; id < 300; ++id) Submit(name, 100, id);
      Submit(name, kBytes, 300);
    }
    for (uint32_t id = 0; id < 300; ++id) Submit(7, 100, id);
    Submit(7, kBytes, 300);
    EXPECT_TRUE(clock.Run(
        {from.get(), to[7].get()},
        [&] {
          return to[7]->units.size() == 301 &&
                 to[7]->units[{99, 300}] == kTransferUnits;
        },
        5))
        << domains << " Domains: a peer waits for others' writes";
  }
}

TEST_F(StuckPeersTest, AFullQueueDelaysNoMessage) {
  for (const uint32_t queue_depth : {2, 16, 256}) {
    to.clear();
    Open(1, queue_depth, 2);
    Stick(0);
    for (uint32_t id = 0; id < 1000; ++id) Submit(0, 100, id);
    for (uint32_t id = 0; id < 1000; ++id) Submit(1, 5000, id);
    bool sent = false;
    from->group->SubmitSend(1, "ping",
                            [&](const Status& status) { sent = status.ok(); });
    const int64_t start_ns = SimulatedClock::Now();
    ASSERT_TRUE(clock.Run({from.get(), to[1].get()},
                          [&] { return sent && to[1]->messages.size() == 1; }));
    EXPECT_LT(SimulatedClock::Now() - start_ns, 1'000'000);
    EXPECT_LT(to[1]->units.size(), 1000u) << "it waited for all writes";
  }
}

TEST_F(StuckPeersTest, PeersShareADomainEvenly) {
  Open(1, 256, 3);
  ASSERT_TRUE(PaceFakeDomain("share", from->group->addresses()[0], 100e6));
  for (uint32_t id = 0; id < 8; ++id) {
    for (uint32_t name = 0; name < 3; ++name) Submit(name, kBytes, id);
  }
  clock.RunFor({from.get(), to[0].get(), to[1].get(), to[2].get()}, 0.96);
  for (uint32_t name = 0; name < 3; ++name) {
    uint64_t units = 0;
    for (const auto& [key, one] : to[name]->units) units += one;
    EXPECT_NEAR(static_cast<double>(units) / kTransferUnits, 4, 0.7);
  }
}

}  // namespace
}  // namespace jaxfabric
