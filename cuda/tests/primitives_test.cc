// Barrier, put and wait between the ranks of one process.

#include <gmock/gmock.h>

#include <chrono>
#include <numeric>

#include "primitive_kernels.h"
#include "tests/cluster.h"

namespace jaxfabric::cuda {
namespace {

using ::testing::HasSubstr;

constexpr uint64_t kWindowBytes = 1 << 20;

class PrimitivesTest : public ::testing::Test {
 protected:
  void SetUp() override {
    const std::string missing = Missing(2);
    if (!missing.empty()) GTEST_SKIP() << missing;
    cluster_ = std::make_unique<Cluster>(2, 2, kWindowBytes, 1 << 16);
  }

  void Barrier(int rank, double timeout_s = 20) {
    const ScopedDevice current(cluster_->device(rank));
    JF_CUDA_OK(LaunchBarrier(cluster_->peers(rank, timeout_s),
                             cluster_->stream(rank)));
  }

  std::unique_ptr<Cluster> cluster_;
};

TEST_F(PrimitivesTest, NobodyPassesABarrierAlone) {
  Barrier(0);
  const auto until =
      std::chrono::steady_clock::now() + std::chrono::milliseconds(50);
  while (std::chrono::steady_clock::now() < until) {
    ASSERT_EQ(cudaStreamQuery(cluster_->stream(0)), cudaErrorNotReady);
  }
  Barrier(1);
  cluster_->Synchronize();
  EXPECT_TRUE(cluster_->group().Failure().ok());
}

TEST_F(PrimitivesTest, ALateRankIsNamedAndNobodyWaitsAgain) {
  Barrier(0, 0.2);
  JF_CUDA_OK(cudaStreamSynchronize(cluster_->stream(0)));
  const Status failure = cluster_->group().Failure();
  EXPECT_EQ(failure.code(), StatusCode::kDeadlineExceeded);
  EXPECT_THAT(failure.message(), HasSubstr("barrier on rank 0"));
  EXPECT_THAT(failure.message(), HasSubstr("rank 1"));
  EXPECT_THAT(failure.message(), HasSubstr("0.2 s"));
  const auto began = std::chrono::steady_clock::now();
  for (int i = 0; i < 10; ++i) Barrier(0);  // of 20 s each
  JF_CUDA_OK(cudaStreamSynchronize(cluster_->stream(0)));
  EXPECT_LT(std::chrono::steady_clock::now() - began, std::chrono::seconds(5));
}

// What a put of every size must leave in the target's window, and nothing else.
TEST_F(PrimitivesTest, PutsOfAnySizeArriveWhole) {
  constexpr int kCounter = 7;
  uint64_t puts = 0;
  for (const int64_t bytes : {1, 15, 16, 1000, 14336, 65536, 700001}) {
    for (const int32_t offset : {0, 16, 33}) {
      std::vector<uint8_t> sent(bytes);
      std::iota(sent.begin(), sent.end(), static_cast<uint8_t>(bytes + puts));
      DeviceBuffer source = Upload(0, sent);
      DeviceBuffer target = Upload<int32_t>(0, {1});
      DeviceBuffer at = Upload<int32_t>(0, {offset});
      DeviceBuffer out(1, kWindowBytes);
      {
        const ScopedDevice current(1);
        JF_CUDA_OK(cudaMemset(cluster_->peers(1).heap[1] + kWindowsBegin, 0,
                              kWindowBytes));
        JF_CUDA_OK(cudaDeviceSynchronize());
      }
      const WindowPlace window = {kWindowsBegin, kWindowBytes, kCounter};
      const PutArguments put = {
          source.as<char>(), bytes, 1,     target.as<int32_t>(),
          at.as<int32_t>(),  1,     window};
      const WaitArguments wait = {out.as<char>(), window, 1};
      cluster_->ForEach([&](int rank) {
        const Peers peers = cluster_->peers(rank);
        return rank == 0 ? LaunchPut(peers, put, 64, cluster_->stream(0))
                         : LaunchWait(peers, wait, 64, cluster_->stream(1));
      });
      cluster_->Synchronize();
      ASSERT_TRUE(cluster_->group().Failure().ok())
          << cluster_->group().Failure().message();
      std::vector<uint8_t> want(kWindowBytes, 0);
      std::copy(sent.begin(), sent.end(), want.begin() + offset);
      ASSERT_TRUE(out.Read<uint8_t>() == want) << bytes << " at " << offset;
      ++puts;
    }
  }
}

TEST_F(PrimitivesTest, APutOutsideOfTheWindowIsAnError) {
  DeviceBuffer source(0, 64);
  DeviceBuffer target = Upload<int32_t>(0, {1});
  DeviceBuffer at = Upload<int32_t>(0, {static_cast<int32_t>(kWindowBytes)});
  const PutArguments put = {source.as<char>(),
                            64,
                            1,
                            target.as<int32_t>(),
                            at.as<int32_t>(),
                            1,
                            {kWindowsBegin, kWindowBytes, 0}};
  const ScopedDevice current(0);
  JF_CUDA_OK(LaunchPut(cluster_->peers(0), put, 64, cluster_->stream(0)));
  JF_CUDA_OK(cudaStreamSynchronize(cluster_->stream(0)));
  const Status failure = cluster_->group().Failure();
  EXPECT_EQ(failure.code(), StatusCode::kOutOfRange);
  EXPECT_THAT(failure.message(), HasSubstr("put on rank 0: rank 1"));
}

// Pages of 5000 bytes: two pieces of a warp, the second shorter.
struct Pages {
  static constexpr int kCount = 12, kBytes = 5000;
  std::vector<uint8_t> data;
  DeviceBuffer pages, target;

