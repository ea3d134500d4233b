#include "transport/job_key.h"

#include <gtest/gtest.h>

#include <string>

namespace jaxfabric {
namespace {

// The key and the first inputs of the test vectors that SipHash's authors
// published with it: input i is the bytes 0 to i - 1.
TEST(JobKeyTest, SipHashGivesThePublishedValues) {
  constexpr uint64_t kLow = 0x0706'0504'0302'0100;
  constexpr uint64_t kHigh = 0x0f0e'0d0c'0b0a'0908;
  std::string input;
  EXPECT_EQ(SipHash24(kLow, kHigh, input), 0x726f'db47'dd0e'0e31u);
  input.push_back(0);
  EXPECT_EQ(SipHash24(kLow, kHigh, input), 0x74f8'39c5'93dc'67fdu);
  for (char byte = 1; byte < 15; ++byte) input.push_back(byte);
  EXPECT_EQ(SipHash24(kLow, kHigh, input), 0xa129'ca61'49be'45e5u);
}

TEST(JobKeyTest, SecretsOfAnyLengthDiffer) {
  const std::string secrets[] = {"",
                                 "a",
                                 "b",
                                 std::string(256, 'a'),
                                 std::string(257, 'a'),
                                 std::string(1, '\0')};
  for (const std::string& one : secrets) {
    for (const std::string& other : secrets) {
      EXPECT_EQ(JobKey(one).JobId() == JobKey(other).JobId(), one == other);
      EXPECT_EQ(JobKey(one).Tag("x") == JobKey(other).Tag("x"), one == other);
    }
  }
}

}  // namespace
}  // namespace jaxfabric
