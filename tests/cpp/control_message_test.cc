#include "engine/control_message.h"

#include <gtest/gtest.h>

#include <algorithm>

#include "tests/cpp/seeded.h"

namespace jaxfabric {
namespace {

using Type = ControlMessage::Type;

TEST(ControlMessageTest, RoundTrips) {
  for (const Type type :
       {Type::kCredits, Type::kWantCredits, Type::kAbort, Type::kGoodbye}) {
    for (const std::string& text :
         {std::string(), std::string("why\0not", 7)}) {
      const ControlMessage sent = {type, 0xfedcba98, ~uint64_t{1}, text};
      const auto got = ControlMessage::Decode(sent.Encode());
      ASSERT_TRUE(got.ok()) << got.status().message();
      EXPECT_EQ(got->type, type);
      EXPECT_EQ(got->generation, sent.generation);
      EXPECT_EQ(got->argument, sent.argument);
      EXPECT_EQ(got->text, text);
    }
  }
}

TEST(ControlMessageTest, LongTextsAreCut) {
  const ControlMessage sent = {Type::kAbort, 1, 2, std::string(100'000, 'x')};
  const std::string bytes = sent.Encode();
  // The smallest of all transports' messages is 4096 bytes.
  EXPECT_LT(bytes.size(), 4096u);
  const auto got = ControlMessage::Decode(bytes);
  ASSERT_TRUE(got.ok());
  EXPECT_EQ(got->text, std::string(ControlMessage::kTextBytesMax, 'x'));
}

TEST(ControlMessageTest, AnyOtherLengthIsRefused) {
  const std::string bytes = ControlMessage{Type::kAbort, 1, 2, "why"}.Encode();
  for (size_t length = 0; length < bytes.size(); ++length) {
    EXPECT_FALSE(ControlMessage::Decode(bytes.substr(0, length)).ok())
        << length;
  }
  EXPECT_FALSE(ControlMessage::Decode(bytes + "x").ok());
  EXPECT_FALSE(ControlMessage::Decode("").ok());
}

TEST(ControlMessageTest, OtherVersionsMagicsAndTypesAreRefused) {
  const std::string bytes = ControlMessage{Type::kAbort, 1, 2, ""}.Encode();
  for (const size_t byte : {0, 1, 2, 3, 4, 5}) {  // magic, version
    std::string changed = bytes;
    ++changed[byte];
    EXPECT_FALSE(ControlMessage::Decode(changed).ok()) << byte;
  }
  for (const char type : {'\0', '\5', '\x7f', '\xff'}) {
    std::string changed = bytes;
    changed[6] = type;
    EXPECT_FALSE(ControlMessage::Decode(changed).ok()) << int{type};
  }
}

TEST(ControlMessageTest, NoDamageIsFatal) {
  Seeded seeded;
  const std::string bytes =
      ControlMessage{Type::kAbort, 1, 2, std::string(1000, 't')}.Encode();
  for (int i = 0; i < 20'000; ++i) {
    std::string damaged = bytes.substr(0, seeded.Below(bytes.size() + 1));
    for (uint64_t flips = seeded.Below(4); flips > 0 && !damaged.empty();
         --flips) {
      const size_t at =
          seeded.OneIn(2) ? seeded.Below(damaged.size())
                          : seeded.Below(std::min<size_t>(24, damaged.size()));
      damaged[at] = static_cast<char>(damaged[at] ^ (1 << seeded.Below(8)));
    }
    const auto got = ControlMessage::Decode(damaged);
    if (got.ok()) {
      EXPECT_LE(got->text.size(), damaged.size());
      EXPECT_EQ(got->Encode().size(), damaged.size());
    } else {
      EXPECT_FALSE(got.status().message().empty());
    }
  }
}

TEST(ControlMessageTest, AbortArgumentTellsRankZeroFromNone) {
  EXPECT_NE(AbortArgument(StatusCode::kAborted, std::nullopt),
            AbortArgument(StatusCode::kAborted, 0));
  EXPECT_EQ(AbortArgument(StatusCode::kUnavailable, 6) >> 32, 14u);
  EXPECT_EQ(AbortArgument(StatusCode::kUnavailable, 6) & 0xffffffff, 7u);
}

}  // namespace
}  // namespace jaxfabric
