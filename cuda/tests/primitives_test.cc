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
      const PutArguments put = {source.as<char>(),
                                bytes,                 //
                                target.as<int32_t>(),  //
                                at.as<int32_t>(),
                                1,  //
                                kWindowsBegin,
                                kWindowBytes,  //
                                kCounter};
      const WaitArguments wait = {out.as<char>(), kWindowsBegin, kWindowBytes,
                                  kCounter, 1};
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
  const PutArguments put = {source.as<char>(), 64, target.as<int32_t>(),
                            at.as<int32_t>(),  1,  kWindowsBegin,
                            kWindowBytes,      0};
  const ScopedDevice current(0);
  JF_CUDA_OK(LaunchPut(cluster_->peers(0), put, 64, cluster_->stream(0)));
  JF_CUDA_OK(cudaStreamSynchronize(cluster_->stream(0)));
  const Status failure = cluster_->group().Failure();
  EXPECT_EQ(failure.code(), StatusCode::kOutOfRange);
  EXPECT_THAT(failure.message(), HasSubstr("put on rank 0: rank 1"));
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
