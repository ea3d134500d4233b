// Place and UnpackRows together, against plain loops: dispatch at one rank.

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include "moe/place.h"
#include "moe/receive_plan.h"
#include "moe/unpack.h"
#include "tests/cpp/moe_oracle.h"

namespace jaxfabric::moe {
namespace {

using ::testing::ElementsAre;
using ::testing::ElementsAreArray;
using ::testing::HasSubstr;

// One rank's result buffers, full of garbage until they are written.
struct Received {
  explicit Received(const Layout& layout)
      : group_sizes(layout.experts_local(), 77),
        slot_row(layout.unique_rows_max() * layout.slots(), 77),
        recv_count(layout.num_ranks, 77),
        row_index(layout.expand ? 0 : layout.rows(), 77),
        weights(layout.rows(), 77.0f),
        tokens(layout.output_rows() * layout.row_bytes, kGarbage) {}

  PlaceOutputs outputs() {
    return {group_sizes, slot_row, recv_count, weights, row_index};
  }

  std::vector<int32_t> group_sizes, slot_row, recv_count, row_index;
  std::vector<float> weights;
  Bytes tokens;
};

void UnpackInPieces(Random& random, const Layout& layout,
                    const ReceivePlan& plan, int32_t source,
                    const RowSource& rows, Bytes& out) {
  std::vector<RowRange> pieces;
  for (int32_t begin = 0; begin < plan.RowCount(source);) {
    const int32_t end = Uniform(random, begin, plan.RowCount(source));
    pieces.push_back({begin, end});
    begin = end;
  }
  std::shuffle(pieces.begin(), pieces.end(), random);
  for (const RowRange piece : pieces) {
    UnpackRows(layout, plan, source, rows, piece, out.data());
  }
}

class OneDispatch {
 public:
  OneDispatch(Random& random, const World& world, int32_t rank)
      : random_(random), world_(world), got_(world.layout) {
    const Layout& layout = world.layout;
    for (int32_t s = 0; s < layout.num_ranks; ++s) {
      lists_.push_back(*BuildSendLists(layout, world.ids[s]));
    }
    for (int32_t s = 0; s < layout.num_ranks; ++s) AddSource(s, rank);
    placement_ = Place(layout, views_, got_.outputs());
    for (int32_t s = layout.num_ranks - 1; s >= 0; --s) {
      UnpackInPieces(random, layout, placement_.plan, s, views_[s].rows,
                     got_.tokens);
    }
    ZeroUnwrittenRows(layout, placement_.plan, got_.tokens.data());
  }

  void ExpectIs(const Expected& want) const {
    EXPECT_EQ(placement_.dropped, want.dropped);
    EXPECT_THAT(got_.group_sizes, ElementsAreArray(want.group_sizes));
    EXPECT_THAT(got_.recv_count, ElementsAreArray(want.recv_count));
    EXPECT_THAT(got_.slot_row, ElementsAreArray(want.slot_row));
    EXPECT_THAT(got_.weights, ElementsAreArray(want.weights));
    EXPECT_THAT(got_.row_index, ElementsAreArray(want.row_index));
    EXPECT_TRUE(got_.tokens == want.tokens);
  }

  // The plan's arrays alone give the same output from the same rows.
  void ExpectReplayIs(const Expected& want) const {
    const Layout& layout = world_.layout;
    const auto plan = CheckPlan(layout, got_.recv_count, got_.slot_row);
    ASSERT_TRUE(plan.ok()) << plan.status().message();
    EXPECT_EQ(plan->rows_end, placement_.plan.rows_end);
    EXPECT_EQ(plan->source_begin, placement_.plan.source_begin);
    Bytes rows(got_.tokens.size(), kGarbage);
    for (int32_t s = 0; s < layout.num_ranks; ++s) {
      UnpackInPieces(random_, layout, *plan, s, views_[s].rows, rows);
    }
    ZeroUnwrittenRows(layout, *plan, rows.data());
    EXPECT_TRUE(rows == want.tokens);
  }

 private:
  void AddSource(int32_t source, int32_t rank) {
    const Layout& layout = world_.layout;
    const SendLists& lists = lists_[source];
    if (source == rank) {
      views_.push_back(DirectRouteView(layout, lists, rank,
                                       world_.weights[source],
                                       world_.x[source].data()));
      return;
    }
    Bytes& message = messages_.emplace_back(
        RouteMessageBytes(layout, lists, rank), kGarbage);
    PackRouteMessage(layout, lists, rank, world_.weights[source],
                     world_.x[source].data(), message.data());
    auto view = ParseRouteMessage(layout, message);
    ASSERT_TRUE(view.ok()) << view.status().message();
    views_.push_back(*std::move(view));
  }

