// What dispatch and combine say when something is wrong.

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include "moe/layout.h"
#include "moe_kernels.h"
#include "tests/cluster.h"
#include "tests/cpp/moe_oracle.h"
#include "tests/moe_layouts.h"
#include "tests/rank_buffers.h"

namespace jaxfabric::cuda {
namespace {

using moe::Layout;
using moe::Random;
using moe::World;
using ::testing::HasSubstr;

constexpr int kRanks = 2;

class MoeErrorsTest : public ::testing::Test {
 protected:
  void SetUp() override {
    const std::string missing = Missing(kRanks);
    if (!missing.empty()) GTEST_SKIP() << missing;
    cluster_ =
        std::make_unique<Cluster>(kRanks, kRanks, 1 << 16, kMailboxBytes);
    for (int rank = 0; rank < kRanks; ++rank) {
      const int device = cluster_->device(rank);
      pending_.emplace_back();
      for (int i = 0; i < 2; ++i) pending_[rank].emplace_back(device, 24);
    }
  }

  // Blocks have roles, and plan together; or each does everything.
  Grid GridOf(int rank, bool roles) {
    const int blocks = cluster_->blocks_max(rank);
    return {blocks, roles ? std::max(1, blocks / 4) : 0, 1 + rank, roles, 0};
  }

