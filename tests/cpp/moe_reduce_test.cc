// Combine, both halves, against plain loops.

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include "moe/reduce.h"
#include "tests/cpp/moe_oracle.h"
#include "tests/cpp/moe_row_values.h"

namespace jaxfabric::moe {
namespace {

using ::testing::ElementsAreArray;

// What each rank passes to combine.
struct Operands {
  Bytes rows;                           // [R, D], or [N*T, D] if !per_slot
  std::vector<float> weights, scalars;  // [R]
};

struct Combine {
  World world;
  RowType type;
  bool per_slot, weighted, with_scalars;
  std::vector<Expected> dispatched;  // of each rank
  std::vector<Operands> operands;    // of each rank
};

Combine RandomCombine(Random& random) {
  Combine combine;
  combine.type = Choose<RowType>(
      random, {RowType::kF32, RowType::kF64, RowType::kBf16, RowType::kF16});
  combine.per_slot = Uniform(random, 0, 3) != 0;
  combine.weighted = combine.per_slot && Uniform(random, 0, 1) == 0;
  combine.with_scalars = Uniform(random, 0, 1) == 0;
  Layout layout = RandomLayout(random);
  layout.row_bytes = ElementBytes(combine.type) * Uniform(random, 1, 40);
  combine.world = RandomWorld(random, layout);
  const int64_t rows =
      combine.per_slot ? layout.rows() : layout.unique_rows_max();
  for (int32_t rank = 0; rank < layout.num_ranks; ++rank) {
    combine.dispatched.push_back(Dispatch(combine.world, rank));
    Operands& operands = combine.operands.emplace_back();
    operands.rows.resize(rows * layout.row_bytes);
    for (size_t at = 0; at < operands.rows.size();
         at += ElementBytes(combine.type)) {
      StoreValue(combine.type, RandomValue(random), operands.rows.data() + at);
    }
    for (int64_t row = 0; row < layout.rows(); ++row) {
      operands.weights.push_back(static_cast<float>(RandomValue(random)));
      operands.scalars.push_back(static_cast<float>(RandomValue(random)));
    }
  }
  return combine;
}

// The partial of (source, token) at `rank`, or nothing if none is sent.
Bytes PlainPartial(const Combine& combine, int32_t rank, int32_t source,
                   int32_t token) {
  const Layout& layout = combine.world.layout;
  const Expected& dispatched = combine.dispatched[rank];
  const Operands& operands = combine.operands[rank];
  std::vector<const std::byte*> rows;
  std::vector<float> weights;
  bool sent = false;
  for (int32_t k = 0; k < layout.k; ++k) {
    const int32_t id = combine.world.ids[source][token * layout.k + k];
    if (id < 0 || id / layout.experts_local() != rank) continue;
    sent = true;
    const auto row = dispatched.row_of.find({source, token, k});
    if (row == dispatched.row_of.end()) continue;
    rows.push_back(operands.rows.data() + row->second * layout.row_bytes);
    weights.push_back(operands.weights[row->second]);
  }
  if (!sent) return {};
  return PlainSum(combine.type, rows,
                  combine.weighted ? weights.data() : nullptr,
                  layout.row_bytes);
}

// The same where rows are unique rows already.
Bytes PlainUniqueRow(const Combine& combine, int32_t rank, int32_t source,
                     int32_t token) {
  const Layout& layout = combine.world.layout;
  const auto is_sent = [&](int32_t s, int32_t t) {
    const auto begin = combine.world.ids[s].begin() + int64_t{t} * layout.k;
    return std::any_of(begin, begin + layout.k, [&](int32_t id) {
      return id >= 0 && id / layout.experts_local() == rank;
    });
  };
  if (!is_sent(source, token)) return {};
  int64_t index = 0;
  for (int32_t s = 0; s <= source; ++s) {
    for (int32_t t = 0; t < (s == source ? token : layout.tokens); ++t) {
      index += is_sent(s, t);
    }
  }
  const std::byte* row =
      combine.operands[rank].rows.data() + index * layout.row_bytes;
  return Bytes(row, row + layout.row_bytes);
}

Bytes PlainY(const Combine& combine, int32_t source) {
  const Layout& layout = combine.world.layout;
  Bytes y;
  for (int32_t t = 0; t < layout.tokens; ++t) {
    std::vector<Bytes> partials;
    for (int32_t d = 0; d < layout.num_ranks; ++d) {
      Bytes partial = combine.per_slot ? PlainPartial(combine, d, source, t)
                                       : PlainUniqueRow(combine, d, source, t);
      if (!partial.empty()) partials.push_back(partial);
    }
    std::vector<const std::byte*> rows;
    for (const Bytes& partial : partials) rows.push_back(partial.data());
    const Bytes sum = PlainSum(combine.type, rows, nullptr, layout.row_bytes);
    y.insert(y.end(), sum.begin(), sum.end());
  }
  return y;
}

std::vector<float> PlainSlotScalars(const Combine& combine, int32_t source) {
  const Layout& layout = combine.world.layout;
  std::vector<float> scalars(int64_t{layout.tokens} * layout.k, 0.0f);
  for (int32_t d = 0; d < layout.num_ranks; ++d) {
    for (const auto& [where, row] : combine.dispatched[d].row_of) {
      const auto [s, t, k] = where;
      if (s == source) {
        scalars[t * layout.k + k] = combine.operands[d].scalars[row];
      }
    }
  }
  return scalars;
}

Bytes PackAt(const Combine& combine, int32_t rank, int32_t source) {
  const Layout& layout = combine.world.layout;
  const Expected& dispatched = combine.dispatched[rank];
  const Operands& operands = combine.operands[rank];
  const auto plan =
      CheckPlan(layout, dispatched.recv_count, dispatched.slot_row);
  EXPECT_TRUE(plan.ok());
  const ReduceInput input = {
      .type = combine.type,
      .rows = operands.rows.data(),
      .per_slot = combine.per_slot,
      .weights = combine.weighted ? operands.weights.data() : nullptr,
      .with_scalars = combine.with_scalars,
      .scalars = operands.scalars.data()};
  Bytes message(
      ReduceMessageBytes(layout, plan->RowCount(source), combine.with_scalars));
  PackReduceMessage(layout, *plan, source, input, message.data());
  return message;
}

void ExpectCombineIsRight(Random& random, const Combine& combine,
                          int32_t source) {
  const Layout& layout = combine.world.layout;
  const auto lists = BuildSendLists(layout, combine.world.ids[source]);
  std::vector<Bytes> messages;
  std::vector<RowSource> partials;
  std::vector<const std::byte*> scalars;
  for (int32_t d = 0; d < layout.num_ranks; ++d) {
    messages.push_back(PackAt(combine, d, source));
  }
  for (int32_t d = 0; d < layout.num_ranks; ++d) {
    const auto view = ParseReduceMessage(layout, lists->RowCount(d),
                                         combine.with_scalars, messages[d]);
    ASSERT_TRUE(view.ok()) << view.status().message();
    partials.push_back(view->rows);
    scalars.push_back(view->scalars);
  }
  Bytes y(layout.tokens * layout.row_bytes, kGarbage);
  const int32_t middle = Uniform(random, 0, layout.tokens);
  Accumulate(layout, combine.type, *lists, partials, {middle, layout.tokens},
             y.data());
  Accumulate(layout, combine.type, *lists, partials, {0, middle}, y.data());
  EXPECT_TRUE(y == PlainY(combine, source));
  if (!combine.with_scalars) return;
  std::vector<float> slot_scalars(int64_t{layout.tokens} * layout.k, 77.0f);
  ScatterScalars(layout, *lists, scalars, slot_scalars);
  EXPECT_THAT(slot_scalars,
              ElementsAreArray(PlainSlotScalars(combine, source)));
}

TEST(Reduce, RandomCombines) {
  for (uint64_t seed = 0; seed < 1000; ++seed) {
    Random random = Seeded(seed);
    const Combine combine = RandomCombine(random);
    SCOPED_TRACE(testing::Message()
                 << "seed " << seed << ": "
                 << testing::PrintToString(combine.world.layout) << " per_slot "
                 << combine.per_slot);
    for (int32_t s = 0; s < combine.world.layout.num_ranks; ++s) {
      ExpectCombineIsRight(random, combine, s);
    }
    if (testing::Test::HasFailure()) return;
  }
}

TEST(Reduce, RowsInPiecesAreTheSame) {
  Random random = Seeded(5);
  Combine combine = RandomCombine(random);
  const Layout& layout = combine.world.layout;
  const Expected& dispatched = combine.dispatched[0];
  const auto plan =
      CheckPlan(layout, dispatched.recv_count, dispatched.slot_row);
  ASSERT_TRUE(plan.ok());
  const ReduceInput input = {.type = combine.type,
                             .rows = combine.operands[0].rows.data(),
                             .per_slot = combine.per_slot};
  for (int32_t s = 0; s < layout.num_ranks; ++s) {
    const int32_t count = plan->RowCount(s);
    Bytes whole(count * layout.row_bytes);
    ReduceRows(layout, *plan, s, {0, count}, input, whole.data());
    Bytes pieces(count * layout.row_bytes);
    for (int32_t m = 0; m < count; ++m) {
      ReduceRows(layout, *plan, s, {m, m + 1}, input,
                 pieces.data() + m * layout.row_bytes);
    }
    EXPECT_TRUE(whole == pieces);
  }
}

TEST(Reduce, RowTypeMustDivideTheRow) {
  Layout layout = {
      .num_ranks = 1, .tokens = 1, .k = 1, .num_experts = 1, .row_bytes = 6};
  EXPECT_TRUE(CheckRowType(layout, RowType::kBf16).ok());
  EXPECT_EQ(CheckRowType(layout, RowType::kF32).code(),
            StatusCode::kInvalidArgument);
}

}  // namespace
}  // namespace jaxfabric::moe