  Random& random_;
  const World& world_;
  Received got_;
  std::vector<SendLists> lists_;
  std::vector<Bytes> messages_;
  std::vector<RouteView> views_;
  Placement placement_;
};

void ExpectDispatchIsRight(Random& random, const World& world) {
  for (int32_t rank = 0; rank < world.layout.num_ranks; ++rank) {
    SCOPED_TRACE(testing::Message() << "rank " << rank);
    const Expected want = Dispatch(world, rank);
    const OneDispatch dispatch(random, world, rank);
    dispatch.ExpectIs(want);
    dispatch.ExpectReplayIs(want);
  }
}

TEST(Place, RandomWorlds) {
  for (uint64_t seed = 0; seed < 1500; ++seed) {
    Random random = Seeded(seed);
    const Layout layout = RandomLayout(random);
    SCOPED_TRACE(testing::Message()
                 << "seed " << seed << ": " << testing::PrintToString(layout));
    ASSERT_TRUE(CheckLayout(layout).ok());
    ExpectDispatchIsRight(random, RandomWorld(random, layout));
    if (testing::Test::HasFailure()) return;
  }
}

TEST(Place, EveryCapacityOfOneWorld) {
  Random random = Seeded(3);
  for (const int32_t alignment : {1, 8, 16}) {
    for (int32_t capacity = -1; capacity < 50; ++capacity) {
      SCOPED_TRACE(testing::Message()
                   << "capacity " << capacity << " alignment " << alignment);
      const Layout layout = {.num_ranks = 2,
                             .tokens = 6,
                             .k = 3,
                             .num_experts = 8,
                             .row_bytes = 24,
                             .capacity = capacity,
                             .expert_alignment = alignment};
      ExpectDispatchIsRight(random, RandomWorld(random, layout));
    }
  }
}

constexpr Layout kExample = {.num_ranks = 1,
                             .tokens = 3,
                             .k = 2,
                             .num_experts = 2,
                             .row_bytes = 1,
                             .expert_alignment = 2};

TEST(Place, Example) {
  World world;
  world.layout = kExample;
  world.ids = {{1, 0, 1, -1, 1, -1}};
  world.weights = {{.1f, .2f, .3f, .4f, .5f, .6f}};
  world.x = {{std::byte{10}, std::byte{11}, std::byte{12}}};
  const auto lists = BuildSendLists(kExample, world.ids[0]);
  Received got(kExample);
  std::vector<RouteView> views;
  views.push_back(DirectRouteView(kExample, *lists, 0, world.weights[0],
                                  world.x[0].data()));
  const Placement placement = Place(kExample, views, got.outputs());
  EXPECT_THAT(got.group_sizes, ElementsAre(2, 4));
  EXPECT_THAT(got.slot_row, ElementsAre(2, 0, 3, -1, 4, -1));
  EXPECT_THAT(got.weights, ElementsAre(.2f, 0, .1f, .3f, .5f, 0.f, 0.f, 0.f));
  ASSERT_EQ(placement.plan.padding.size(), 2u);
  EXPECT_EQ(placement.plan.padding[0].begin, 1);
  EXPECT_EQ(placement.plan.padding[1].begin, 5);
}

void ExpectPlanRefused(std::vector<int32_t> recv_count,
                       std::vector<int32_t> slot_row, const char* text) {
  const auto plan = CheckPlan(kExample, recv_count, slot_row);
  ASSERT_FALSE(plan.ok()) << text;
  EXPECT_EQ(plan.status().code(), StatusCode::kInvalidArgument);
  EXPECT_THAT(plan.status().message(), HasSubstr(text));
}

TEST(CheckPlan, RefusesWhatNoDispatchMakes) {
  ASSERT_TRUE(CheckPlan(kExample, std::vector<int32_t>{3},
                        std::vector<int32_t>{2, 0, 3, -1, 4, -1})
                  .ok());
  ExpectPlanRefused({4}, {2, 0, 3, -1, 4, -1}, "plan.recv_count[0] = 4");
  ExpectPlanRefused({-1}, {2, 0, 3, -1, 4, -1}, "plan.recv_count[0] = -1");
  ExpectPlanRefused({3}, {2, 0, 8, -1, 4, -1}, "plan.slot_row[1, 0] = 8");
  ExpectPlanRefused({3}, {2, -2, 3, -1, 4, -1}, "plan.slot_row[0, 1] = -2");
  ExpectPlanRefused({3}, {2, 0, 3, 2, 4, -1}, "plan.slot_row[1, 1] = 2");
  ExpectPlanRefused({2}, {2, 0, 3, -1, 4, -1}, "plan.slot_row[2, 0] = 4");
}

TEST(CheckPlan, RandomArraysAreRefusedOrHarmless) {
  int accepted = 0;
  for (uint64_t seed = 0; seed < 5000; ++seed) {
    SCOPED_TRACE(testing::Message() << "seed " << seed);
    Random random = Seeded(seed);
    const Layout layout = RandomLayout(random);
    const World world = RandomWorld(random, layout);
    const Expected want = Dispatch(world, 0);
    std::vector<int32_t> recv_count = want.recv_count;
    std::vector<int32_t> slot_row = want.slot_row;
    if (!slot_row.empty()) {
      slot_row[Uniform(random, 0, slot_row.size() - 1)] =
          Uniform(random, -2, layout.rows());
    }
    if (Uniform(random, 0, 3) == 0) {
      recv_count[Uniform(random, 0, layout.num_ranks - 1)] =
          Uniform(random, -1, layout.tokens + 1);
    }
    const auto plan = CheckPlan(layout, recv_count, slot_row);
    if (!plan.ok()) continue;
    ++accepted;
    Bytes out(layout.output_rows() * layout.row_bytes);
    for (int32_t s = 0; s < layout.num_ranks; ++s) {
      const RowSource rows = {.data = world.x[s].data(),
                              .tokens = nullptr,
                              .row_bytes = layout.row_bytes};
      UnpackRows(layout, *plan, s, rows, {0, plan->RowCount(s)}, out.data());
    }
    ZeroUnwrittenRows(layout, *plan, out.data());
  }
  EXPECT_GT(accepted, 100);
}

}  // namespace
}  // namespace jaxfabric::moe
