#include "engine/mesh_group.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <algorithm>
#include <functional>
#include <numeric>

#include "tests/cpp/seeded.h"

namespace jaxfabric {
namespace {

using Ints = std::vector<int64_t>;

Ints Coordinates(const Ints& shape, int64_t rank) {
  Ints coordinates(shape.size());
  for (size_t i = shape.size(); i-- > 0;) {
    coordinates[i] = rank % shape[i];
    rank /= shape[i];
  }
  return coordinates;
}

// By definition: all ranks that differ in `axes` only, sorted by their index
// over `axes`.
std::vector<uint32_t> BruteForce(const Ints& shape, const Ints& axes,
                                 uint32_t rank) {
  const int64_t ranks = std::accumulate(shape.begin(), shape.end(), int64_t{1},
                                        std::multiplies());
  std::vector<std::pair<Ints, uint32_t>> members;
  const Ints own = Coordinates(shape, rank);
  for (int64_t other = 0; other < ranks; ++other) {
    const Ints its = Coordinates(shape, other);
    Ints rest = its;
    Ints index;
    for (int64_t axis : axes) {
      rest[static_cast<size_t>(axis)] = own[static_cast<size_t>(axis)];
      index.push_back(its[static_cast<size_t>(axis)]);
    }
    if (rest == own) members.emplace_back(index, static_cast<uint32_t>(other));
  }
  std::sort(members.begin(), members.end());
  std::vector<uint32_t> group;
  for (const auto& [index, member] : members) group.push_back(member);
  return group;
}

void ExpectAgrees(const Ints& shape, const Ints& axes) {
  const int64_t ranks = std::accumulate(shape.begin(), shape.end(), int64_t{1},
                                        std::multiplies());
  for (uint32_t rank = 0; rank < ranks; ++rank) {
    const auto group = GroupOf(shape, axes, rank);
    ASSERT_TRUE(group.ok()) << group.status().message();
    ASSERT_EQ(group->ranks, BruteForce(shape, axes, rank))
        << "shape " << testing::PrintToString(shape) << ", axes "
        << testing::PrintToString(axes) << ", rank " << rank;
    ASSERT_LT(group->position, group->ranks.size());
    EXPECT_EQ(group->ranks[group->position], rank);
  }
}

TEST(MeshGroupTest, OneAxisOfTwo) {
  const auto rows = GroupOf(Ints{2, 3}, Ints{0}, 4);
  ASSERT_TRUE(rows.ok());
  EXPECT_THAT(rows->ranks, testing::ElementsAre(1, 4));
  EXPECT_EQ(rows->position, 1u);
}

TEST(MeshGroupTest, TheOrderOfTheAxesCounts) {
  const auto group = GroupOf(Ints{2, 3}, Ints{1, 0}, 1);
  ASSERT_TRUE(group.ok());
  EXPECT_THAT(group->ranks, testing::ElementsAre(0, 3, 1, 4, 2, 5));
  EXPECT_EQ(group->position, 2u);
}

TEST(MeshGroupTest, NoAxesMeanTheRankAlone) {
  const auto group = GroupOf(Ints{2, 3}, Ints{}, 5);
  ASSERT_TRUE(group.ok());
  EXPECT_THAT(group->ranks, testing::ElementsAre(5));
  EXPECT_EQ(group->position, 0u);
}

TEST(MeshGroupTest, AllAxesInAllOrdersAgreeWithBruteForce) {
  for (const Ints& shape :
       {Ints{5}, Ints{2, 3}, Ints{1, 4, 1}, Ints{2, 3, 2}, Ints{3, 1, 2, 2}}) {
    const auto count = static_cast<uint32_t>(shape.size());
    for (uint32_t chosen = 0; chosen < 1u << count; ++chosen) {
      Ints axes;
      for (uint32_t i = 0; i < count; ++i) {
        if ((chosen >> i & 1) != 0) axes.push_back(i);
      }
      do {
        ExpectAgrees(shape, axes);
      } while (std::next_permutation(axes.begin(), axes.end()));
    }
  }
}

TEST(MeshGroupTest, RandomMeshesAgreeWithBruteForce) {
  Seeded seeded;
  for (int i = 0; i < 30; ++i) {
    Ints shape(1 + seeded.Below(4));
    for (int64_t& size : shape)
      size = static_cast<int64_t>(1 + seeded.Below(4));
    Ints axes(shape.size());
    std::iota(axes.begin(), axes.end(), 0);
    std::shuffle(axes.begin(), axes.end(), seeded.random());
    axes.resize(seeded.Below(axes.size() + 1));
    ExpectAgrees(shape, axes);
  }
}

TEST(MeshGroupTest, AnAxisThatIsNotThereIsRefused) {
  EXPECT_FALSE(GroupOf(Ints{2, 3}, Ints{2}, 0).ok());
  EXPECT_FALSE(GroupOf(Ints{2, 3}, Ints{0, -1}, 0).ok());
}

}  // namespace
}  // namespace jaxfabric