  explicit Pages(int to)
      : data(kCount * kBytes),
        pages(0, data.size()),
        target(Upload<int32_t>(0, {to})) {
    std::iota(data.begin(), data.end(), static_cast<uint8_t>(3));
    pages.Fill(data.data(), data.size());
  }
  PutPagesArguments Put(Group& group, const DeviceBuffer& from,
                        const DeviceBuffer& to, int entries) const {
    return {pages.as<char>(),
            kBytes,
            kCount,
            static_cast<int32_t>(kWindowBytes / kBytes),
            from.as<int32_t>(),
            to.as<int32_t>(),
            entries,
            target.as<int32_t>(),
            group.PageStamps(0),
            {kWindowsBegin, kWindowBytes, 9}};
  }
};

TEST_F(PrimitivesTest, PagesLandWhereTheIndicesSayAndCountOnce) {
  const Pages source(1);
  const std::vector<int32_t> from = {3, -1, 11, 0, 3}, to = {7, 2, 0, -1, 9};
  const DeviceBuffer from_device = Upload(0, from), to_device = Upload(0, to);
  const DeviceBuffer out(1, kWindowBytes);
  for (int turn = 0; turn < 3; ++turn) {  // the same pages again are fine
    cluster_->ForEach([&](int rank) {
      const Peers peers = cluster_->peers(rank);
      if (rank == 0) {
        return LaunchPutPages(
            peers, source.Put(cluster_->group(), from_device, to_device, 5), 8,
            cluster_->stream(0));
      }
      return LaunchWait(peers,
                        {out.as<char>(), {kWindowsBegin, kWindowBytes, 9}, 1},
                        8, cluster_->stream(1));
    });
    cluster_->Synchronize();
    ASSERT_TRUE(cluster_->group().Failure().ok())
        << cluster_->group().Failure().message();
    std::vector<uint8_t> want(kWindowBytes, 0);
    for (size_t i = 0; i < from.size(); ++i) {
      if (from[i] < 0 || to[i] < 0) continue;
      std::copy_n(source.data.begin() + from[i] * Pages::kBytes, Pages::kBytes,
                  want.begin() + to[i] * Pages::kBytes);
    }
    ASSERT_TRUE(out.Read<uint8_t>() == want);
  }
}

TEST_F(PrimitivesTest, APageThatIsNotThereOrTwiceIsAnError) {
  struct Bad {
    std::vector<int32_t> from, to;
    const char* text;
  };
  const Bad bads[] = {
      {{0, 12}, {1, 2}, "entry 1 for rank 1 names a page"},
      {{0, 1}, {1, kWindowBytes / Pages::kBytes}, "entry 1 for rank 1"},
      {{0, 1, 2}, {4, 5, 4}, "is in dst_idx twice"},
  };
  for (const Bad& bad : bads) {
    cluster_ = std::make_unique<Cluster>(2, 2, kWindowBytes, 1 << 16);
    const Pages source(1);
    const DeviceBuffer from = Upload(0, bad.from), to = Upload(0, bad.to);
    const ScopedDevice current(0);
    JF_CUDA_OK(LaunchPutPages(cluster_->peers(0),
                              source.Put(cluster_->group(), from, to,
                                         static_cast<int>(bad.from.size())),
                              8, cluster_->stream(0)));
    JF_CUDA_OK(cudaStreamSynchronize(cluster_->stream(0)));
    EXPECT_THAT(cluster_->group().Failure().message(), HasSubstr(bad.text));
  }
}

TEST_F(PrimitivesTest, AScatterGivesEachRankItsSlice) {
  constexpr int kSlice = 70000;  // more than one block for each
  const WindowPlace window = {kWindowsBegin, kWindowBytes, 3};
  std::vector<DeviceBuffer> x, offsets, out;
  std::vector<std::vector<uint8_t>> sent;
  for (int rank = 0; rank < 2; ++rank) {
    sent.emplace_back(2 * kSlice);
    std::iota(sent[rank].begin(), sent[rank].end(),
              static_cast<uint8_t>(7 * rank));
    x.push_back(Upload(rank, sent[rank]));
    offsets.push_back(Upload<int32_t>(rank, {rank * kSlice, rank * kSlice}));
    out.emplace_back(rank, kWindowBytes);
  }
  cluster_->ForEach([&](int rank) {
    const Peers peers = cluster_->peers(rank);
    const PutArguments put = {
        x[rank].as<char>(),          kSlice, 2,     nullptr,
        offsets[rank].as<int32_t>(), 1,      window};
    const cudaError_t error = LaunchPut(peers, put, 32, cluster_->stream(rank));
    if (error != cudaSuccess) return error;
    return LaunchWait(peers, {out[rank].as<char>(), window, 2}, 32,
                      cluster_->stream(rank));
  });
  cluster_->Synchronize();
  ASSERT_TRUE(cluster_->group().Failure().ok())
      << cluster_->group().Failure().message();
  for (int rank = 0; rank < 2; ++rank) {
    std::vector<uint8_t> want(kWindowBytes, 0);
    for (int source = 0; source < 2; ++source) {
      std::copy_n(sent[source].begin() + rank * kSlice, kSlice,
                  want.begin() + source * kSlice);
    }
    EXPECT_TRUE(out[rank].Read<uint8_t>() == want) << "rank " << rank;
  }
}

TEST_F(PrimitivesTest, AWaitThatIsInVainSaysHowManyCame) {
  const DeviceBuffer out(0, kWindowBytes);
  const ScopedDevice current(0);
  JF_CUDA_OK(LaunchWait(cluster_->peers(0, 0.1),
                        {out.as<char>(), {kWindowsBegin, kWindowBytes, 5}, 3},
                        8, cluster_->stream(0)));
  JF_CUDA_OK(cudaStreamSynchronize(cluster_->stream(0)));
  EXPECT_THAT(cluster_->group().Failure().message(),
              HasSubstr("3 transfers into the window, of which 0 have come"));
}

// One exchange of all ranks over `axes`; what each rank must have then.
struct Exchanged {
  std::vector<std::vector<uint8_t>> sent;
  std::vector<DeviceBuffer> x, y;

