#include "base/status.h"

#include <gtest/gtest.h>

#include <memory>

namespace jaxfabric {
namespace {

StatusOr<std::unique_ptr<int>> Half(int value) {
  if (value % 2 != 0) return Status(StatusCode::kInvalidArgument, "odd");
  return std::make_unique<int>(value / 2);
}

StatusOr<int> Quarter(int value) {
  JF_ASSIGN_OR_RETURN(const std::unique_ptr<int> half, Half(value));
  JF_ASSIGN_OR_RETURN(const std::unique_ptr<int> quarter, Half(*half));
  return *quarter;
}

Status CheckDivisible(int value) {
  JF_RETURN_IF_ERROR(Quarter(value).status());
  return OkStatus();
}

TEST(StatusTest, DefaultIsOk) {
  EXPECT_TRUE(Status().ok());
  EXPECT_EQ(OkStatus().code(), StatusCode::kOk);
  EXPECT_TRUE(OkStatus().Annotate("context").ok());
}

TEST(StatusTest, AnnotateAddsWhatIsKnownOnTheWayUp) {
  const Status status = Status(StatusCode::kUnavailable, "peer 3 is lost")
                            .Annotate("chunk 2")
                            .Annotate("dispatch");
  EXPECT_EQ(status.code(), StatusCode::kUnavailable);
  EXPECT_EQ(status.message(), "dispatch: chunk 2: peer 3 is lost");
}

TEST(StatusTest, MacrosPassValuesAndFailures) {
  ASSERT_TRUE(Quarter(12).ok());
  EXPECT_EQ(*Quarter(12), 3);
  EXPECT_EQ(Quarter(6).status().message(), "odd");
  EXPECT_TRUE(CheckDivisible(8).ok());
  EXPECT_EQ(CheckDivisible(7).code(), StatusCode::kInvalidArgument);
}

TEST(StatusTest, MoveOnlyValuesComeOut) {
  StatusOr<std::unique_ptr<int>> half = Half(10);
  ASSERT_TRUE(half.ok());
  EXPECT_EQ(**half, 5);
  const std::unique_ptr<int> taken = *std::move(half);
  EXPECT_EQ(*taken, 5);
}

TEST(StatusDeathTest, MisuseStopsTheProcess) {
  testing::FLAGS_gtest_death_test_style = "threadsafe";
  EXPECT_DEATH(*Half(1), "status.h:.*check failed");
  EXPECT_DEATH(StatusOr<int>{OkStatus()}, "check failed");
}

}  // namespace
}  // namespace jaxfabric
