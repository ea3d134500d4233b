#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include "moe/send_lists.h"
#include "tests/cpp/moe_oracle.h"

namespace jaxfabric::moe {
namespace {

using ::testing::ElementsAre;
using ::testing::HasSubstr;

constexpr Layout kTwoRanks = {
    .num_ranks = 2, .tokens = 3, .k = 2, .num_experts = 4, .row_bytes = 4};

TEST(SendLists, Example) {
  const auto lists = BuildSendLists(
      kTwoRanks, std::vector<int32_t>{0, 3, /**/ 1, 0, /**/ -1, 2});
  ASSERT_TRUE(lists.ok());
  EXPECT_THAT(lists->Tokens(0), ElementsAre(0, 1));
  EXPECT_THAT(lists->SlotCounts(0), ElementsAre(1, 2));
  EXPECT_THAT(lists->Tokens(1), ElementsAre(0, 2));
  EXPECT_THAT(lists->SlotCounts(1), ElementsAre(1, 1));
  EXPECT_EQ(lists->RowCount(0), 2);
  EXPECT_EQ(lists->Slots(0)[1].expert, 1);
  EXPECT_EQ(lists->Slots(0)[1].k, 0);
  EXPECT_EQ(lists->Slots(1)[0].expert, 1);
  EXPECT_EQ(lists->Slots(1)[0].k, 1);
}

void ExpectRefused(std::vector<int32_t> ids, const char* text) {
  const auto lists = BuildSendLists(kTwoRanks, ids);
  ASSERT_FALSE(lists.ok());
  EXPECT_EQ(lists.status().code(), StatusCode::kInvalidArgument);
  EXPECT_THAT(lists.status().message(), HasSubstr(text));
}

TEST(SendLists, RefusesIdsThatAreNoExperts) {
  ExpectRefused({0, 1, 2, 4, 0, 1}, "ids[1, 1] = 4");
  ExpectRefused({0, 1, 2, 3, -2, 1}, "ids[2, 0] = -2");
  ExpectRefused({0, INT32_MAX, 2, 3, 0, 1}, "ids[0, 1] = 2147483647");
  ExpectRefused({INT32_MIN, 0, 2, 3, 0, 1}, "ids[0, 0] = -2147483648");
}

TEST(SendLists, RefusesAnExpertTwiceInAToken) {
  ExpectRefused({0, 1, 3, 3, 0, 1}, "ids[1, 1] = 3");
  ExpectRefused({0, 1, 3, 2, 0, 0}, "token 2");
}

// Every (token, k) of ids is in exactly one list, where it belongs.
TEST(SendLists, HoldsEveryRouteOnceInOrder) {
  for (uint64_t seed = 0; seed < 500; ++seed) {
    SCOPED_TRACE(testing::Message() << "seed " << seed);
    Random random = Seeded(seed);
    const Layout layout = RandomLayout(random);
    const World world = RandomWorld(random, layout);
    const auto lists = BuildSendLists(layout, world.ids[0]);
    ASSERT_TRUE(lists.ok());
    for (int32_t d = 0; d < layout.num_ranks; ++d) {
      std::vector<int32_t> tokens, counts, experts, ks;
      for (int32_t t = 0; t < layout.tokens; ++t) {
        int32_t count = 0;
        for (int32_t k = 0; k < layout.k; ++k) {
          const int32_t id = world.ids[0][t * layout.k + k];
          if (id < 0 || id / layout.experts_local() != d) continue;
          experts.push_back(id % layout.experts_local());
          ks.push_back(k);
          ++count;
        }
        if (count == 0) continue;
        tokens.push_back(t);
        counts.push_back(count);
      }
      ASSERT_THAT(lists->Tokens(d), testing::ElementsAreArray(tokens));
      ASSERT_THAT(lists->SlotCounts(d), testing::ElementsAreArray(counts));
      ASSERT_EQ(lists->SlotCount(d), static_cast<int32_t>(ks.size()));
      for (size_t i = 0; i < ks.size(); ++i) {
        ASSERT_EQ(lists->Slots(d)[i].expert, experts[i]);
        ASSERT_EQ(lists->Slots(d)[i].k, ks[i]);
      }
    }
  }
}

}  // namespace
}  // namespace jaxfabric::moe
