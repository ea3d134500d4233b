#include "transport/ofi_frame.h"

#include <gtest/gtest.h>

#include <array>
#include <string>

namespace jaxfabric {
namespace {

using Buffer = std::array<std::byte, kOfiFrameBytesMax>;

const JobKey kKey("a secret");

size_t Encode(std::string_view payload, Buffer* buffer) {
  return EncodeOfiFrame({OfiFrameKind::kMessage, 11, 22, 33, payload}, kKey,
                        buffer->data());
}

TEST(OfiFrameTest, SurvivesItsBytes) {
  for (const size_t bytes : {0, 1, 7, 8, 9, 4096}) {
    const std::string payload(bytes, 'p');
    Buffer buffer;
    const size_t length = Encode(payload, &buffer);
    const auto frame = DecodeOfiFrame({buffer.data(), length}, kKey, 22);
    ASSERT_TRUE(frame.has_value());
    EXPECT_EQ(frame->kind, OfiFrameKind::kMessage);
    EXPECT_EQ(frame->sender, 11u);
    EXPECT_EQ(frame->argument, 33u);
    EXPECT_EQ(frame->payload, payload);
  }
}

TEST(OfiFrameTest, EachFlippedBitIsFound) {
  Buffer buffer;
  const size_t length = Encode("payload", &buffer);
  for (size_t bit = 0; bit < 8 * length; ++bit) {
    Buffer damaged = buffer;
    damaged[bit / 8] ^= std::byte{1} << (bit % 8);
    EXPECT_FALSE(DecodeOfiFrame({damaged.data(), length}, kKey, 22).has_value())
        << "bit " << bit;
  }
}

TEST(OfiFrameTest, WrongLengthsTargetsAndSecretsAreRefused) {
  Buffer buffer;
  const size_t length = Encode("payload", &buffer);
  for (size_t cut = 0; cut < length; ++cut) {
    EXPECT_FALSE(DecodeOfiFrame({buffer.data(), cut}, kKey, 22).has_value());
  }
  EXPECT_FALSE(
      DecodeOfiFrame({buffer.data(), length + 1}, kKey, 22).has_value());
  EXPECT_FALSE(DecodeOfiFrame({buffer.data(), length}, kKey, 23).has_value());
  EXPECT_FALSE(DecodeOfiFrame({buffer.data(), length}, JobKey("a secreT"), 22)
                   .has_value());
}

}  // namespace
}  // namespace jaxfabric
