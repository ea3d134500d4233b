#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <memory>

#include "moe/message.h"
#include "moe/place.h"
#include "moe/unpack.h"
#include "tests/cpp/moe_oracle.h"

namespace jaxfabric::moe {
namespace {

using ::testing::AnyOf;
using ::testing::ElementsAreArray;
using ::testing::HasSubstr;

constexpr Layout kLayout = {.num_ranks = 2,
                            .tokens = 4,
                            .k = 3,
                            .num_experts = 8,
                            .row_bytes = 128,
                            .capacity = 20,
                            .element_type = 3};

// A message in memory of exactly its size, so that the address sanitizer sees
// one byte too many.
Bytes RouteMessage(const World& world, int32_t source, int32_t destination) {
  const auto lists = BuildSendLists(world.layout, world.ids[source]);
  Bytes message(RouteMessageBytes(world.layout, *lists, destination));
  PackRouteMessage(world.layout, *lists, destination, world.weights[source],
                   world.x[source].data(), message.data());
  return message;
}

World SmallWorld() {
  Random random = Seeded(7);
  World world = RandomWorld(random, kLayout);
  for (int32_t s = 0; s < kLayout.num_ranks; ++s) {
    world.ids[s] = RandomIds(random, kLayout, Routing::kUniform);
  }
  return world;
}

TEST(RouteMessage, ParsesToWhatADirectViewSees) {
  for (uint64_t seed = 0; seed < 300; ++seed) {
    SCOPED_TRACE(testing::Message() << "seed " << seed);
    Random random = Seeded(seed);
    const World world = RandomWorld(random, RandomLayout(random));
    const Layout& layout = world.layout;
    const auto lists = BuildSendLists(layout, world.ids[0]);
    for (int32_t d = 0; d < layout.num_ranks; ++d) {
      const Bytes message = RouteMessage(world, 0, d);
      ASSERT_LE(message.size(), RouteMessageBytesMax(layout));
      const auto view = ParseRouteMessage(layout, message);
      ASSERT_TRUE(view.ok()) << view.status().message();
      const RouteView direct = DirectRouteView(
          layout, *lists, d, world.weights[0], world.x[0].data());
      ASSERT_THAT(view->tokens, ElementsAreArray(direct.tokens));
      ASSERT_THAT(view->slot_counts, ElementsAreArray(direct.slot_counts));
      ASSERT_THAT(view->weights, ElementsAreArray(direct.weights));
      ASSERT_EQ(view->slots.size(), direct.slots.size());
      for (int32_t m = 0; m < view->row_count(); ++m) {
        ASSERT_EQ(std::memcmp(view->rows.Row(m), direct.rows.Row(m),
                              layout.row_bytes),
                  0);
      }
    }
  }
}

TEST(RouteMessage, RowsBeginAtACacheLine) {
  const Bytes message = RouteMessage(SmallWorld(), 0, 1);
  const auto view = ParseRouteMessage(kLayout, message);
  ASSERT_TRUE(view.ok());
  EXPECT_EQ((view->rows.data - message.data()) % 64, 0);
}

template <typename Change>
void ExpectOtherProgram(Change change, const char* text) {
  World world = SmallWorld();
  const Bytes message = RouteMessage(world, 0, 1);
  Layout other = kLayout;
  change(other);
  const auto view = ParseRouteMessage(other, message);
  ASSERT_FALSE(view.ok()) << text;
  EXPECT_EQ(view.status().code(), StatusCode::kFailedPrecondition);
  EXPECT_THAT(view.status().message(), HasSubstr(text));
  EXPECT_THAT(view.status().message(), HasSubstr("program differs"));
}

TEST(RouteMessage, OtherProgramIsNamedWithBothValues) {
  ExpectOtherProgram([](Layout& l) { l.row_bytes = 64; },
                     "rows of 128 bytes where 64 were expected");
  ExpectOtherProgram([](Layout& l) { l.tokens = 5; },
                     "tokens = 4 where this rank has 5");
  ExpectOtherProgram([](Layout& l) { l.k = 2; }, "k = 3 where this rank has 2");
  ExpectOtherProgram([](Layout& l) { l.num_experts = 16; }, "num_experts = 8");
  ExpectOtherProgram([](Layout& l) { l.num_ranks = 4; }, "num_ranks = 2");
  ExpectOtherProgram([](Layout& l) { l.capacity = kDropless; },
                     "capacity = 20 where this rank has -1");
  ExpectOtherProgram([](Layout& l) { l.expert_alignment = 8; },
                     "expert_alignment = 1");
  ExpectOtherProgram([](Layout& l) { l.expand = false; }, "expand = 1");
  ExpectOtherProgram([](Layout& l) { l.zero_tail = false; }, "zero_tail = 1");
  ExpectOtherProgram([](Layout& l) { l.element_type = 4; }, "element type = 3");
}

TEST(RouteMessage, KindsAreNotMixedUp) {
  const World world = SmallWorld();
  const Bytes message = RouteMessage(world, 0, 1);
  const auto replay = ParseReplayMessage(kLayout, 1, message);
  EXPECT_THAT(replay.status().message(), HasSubstr("kind = 1"));
  const auto reduce = ParseReduceMessage(kLayout, 1, false, message);
  EXPECT_THAT(reduce.status().message(), HasSubstr("kind = 1"));
}

TEST(RouteMessage, EveryTruncationIsRefused) {
  const Bytes whole = RouteMessage(SmallWorld(), 0, 1);
  for (size_t size = 0; size < whole.size(); ++size) {
    const Bytes message(whole.begin(), whole.begin() + size);
    const auto view = ParseRouteMessage(kLayout, message);
    ASSERT_FALSE(view.ok()) << size;
    EXPECT_EQ(view.status().code(), StatusCode::kDataLoss);
  }
}

TEST(RouteMessage, ViewDoesNotChangeWithTheMessage) {
  const World world = SmallWorld();
  Bytes message = RouteMessage(world, 0, 1);
  const auto view = ParseRouteMessage(kLayout, message);
  ASSERT_TRUE(view.ok());
  const std::vector<int32_t> tokens(view->tokens.begin(), view->tokens.end());
  const std::vector<float> weights(view->weights.begin(), view->weights.end());
  std::fill(message.begin(), message.end(), std::byte{0xFF});
  EXPECT_THAT(view->tokens, ElementsAreArray(tokens));
  EXPECT_THAT(view->weights, ElementsAreArray(weights));
  for (const SendSlot& slot : view->slots) EXPECT_LT(slot.expert, 4);
}

// Uses a view as dispatch does: nothing may leave its buffers.
void PlaceAndUnpack(const World& world, const RouteView& hostile) {
  const Layout& layout = world.layout;
  std::vector<RouteView> views(layout.num_ranks);
  for (int32_t s = 1; s < layout.num_ranks; ++s) {
    const auto lists = BuildSendLists(layout, world.ids[s]);
    views[s] =
        DirectRouteView(layout, *lists, 0, world.weights[s], world.x[s].data());
    views[s].tokens = {};  // its lists end here: no rows
    views[s].slot_counts = {};
    views[s].slots = {};
    views[s].weights = {};
  }
  views[0].tokens = hostile.tokens;
  views[0].slot_counts = hostile.slot_counts;
  views[0].slots = hostile.slots;
  views[0].weights = hostile.weights;
  std::vector<int32_t> group_sizes(layout.experts_local());
  std::vector<int32_t> slot_row(layout.unique_rows_max() * layout.slots());
  std::vector<int32_t> recv_count(layout.num_ranks);
  std::vector<float> weights(layout.rows());
  std::vector<int32_t> row_index(layout.expand ? 0 : layout.rows());
  const Placement placement = Place(
      layout, views, {group_sizes, slot_row, recv_count, weights, row_index});
  Bytes out(layout.output_rows() * layout.row_bytes);
  UnpackRows(layout, placement.plan, 0, hostile.rows,
             {0, placement.plan.RowCount(0)}, out.data());
  ZeroUnwrittenRows(layout, placement.plan, out.data());
  EXPECT_TRUE(CheckPlan(layout, recv_count, slot_row).ok());
}

TEST(RouteMessage, DamagedBytesAreRefusedOrHarmless) {
  int accepted = 0;
  int refused = 0;
  for (uint64_t seed = 0; seed < 20000; ++seed) {
    SCOPED_TRACE(testing::Message() << "seed " << seed);
    Random random = Seeded(seed);
    const World world = RandomWorld(random, RandomLayout(random));
    Bytes message = RouteMessage(world, 0, 0);
    for (int64_t flips = Uniform(random, 1, 4); flips > 0; --flips) {
      // Mostly in header and metadata.
      const int64_t limit = Uniform(random, 0, 3) == 0
                                ? static_cast<int64_t>(message.size())
                                : std::min<int64_t>(message.size(), 256);
      message[Uniform(random, 0, limit - 1)] =
          std::byte(Choose<int>(random, {0, 1, 2, 127, 128, 255}));
    }
    if (Uniform(random, 0, 9) == 0) {
      message.resize(Uniform(random, 0, message.size()));
      message.shrink_to_fit();
    }
    const auto view = ParseRouteMessage(world.layout, message);
    view.ok() ? ++accepted : ++refused;
    if (view.ok()) {
      PlaceAndUnpack(world, *view);
    } else {
      ASSERT_THAT(view.status().code(),
                  AnyOf(StatusCode::kDataLoss, StatusCode::kFailedPrecondition))
          << view.status().message();
    }
  }
  EXPECT_GT(accepted, 100);
  EXPECT_GT(refused, 100);
}

// One 32-bit word of the metadata at a time, with values that just miss.
TEST(RouteMessage, EveryMetadataWordIsChecked) {
  const World world = SmallWorld();
  const Bytes whole = RouteMessage(world, 0, 1);
  const auto view = ParseRouteMessage(kLayout, whole);
  ASSERT_TRUE(view.ok());
  const size_t words = 2 * view->tokens.size() + 2 * view->slots.size();
  for (size_t word = 0; word < words; ++word) {
    for (const int32_t value : {-1, INT32_MIN, INT32_MAX, 4, 100}) {
      Bytes message = whole;
      std::memcpy(message.data() + 64 + 4 * word, &value, 4);
      const auto changed = ParseRouteMessage(kLayout, message);
      ASSERT_FALSE(changed.ok()) << "word " << word << " value " << value;
      EXPECT_EQ(changed.status().code(), StatusCode::kDataLoss);
    }
  }
}

// Word `word` of the metadata of a message with tokens {0, 2}, slot counts
// {2, 1} and slots {0,0} {1,2} | {3,1} (local expert, k) becomes `value`.
void ExpectDamaged(size_t word, int32_t value, const char* text) {
  World world = SmallWorld();
  world.ids[0] = {4, 0, 5, /**/ -1, -1, 1, /**/ -1, 7, -1, /**/ 0, 1, 2};
  Bytes message = RouteMessage(world, 0, 1);
  ASSERT_TRUE(ParseRouteMessage(kLayout, message).ok());
  std::memcpy(message.data() + 64 + 4 * word, &value, 4);
  const auto view = ParseRouteMessage(kLayout, message);
  ASSERT_FALSE(view.ok()) << text;
  EXPECT_EQ(view.status().code(), StatusCode::kDataLoss);
  EXPECT_THAT(view.status().message(), HasSubstr(text));
}

TEST(RouteMessage, EveryRuleOfTheMetadataHolds) {
  ExpectDamaged(1, 0, "token 0 after token 0");
  ExpectDamaged(1, 4, "token 4 after token 0");
  ExpectDamaged(0, 3, "token 2 after token 3");
  ExpectDamaged(2, 0, "0 slots in token 0");
  ExpectDamaged(2, 1, "1 slots without a row");
  ExpectDamaged(2, 4, "4 slots in token 0");
  ExpectDamaged(3, 2, "2 slots in token 2");
  ExpectDamaged(6, 0, "local expert 0 in token 0");
  ExpectDamaged(8, 4, "local expert 4 in token 2");
  ExpectDamaged(7, 0, "k = 0 in token 0");
  ExpectDamaged(9, 3, "k = 3 in token 2");
}

TEST(ReplayMessage, CarriesRowsAndTheirCount) {
  const World world = SmallWorld();
  const auto lists = BuildSendLists(kLayout, world.ids[0]);
  const int32_t rows = lists->RowCount(1);
  ASSERT_GT(rows, 0);
  Bytes message(ReplayMessageBytes(kLayout, rows));
  PackReplayMessage(kLayout, *lists, 1, world.x[0].data(), message.data());
  const auto parsed = ParseReplayMessage(kLayout, rows, message);
  ASSERT_TRUE(parsed.ok()) << parsed.status().message();
  const RowSource direct = DirectRows(kLayout, *lists, 1, world.x[0].data());
  for (int32_t m = 0; m < rows; ++m) {
    EXPECT_EQ(std::memcmp(parsed->Row(m), direct.Row(m), kLayout.row_bytes), 0);
  }
  const auto other = ParseReplayMessage(kLayout, rows + 1, message);
  EXPECT_EQ(other.status().code(), StatusCode::kFailedPrecondition);
  EXPECT_THAT(other.status().message(), HasSubstr("different plans"));
  message.pop_back();
  const auto cut = ParseReplayMessage(kLayout, rows, message);
  EXPECT_EQ(cut.status().code(), StatusCode::kDataLoss);
}

TEST(ReduceMessage, ChecksCountsAndScalars) {
  Bytes message(ReduceMessageBytes(kLayout, 3, true));
  const ReduceParts parts =
      StartReduceMessage(kLayout, 3, true, message.data());
  EXPECT_EQ(parts.scalars, message.data() + 64);
  EXPECT_EQ(parts.rows - message.data(), 128);  // 64 + 3 * 3 * 4, rounded up
  const auto view = ParseReduceMessage(kLayout, 3, true, message);
  ASSERT_TRUE(view.ok()) << view.status().message();
  EXPECT_EQ(view->scalars, parts.scalars);
  EXPECT_EQ(view->rows.Row(2), parts.rows + 2 * kLayout.row_bytes);
  const auto without = ParseReduceMessage(kLayout, 3, false, message);
  EXPECT_THAT(without.status().message(), HasSubstr("scalars = 1"));
  const auto fewer = ParseReduceMessage(kLayout, 2, true, message);
  EXPECT_THAT(fewer.status().message(), HasSubstr("3 rows where the plan"));
  message.pop_back();
  const auto cut = ParseReduceMessage(kLayout, 3, true, message);
  EXPECT_EQ(cut.status().code(), StatusCode::kDataLoss);
}

}  // namespace
}  // namespace jaxfabric::moe
