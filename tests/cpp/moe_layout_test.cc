#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include "moe/layout.h"

namespace jaxfabric::moe {
namespace {

using ::testing::HasSubstr;

Layout Small() {
  return {
      .num_ranks = 4, .tokens = 16, .k = 3, .num_experts = 8, .row_bytes = 128};
}

TEST(Layout, DerivedSizes) {
  Layout layout = Small();
  EXPECT_EQ(layout.experts_local(), 2);
  EXPECT_EQ(layout.slots(), 2);
  EXPECT_EQ(layout.unique_rows_max(), 64);
  EXPECT_EQ(layout.kept_max(), 128);
  EXPECT_EQ(layout.rows(), 128);
  EXPECT_EQ(layout.output_rows(), 128);
  layout.expand = false;
  EXPECT_EQ(layout.output_rows(), 64);
}

TEST(Layout, CapacityAndAlignment) {
  Layout layout = Small();
  layout.capacity = 10;
  EXPECT_EQ(layout.rows(), 10);
  layout.expert_alignment = 8;
  EXPECT_EQ(layout.rows(), 24);  // 10 + 2 * 7
  layout.capacity = 0;
  EXPECT_EQ(layout.rows(), 8);  // 14, rounded down
  layout.capacity = 1000;
  EXPECT_EQ(layout.kept_max(), 128);
}

TEST(Layout, EveryGroupWithItsPaddingFits) {
  for (int32_t alignment = 1; alignment < 20; ++alignment) {
    for (int32_t kept = 0; kept < 40; ++kept) {
      Layout layout = Small();
      layout.capacity = kept;
      layout.expert_alignment = alignment;
      for (int32_t first = 0; first <= kept; ++first) {
        const auto padded = [&](int32_t n) {
          return (n + alignment - 1) / alignment * alignment;
        };
        ASSERT_LE(padded(first) + padded(kept - first), layout.rows());
      }
      ASSERT_EQ(layout.rows() % alignment, 0);
    }
  }
}

template <typename Change>
void ExpectRefused(Change change, const char* text) {
  Layout layout = Small();
  change(layout);
  const Status status = CheckLayout(layout);
  EXPECT_EQ(status.code(), StatusCode::kInvalidArgument);
  EXPECT_THAT(status.message(), HasSubstr(text));
}

TEST(Layout, CheckNamesWhatIsWrong) {
  EXPECT_TRUE(CheckLayout(Small()).ok());
  ExpectRefused([](Layout& l) { l.num_ranks = 0; }, "num_ranks is 0");
  ExpectRefused([](Layout& l) { l.tokens = -1; }, "tokens is -1");
  ExpectRefused([](Layout& l) { l.k = 0; }, "k is 0");
  ExpectRefused([](Layout& l) { l.num_experts = 0; }, "num_experts is 0");
  ExpectRefused([](Layout& l) { l.num_experts = 7; }, "7 experts");
  ExpectRefused([](Layout& l) { l.row_bytes = 0; }, "row_bytes is 0");
  ExpectRefused([](Layout& l) { l.row_bytes = int64_t{1} << 31; }, "row_bytes");
  ExpectRefused([](Layout& l) { l.capacity = -2; }, "capacity is -2");
  ExpectRefused([](Layout& l) { l.expert_alignment = 0; }, "alignment is 0");
  ExpectRefused([](Layout& l) { l.tokens = 1 << 30; }, "tokens * k");
  ExpectRefused([](Layout& l) { l.tokens = 1 << 29; }, "num_ranks * tokens");
  ExpectRefused([](Layout& l) { l.expert_alignment = 1 << 30; }, "rows of");
}

}  // namespace
}  // namespace jaxfabric::moe
