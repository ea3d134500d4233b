#include "transport/fake.h"

#include <algorithm>
#include <cstring>

#include "tests/cpp/transport_conformance.h"

namespace jaxfabric {
namespace {

constexpr char kNetwork[] = "conformance";

std::unique_ptr<Transport> Open(FakeOptions options) {
  StatusOr<std::unique_ptr<Transport>> transport =
      OpenFakeTransport(std::move(options));
  EXPECT_TRUE(transport.ok()) << transport.status().message();
  return transport.ok() ? *std::move(transport) : nullptr;
}

TransportFactory FakeFactory(const std::string& name, FakeOptions options) {
  options.network = kNetwork;
  return {.name = name,
          .open =
              [options](const std::string& job_secret) {
                FakeOptions with_secret = options;
                with_secret.job_secret = job_secret;
                return Open(with_secret);
              },
          .kill =
              [](const Domain& domain) {
                EXPECT_TRUE(KillFakeDomain(kNetwork, domain.address()));
                EXPECT_FALSE(KillFakeDomain(kNetwork, domain.address()));
              },
          .make_foreign = [](const NetAddr&) -> NetAddr {
            auto elsewhere = Open({.network = "elsewhere"});
            return (*elsewhere->OpenDomain())->address();
          }};
}

INSTANTIATE_TEST_SUITE_P(
    Fake, TransportConformance,
    testing::Values(
        FakeFactory("Calm", {}),
        FakeFactory("Pieces", {.seed = 1, .pieces_max = 7}),
        FakeFactory("Late",
                    {.seed = 2, .pieces_max = 3, .delay_max_ns = 200'000}),
        FakeFactory("Refusing", {.seed = 3, .again_share = 0.5}),
        FakeFactory("Fencing", {.seed = 6,
                                .pieces_max = 3,
                                .delay_max_ns = 100'000,
                                .removal_fences = true}),
        FakeFactory("Shallow", {.seed = 4, .pieces_max = 2, .queue_depth = 1}),
        FakeFactory("Storm", {.seed = 5,
                              .pieces_max = 16,
                              .delay_max_ns = 1'000'000,
                              .again_share = 0.3,
                              .queue_depth = 16})),
    TransportFactoryName);

// The order in which twenty writes were delivered.
std::vector<size_t> OrderOfArrival(uint64_t seed) {
  constexpr size_t kBytes = 4096;
  auto transport = Open({.network = "order", .seed = seed, .pieces_max = 16});
  ConformanceRank from(*transport, kBytes);
  ConformanceRank to(*transport, kBytes);
  const PeerId peer = from.Add(to);
  std::vector<size_t> order;
  for (uint32_t i = 0; i < 20; ++i) {
    EXPECT_TRUE(from.domain()
                    .PostWriteImm(peer, from.Source(0), to.Target(0), 1, i, i)
                    .ok());
  }
  while (to.immediates.size() < 20) to.Poll();
  for (const Completion& one : to.immediates) order.push_back(one.immediate);
  return order;
}

TEST(FakeTest, TheSeedDecides) {
  EXPECT_EQ(OrderOfArrival(7), OrderOfArrival(7));
  EXPECT_NE(OrderOfArrival(7), OrderOfArrival(8));
}

// Whether part of a write is seen before the rest of it.
bool SeenInPieces(uint64_t seed) {
  constexpr size_t kBytes = 1 << 10;
  auto transport = Open({.network = "pieces",
                         .seed = seed,
                         .pieces_max = 64,
                         .delay_max_ns = 50'000'000});
  ConformanceRank from(*transport, kBytes);
  ConformanceRank to(*transport, kBytes);
  const PeerId peer = from.Add(to);
  std::memset(from.data(), 1, kBytes);
  EXPECT_TRUE(
      from.domain()
          .PostWriteImm(peer, from.Source(0), to.Target(0), kBytes, 1, 1)
          .ok());
  const auto arrived = [&] {
    return std::count(to.data(), to.data() + kBytes, std::byte{1});
  };
  bool partial = false;
  const Deadline deadline = Deadline::AfterSeconds(30);
  while (to.immediates.empty() && !deadline.Expired()) {
    partial |= arrived() > 0 && arrived() < static_cast<ptrdiff_t>(kBytes);
    to.Poll();
  }
  EXPECT_EQ(arrived(), static_cast<ptrdiff_t>(kBytes));
  return partial;
}

TEST(FakeTest, AWriteIsSeenInPiecesBeforeItsImmediate) {
  // A busy machine may let this thread miss all of one write's pieces.
  bool seen = false;
  for (uint64_t seed = 1; seed <= 20 && !seen; ++seed) {
    seen = SeenInPieces(seed);
  }
  EXPECT_TRUE(seen) << "no chaos: each write came in one piece";
}

TEST(FakeTest, TheSourceIsReadOnDelivery) {
  // Catches engines that reuse a source before kWriteDone.
  auto transport = Open({.network = "early-reuse"});
  ConformanceRank from(*transport, 64);
  ConformanceRank to(*transport, 64);
  const PeerId peer = from.Add(to);
  from.data()[0] = std::byte{1};
  ASSERT_TRUE(from.domain()
                  .PostWriteImm(peer, from.Source(0), to.Target(0), 1, 1, 1)
                  .ok());
  from.data()[0] = std::byte{2};
  while (to.immediates.empty()) to.Poll();
  EXPECT_EQ(to.data()[0], std::byte{2});
}

TEST(FakeTest, LargeWritesAndBadOptionsAreRefused) {
  auto transport = Open({.network = "limits", .write_bytes_max = 100});
  ConformanceRank from(*transport, 4096);
  const PeerId peer = from.Add(from);
  EXPECT_EQ(from.domain().caps().write_bytes_max, 100u);
  EXPECT_FALSE(
      from.domain()
          .PostWriteImm(peer, from.Source(0), from.Target(200), 101, 1, 1)
          .ok());
  EXPECT_FALSE(OpenFakeTransport({.pieces_max = 0}).ok());
  EXPECT_FALSE(OpenFakeTransport({.delay_max_ns = -1}).ok());
  EXPECT_FALSE(OpenFakeTransport({.again_share = 1}).ok());
  EXPECT_FALSE(OpenFakeTransport({.queue_depth = 0}).ok());
  EXPECT_FALSE(KillFakeDomain("no such network", from.domain().address()));
}

}  // namespace
}  // namespace jaxfabric
