#include "base/deadline.h"

#include <gtest/gtest.h>

#include <cmath>

namespace jaxfabric {
namespace {

TEST(DeadlineTest, DefaultHasExpired) {
  EXPECT_TRUE(Deadline().Expired());
  EXPECT_EQ(Deadline().RemainingNanoseconds(), 0);
}

TEST(DeadlineTest, RemainingShrinksToZeroAndStays) {
  const Deadline deadline = Deadline::AfterNanoseconds(1'000'000);
  int64_t last_ns = deadline.RemainingNanoseconds();
  EXPECT_LE(last_ns, 1'000'000);
  while (!deadline.Expired()) {
    const int64_t remaining_ns = deadline.RemainingNanoseconds();
    EXPECT_LE(remaining_ns, last_ns);
    last_ns = remaining_ns;
  }
  EXPECT_EQ(deadline.RemainingNanoseconds(), 0);
}

TEST(DeadlineTest, SecondsAreSeconds) {
  const int64_t before_ns = MonotonicNanoseconds();
  const Deadline deadline = Deadline::AfterSeconds(2.5);
  const int64_t after_ns = MonotonicNanoseconds();
  EXPECT_GE(deadline.nanoseconds(), before_ns + 2'500'000'000);
  EXPECT_LE(deadline.nanoseconds(), after_ns + 2'500'000'000);
}

TEST(DeadlineTest, EndlessWaitsDoNotOverflow) {
  EXPECT_FALSE(Deadline::AfterSeconds(1e300).Expired());
  EXPECT_FALSE(Deadline::AfterSeconds(INFINITY).Expired());
  const int64_t longest_ns = std::numeric_limits<int64_t>::max();
  EXPECT_FALSE(Deadline::AfterNanoseconds(longest_ns).Expired());
  EXPECT_TRUE(Deadline::AfterSeconds(-1).Expired());
}

TEST(DeadlineTest, SoonerIsLess) {
  EXPECT_LT(Deadline(), Deadline::AfterSeconds(1));
  EXPECT_LT(Deadline::AfterSeconds(1), Deadline::AfterSeconds(2));
  EXPECT_FALSE(Deadline() < Deadline());
}

}  // namespace
}  // namespace jaxfabric