  std::unique_ptr<Cluster> cluster_;
  std::vector<std::vector<DeviceBuffer>> pending_;  // two of each rank
};

TEST_F(MoeErrorsTest, AnExpertThatIsNotThereIsAnError) {
  Random random = moe::Seeded(1);
  Layout layout = RandomLayout(random, 2, RowType::kF32, false);
  layout.tokens = 40;
  World world = moe::RandomWorld(random, layout);
  world.ids[1][3] = layout.num_experts;
  std::vector<RankBuffers> buffers;
  for (int rank = 0; rank < 2; ++rank) {
    buffers.emplace_back(cluster_->device(rank), world, rank);
  }
  const MoeShape shape = ShapeOf(layout, RowType::kF32, false);
  cluster_->ForEach([&](int rank) {
    return LaunchDispatch(cluster_->peers(rank), shape, GridOf(rank, false),
                          buffers[rank].Dispatch(layout),
                          cluster_->group().Workspace(rank),
                          cluster_->stream(rank));
  });
  cluster_->Synchronize();
  const Status failure = cluster_->group().Failure();
  EXPECT_EQ(failure.code(), StatusCode::kInvalidArgument);
  EXPECT_THAT(failure.message(), HasSubstr("entry 3 of rank 1's ids"));
}

TEST_F(MoeErrorsTest, ARankThatDoesNotComeIsNamed) {
  for (const bool roles : {false, true}) {
    cluster_ = std::make_unique<Cluster>(2, 2, 1 << 16, kMailboxBytes);
    Random random = moe::Seeded(2);
    const Layout layout = RandomLayout(random, 2, RowType::kF32, false);
    const World world = moe::RandomWorld(random, layout);
    const RankBuffers buffers(0, world, 0);
    const ScopedDevice current(0);
    JF_CUDA_OK(LaunchDispatch(
        cluster_->peers(0, 0.2), ShapeOf(layout, RowType::kF32, false),
        GridOf(0, roles), buffers.Dispatch(layout),
        cluster_->group().Workspace(0), cluster_->stream(0)));
    JF_CUDA_OK(cudaStreamSynchronize(cluster_->stream(0)));
    const Status failure = cluster_->group().Failure();
    EXPECT_EQ(failure.code(), StatusCode::kDeadlineExceeded);
    EXPECT_THAT(failure.message(), HasSubstr("dispatch on rank 0"));
    EXPECT_THAT(failure.message(), HasSubstr("rank 1"));
  }
}

// Rows of e4m3 have fewer lines, so that lines never come which the other rank
// waits for.
TEST_F(MoeErrorsTest, RanksThatRunDifferentProgramsTimeOut) {
  Random random = moe::Seeded(4);
  Layout layout = RandomLayout(random, 2, RowType::kBf16, /*large=*/true);
  layout.tokens = 600;
  layout.row_bytes = 2176;
  layout.capacity = -1;
  layout.num_experts = layout.k = 2;
  World world = moe::RandomWorld(random, layout);
  // Each token goes to both ranks.
  for (std::vector<int32_t>& ids : world.ids) {
    for (size_t i = 0; i < ids.size(); ++i) ids[i] = static_cast<int>(i % 2);
  }
  std::vector<RankBuffers> buffers;
  for (int rank = 0; rank < 2; ++rank) {
    buffers.emplace_back(cluster_->device(rank), world, rank);
  }
  cluster_->ForEach([&](int rank) {
    const bool scaled = rank == 0;
    return LaunchDispatch(cluster_->peers(rank, 0.5),
                          ShapeOf(layout, RowType::kBf16, false, scaled),
                          GridOf(rank, true), buffers[rank].Dispatch(layout),
                          cluster_->group().Workspace(rank),
                          cluster_->stream(rank));
  });
  cluster_->Synchronize();
  EXPECT_EQ(cluster_->group().Failure().code(), StatusCode::kDeadlineExceeded);
}

// The same shapes, so that nothing but the tag tells one call from the other.
TEST_F(MoeErrorsTest, RanksInDifferentCallsDoNotTakeEachOthersMessages) {
  for (const bool roles : {false, true}) {
    cluster_ = std::make_unique<Cluster>(2, 2, 1 << 16, kMailboxBytes);
    Random random = moe::Seeded(5);
    const Layout layout = RandomLayout(random, 2, RowType::kF32, false);
    const World world = moe::RandomWorld(random, layout);
    std::vector<RankBuffers> buffers;
    for (int rank = 0; rank < 2; ++rank) {
      buffers.emplace_back(cluster_->device(rank), world, rank);
    }
    cluster_->ForEach([&](int rank) {
      Peers peers = cluster_->peers(rank, 0.2);
      peers.tag = static_cast<uint32_t>(rank);
      return LaunchDispatch(peers, ShapeOf(layout, RowType::kF32, false),
                            GridOf(rank, roles), buffers[rank].Dispatch(layout),
                            cluster_->group().Workspace(rank),
                            cluster_->stream(rank));
    });
    cluster_->Synchronize();
    const Status failure = cluster_->group().Failure();
    EXPECT_EQ(failure.code(), StatusCode::kDeadlineExceeded);
    EXPECT_THAT(failure.message(), HasSubstr("runs another program"));
  }
}

TEST_F(MoeErrorsTest, AHalfThatIsNotUnderWayIsAnError) {
  Random random = moe::Seeded(3);
  Layout layout = RandomLayout(random, 2, RowType::kF32, false);
  const World world = moe::RandomWorld(random, layout);
  std::vector<RankBuffers> buffers;
  for (int rank = 0; rank < 2; ++rank) {
    buffers.emplace_back(cluster_->device(rank), world, rank);
  }
  const MoeShape shape = ShapeOf(layout, RowType::kF32, false);
  // The first of three has lost its place to the third.
  const Phase phases[] = {Phase::kStart, Phase::kDone, Phase::kStart,
                          Phase::kStart, Phase::kDone};
  for (size_t i = 0; i < 5; ++i) {
    cluster_->ForEach([&](int rank) {
      Peers peers = cluster_->peers(rank, 5, phases[i]);
      peers.pending = pending_[rank][i == 2 || i == 3].as<uint32_t>();
      return LaunchDispatch(
          peers, shape, GridOf(rank, false), buffers[rank].Dispatch(layout),
          cluster_->group().Workspace(rank), cluster_->stream(rank));
    });
    cluster_->Synchronize();
    ASSERT_EQ(cluster_->group().Failure().ok(), i < 4) << i;
  }
  EXPECT_THAT(cluster_->group().Failure().message(),
              HasSubstr("not under way"));
}

}  // namespace
}  // namespace jaxfabric::cuda
