#include <gtest/gtest.h>

#include <map>
#include <string>

#include "transport/verbs.h"

namespace jaxfabric {
namespace {

TEST(VerbsStateTest, EachStateHasItsReasonAndFix) {
  const TransportState missing = VerbsState("/nowhere/libibverbs.so.1");
  if (missing.availability != Availability::kNotBuilt) {
    EXPECT_EQ(missing.availability, Availability::kLibraryMissing);
  }
  EXPECT_GE(missing.reason.size(), 20u);
  EXPECT_GE(missing.fix.size(), 20u);
  const auto refused =
      OpenVerbsTransport({.library = "/nowhere/libibverbs.so.1"});
  ASSERT_FALSE(refused.ok());
  EXPECT_EQ(refused.status().code(), StatusCode::kUnimplemented);
  EXPECT_NE(refused.status().message().find(missing.fix), std::string::npos);
}

TEST(VerbsStateTest, AnotherLibraryIsNotTakenForIt) {
  const TransportState other = VerbsState("libc.so.6");
  if (other.availability == Availability::kNotBuilt) return;
  EXPECT_EQ(other.availability, Availability::kLibraryMissing);
  EXPECT_NE(other.reason.find("ibv_get_device_list"), std::string::npos);
}

TEST(VerbsSettingsTest, AreReadByNameAndCheckedForRange) {
  const auto settings = ParseVerbsSettings(
      {{"gid_index", 3}, {"traffic_class", 106}, {"relaxed_ordering", 0}});
  ASSERT_TRUE(settings.ok());
  EXPECT_EQ(settings->gid_index, 3);
  EXPECT_EQ(settings->traffic_class, 106);
  EXPECT_FALSE(settings->relaxed_ordering);
  EXPECT_EQ(settings->retry_count, VerbsSettings().retry_count);
  const std::map<std::string, double> faults[] = {
      {{"traffic_class", 256}}, {{"service_level", 16}}, {{"timeout", 0}},
      {{"retry_count", 8}},     {{"queue_depth", 1.5}},  {{"gid_index", -2}},
      {{"nonsense", 1}}};
  for (const auto& fault : faults) {
    const auto refused = ParseVerbsSettings(fault);
    ASSERT_FALSE(refused.ok());
    EXPECT_NE(refused.status().message().find(fault.begin()->first),
              std::string::npos);
  }
}

}  // namespace
}  // namespace jaxfabric