  Exchanged(Cluster& cluster, int64_t bytes, int seed) {
    for (int rank = 0; rank < cluster.ranks(); ++rank) {
      sent.emplace_back(bytes);
      std::iota(sent[rank].begin(), sent[rank].end(),
                static_cast<uint8_t>(seed + 37 * rank));
      x.push_back(Upload(cluster.device(rank), sent[rank]));
      y.emplace_back(cluster.device(rank), bytes);
    }
  }
  // `pairs` are (source, target) on the axes.
  void Launch(Cluster& cluster, const std::vector<int64_t>& axes,
              const std::vector<std::pair<int, int>>& pairs) {
    cluster.ForEach([&](int rank) {
      const Peers peers = cluster.peers_over(axes, rank);
      ExchangeArguments arguments = {x[rank].as<char>(), y[rank].as<char>(),
                                     static_cast<int64_t>(sent[rank].size()),
                                     -1, -1};
      for (const auto& [source, target] : pairs) {
        if (source == peers.rank) arguments.to = target;
        if (target == peers.rank) arguments.from = source;
      }
      return LaunchExchange(peers, arguments, cluster.blocks_max(rank),
                            cluster.stream(rank));
    });
  }
};

TEST_F(PrimitivesTest, AnExchangeFollowsAnyPermutation) {
  constexpr int kRanks = 4;
  Cluster cluster(kRanks, std::min(kRanks, DeviceCount()), 1 << 10, 1 << 21);
  using Pairs = std::vector<std::pair<int, int>>;
  const Pairs permutations[] = {
      {{0, 1}, {1, 2}, {2, 3}, {3, 0}}, {{0, 0}, {1, 3}, {3, 1}}, {{2, 0}}, {}};
  for (const int64_t bytes : {1, 15, 479, 480, 4096, 14336, 700001, 1 << 20}) {
    for (const Pairs& pairs : permutations) {
      Exchanged exchanged(cluster, bytes, static_cast<int>(bytes));
      exchanged.Launch(cluster, {0}, pairs);
      cluster.Synchronize();
      ASSERT_TRUE(cluster.group().Failure().ok())
          << cluster.group().Failure().message();
      for (int rank = 0; rank < kRanks; ++rank) {
        std::vector<uint8_t> want(bytes, 0);
        for (const auto& [source, target] : pairs) {
          if (target == rank) want = exchanged.sent[source];
        }
        ASSERT_TRUE(exchanged.y[rank].Read<uint8_t>() == want)
            << bytes << " bytes at rank " << rank;
      }
    }
  }
}

// Ranks (0, 1) and (2, 3) of a mesh of two by two differ in axis 1.
TEST_F(PrimitivesTest, CallsOverSomeAxesMeetTheRightRanks) {
  Cluster cluster(std::vector<int64_t>{2, 2}, std::min(4, DeviceCount()),
                  1 << 10, 1 << 16);
  struct Over {
    std::vector<int64_t> axes;
    std::vector<std::pair<int, int>> pairs;
    int source[4];  // in the mesh, of each rank
  };
  const Over overs[] = {
      {{0}, {{0, 1}, {1, 0}}, {2, 3, 0, 1}},
      {{1}, {{0, 1}, {1, 0}}, {1, 0, 3, 2}},
      {{0, 1}, {{0, 1}, {1, 2}, {2, 3}, {3, 0}}, {3, 0, 1, 2}},
      // The same in the other order: 0, 2, 1, 3.
      {{1, 0}, {{0, 1}, {1, 2}, {2, 3}, {3, 0}}, {3, 2, 0, 1}},
  };
  for (int turn = 0; turn < 25; ++turn) {
    const Over& over = overs[turn * 7 % 4];
    Exchanged exchanged(cluster, 5000, turn);
    cluster.ForEach([&](int rank) {
      return LaunchBarrier(cluster.peers_over(over.axes, rank),
                           cluster.stream(rank));
    });
    exchanged.Launch(cluster, over.axes, over.pairs);
    cluster.Synchronize();
    ASSERT_TRUE(cluster.group().Failure().ok())
        << cluster.group().Failure().message();
    for (int rank = 0; rank < 4; ++rank) {
      ASSERT_TRUE(exchanged.y[rank].Read<uint8_t>() ==
                  exchanged.sent[over.source[rank]])
          << "turn " << turn << " rank " << rank;
    }
  }
}

TEST_F(PrimitivesTest, ALateRankOfAnAxisHasItsNumberInTheMesh) {
  Cluster cluster(std::vector<int64_t>{2, 2}, std::min(4, DeviceCount()),
                  1 << 10, 1 << 16);
  Peers peers = cluster.peers_over({0}, 1);
  peers.timeout_ns = 100'000'000;
  const ScopedDevice current(cluster.device(1));
  JF_CUDA_OK(LaunchBarrier(peers, cluster.stream(1)));
  JF_CUDA_OK(cudaStreamSynchronize(cluster.stream(1)));
  EXPECT_THAT(cluster.group().Failure().message(),
              HasSubstr("barrier on rank 1: the message of rank 3"));
}

TEST_F(PrimitivesTest, ManyBarriersReplayedFromAGraph) {
  constexpr int kInGraph = 50, kReplays = 20;
  cudaGraphExec_t executable[2];
  for (int rank = 0; rank < 2; ++rank) {
    const ScopedDevice current(rank);
    cudaStream_t stream = cluster_->stream(rank);
    cudaGraph_t graph;
    JF_CUDA_OK(cudaStreamBeginCapture(stream, cudaStreamCaptureModeRelaxed));
    for (int i = 0; i < kInGraph; ++i) Barrier(rank);
    JF_CUDA_OK(cudaStreamEndCapture(stream, &graph));
    JF_CUDA_OK(cudaGraphInstantiate(&executable[rank], graph, 0));
    JF_CUDA_OK(cudaGraphDestroy(graph));
  }
  for (int i = 0; i < kReplays; ++i) {
    cluster_->ForEach([&](int rank) {
      return cudaGraphLaunch(executable[rank], cluster_->stream(rank));
    });
  }
  cluster_->Synchronize();
  EXPECT_TRUE(cluster_->group().Failure().ok());
  for (int rank = 0; rank < 2; ++rank) {
    JF_CUDA_OK(cudaGraphExecDestroy(executable[rank]));
  }
}

}  // namespace
}  // namespace jaxfabric::cuda
