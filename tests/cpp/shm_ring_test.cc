#include "transport/shm_ring.h"

#include <gtest/gtest.h>

#include <memory>
#include <string>
#include <thread>

#include "base/deadline.h"

namespace jaxfabric {
namespace {

class ShmRingTest : public testing::Test {
 protected:
  std::unique_ptr<ShmRingLayout> ring_ = std::make_unique<ShmRingLayout>();
  std::byte* memory_ = reinterpret_cast<std::byte*>(ring_.get());
  ShmRingWriter writer_{memory_};
  ShmRingReader reader_{memory_};
  Completion out_;
};

TEST_F(ShmRingTest, FillsEmptiesAndFillsAgain) {
  uint32_t next_in = 0;
  uint32_t next_out = 0;
  for (int round = 0; round < 5; ++round) {
    while (writer_.HasRoom() == ShmRingResult::kDone) {
      writer_.PushImmediate(next_in++);
    }
    EXPECT_EQ(writer_.HasRoom(), ShmRingResult::kNotNow);
    EXPECT_EQ(next_in - next_out, kShmRingEntries);
    // Not a multiple of the size, so that the wrap moves.
    for (uint32_t i = 0; i < kShmRingEntries - 7u * (round < 4); ++i) {
      ASSERT_EQ(reader_.Pop(out_), ShmRingResult::kDone);
      ASSERT_EQ(out_.kind, Completion::Kind::kImmediate);
      ASSERT_EQ(out_.immediate, next_out++);
    }
  }
  EXPECT_EQ(reader_.Pop(out_), ShmRingResult::kNotNow);
}

TEST_F(ShmRingTest, MessagesOfAllSizes) {
  for (const size_t size : {size_t{0}, size_t{1}, size_t{kShmMessageBytes}}) {
    const std::string message(size, 'm');
    ASSERT_EQ(writer_.HasRoom(), ShmRingResult::kDone);
    writer_.PushMessage(message);
    ASSERT_EQ(reader_.Pop(out_), ShmRingResult::kDone);
    EXPECT_EQ(out_.kind, Completion::Kind::kMessage);
    EXPECT_EQ(out_.message, message);
  }
}

TEST_F(ShmRingTest, NonsenseFromTheProducerIsSeen) {
  ring_->tail.store(kShmRingEntries + 1, std::memory_order_relaxed);
  EXPECT_EQ(reader_.Pop(out_), ShmRingResult::kNonsense);
  ring_->tail.store(~uint32_t{0}, std::memory_order_relaxed);
  EXPECT_EQ(reader_.Pop(out_), ShmRingResult::kNonsense);

  ring_->tail.store(1, std::memory_order_relaxed);
  ShmRingEntry& entry = ring_->entries[0];
  const auto pop = [&](uint32_t kind, uint32_t length) {
    entry.kind.store(kind, std::memory_order_relaxed);
    entry.length.store(length, std::memory_order_relaxed);
    return reader_.Pop(out_);
  };
  EXPECT_EQ(pop(0, 0), ShmRingResult::kNonsense);
  EXPECT_EQ(pop(3, 0), ShmRingResult::kNonsense);
  EXPECT_EQ(pop(1, 1), ShmRingResult::kNonsense);
  EXPECT_EQ(pop(2, kShmMessageBytes + 1), ShmRingResult::kNonsense);
  EXPECT_EQ(pop(2, ~uint32_t{0}), ShmRingResult::kNonsense);
  EXPECT_EQ(pop(2, kShmMessageBytes), ShmRingResult::kDone);
}

TEST_F(ShmRingTest, NonsenseFromTheConsumerIsSeen) {
  for (uint32_t i = 0; i < kShmRingEntries; ++i) writer_.PushImmediate(i);
  ring_->head.store(kShmRingEntries + 1, std::memory_order_relaxed);
  EXPECT_EQ(writer_.HasRoom(), ShmRingResult::kNonsense);
  ring_->head.store(~uint32_t{0}, std::memory_order_relaxed);
  EXPECT_EQ(writer_.HasRoom(), ShmRingResult::kNonsense);
}

TEST_F(ShmRingTest, TwoThreadsSeeAllInOrder) {
  constexpr uint32_t kEntries = 50'000;
  const Deadline deadline = Deadline::AfterSeconds(30);
  std::thread producer([&] {
    for (uint32_t i = 0; i < kEntries && !deadline.Expired();) {
      if (writer_.HasRoom() == ShmRingResult::kDone) {
        writer_.PushMessage(std::to_string(i++));
      } else {
        std::this_thread::yield();
      }
    }
  });
  uint32_t taken = 0;
  while (taken < kEntries && !deadline.Expired()) {
    const ShmRingResult result = reader_.Pop(out_);
    if (result == ShmRingResult::kNotNow) {
      std::this_thread::yield();
      continue;
    }
    ASSERT_EQ(result, ShmRingResult::kDone);
    ASSERT_EQ(out_.message, std::to_string(taken++));
  }
  producer.join();
  EXPECT_EQ(taken, kEntries);
}

}  // namespace
}  // namespace jaxfabric
