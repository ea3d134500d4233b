#include "engine/message_parts.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <algorithm>

#include "tests/cpp/seeded.h"

namespace jaxfabric {
namespace {

TEST(MessagePartsTest, AnyOrderAndRepetitionGiveTheMessagesOnceAndInOrder) {
  Seeded seeded;
  for (int round = 0; round < 50; ++round) {
    std::vector<std::string> sent;
    std::vector<TransferFrame> frames;
    for (uint64_t i = 0; i < 20; ++i) {
      sent.push_back(std::string(seeded.Below(400), static_cast<char>(i)));
      for (TransferFrame& frame : CutIntoParts(i, sent.back(), 64)) {
        EXPECT_LE(frame.Encode().size(), 64u);
        if (seeded.OneIn(5)) frames.push_back(frame);
        frames.push_back(std::move(frame));
      }
    }
    std::shuffle(frames.begin(), frames.end(), seeded.random());
    MessageAssembler assembler;
    std::vector<std::string> received;
    for (const TransferFrame& frame : frames) {
      const auto decoded = TransferFrame::Decode(frame.Encode());
      ASSERT_TRUE(decoded.ok());
      ASSERT_TRUE(assembler.Add(*decoded, &received).ok());
    }
    EXPECT_EQ(received, sent);
    EXPECT_EQ(assembler.next(), 20u);
  }
}

TEST(MessagePartsTest, PartsThatCannotBeAreRefused) {
  const auto add = [](uint64_t number, uint64_t index, uint64_t count,
                      size_t bytes = 1) {
    MessageAssembler assembler;
    std::vector<std::string> complete;
    return assembler
        .Add({.type = TransferFrame::Type::kPart,
              .a = number,
              .b = index << 32 | count,
              .body = std::string(bytes, 'x')},
             &complete)
        .ok();
  };
  EXPECT_TRUE(add(0, 0, 1));
  EXPECT_TRUE(add(0, 1, 2));
  EXPECT_FALSE(add(0, 0, 0));
  EXPECT_FALSE(add(0, 2, 2));
  EXPECT_FALSE(add(0, 0, MessageAssembler::kPartsMax + 1));
  EXPECT_FALSE(add(MessageAssembler::kAheadMax, 0, 1));
  EXPECT_FALSE(add(0, 0, 1, kTransferMessageBytesMax + 1));
}

TEST(MessagePartsTest, PartsOfOneMessageAgreeOnTheirNumber) {
  MessageAssembler assembler;
  std::vector<std::string> complete;
  const TransferFrame first = {.b = 2, .body = "x"};
  const TransferFrame second = {.b = uint64_t{1} << 32 | 3, .body = "x"};
  EXPECT_TRUE(assembler.Add(first, &complete).ok());
  EXPECT_FALSE(assembler.Add(second, &complete).ok());
  EXPECT_TRUE(complete.empty());
}

TEST(MessagePartsTest, MessagesOfManyPartsAreHeldWithinBounds) {
  MessageAssembler assembler;
  std::vector<std::string> complete;
  constexpr uint64_t kParts = MessageAssembler::kPartsMax;
  constexpr uint64_t kMessages =
      MessageAssembler::kHeldBytesMax / (kParts * sizeof(std::string)) + 1;
  uint64_t held = 0;
  while (held < kMessages &&
         assembler.Add({.a = held + 1, .b = kParts, .body = "x"}, &complete)
             .ok()) {
    ++held;
  }
  EXPECT_LT(held, kMessages);
  EXPECT_GT(held, kMessages / 2);
}

TEST(TransferFrameTest, WhatIsNoFrameIsRefused) {
  const std::string good = TransferFrame{.body = "body"}.Encode();
  EXPECT_EQ(TransferFrame::Decode(good)->body, "body");
  for (size_t size = 0; size < TransferFrame::kHeaderBytes; ++size) {
    EXPECT_FALSE(TransferFrame::Decode(good.substr(0, size)).ok());
  }
  for (const size_t at : {0, 6}) {  // magic, type
    std::string bad = good;
    bad[at] = 99;
    EXPECT_EQ(TransferFrame::Decode(bad).status().code(),
              StatusCode::kInvalidArgument);
  }
}

}  // namespace
}  // namespace jaxfabric
