#include "base/doorbell.h"

#include <gtest/gtest.h>
#include <sys/wait.h>
#include <unistd.h>

#include <atomic>
#include <thread>

#include "base/shared_memory.h"

namespace jaxfabric {
namespace {

constexpr double kPatienceSeconds = 30;

TEST(DoorbellTest, WaitEndsAtItsDeadline) {
  DoorbellWords words = {};
  Doorbell doorbell(&words);
  const Deadline deadline = Deadline::AfterNanoseconds(5'000'000);
  while (!deadline.Expired()) doorbell.Wait(doorbell.Sequence(), deadline);
  EXPECT_EQ(words.sleepers.load(std::memory_order_relaxed), 0u);
}

TEST(DoorbellTest, ARingBeforeTheWaitIsNotLost) {
  DoorbellWords words = {};
  Doorbell doorbell(&words);
  const uint32_t seen = doorbell.Sequence();
  doorbell.Ring();
  const int64_t start_ns = MonotonicNanoseconds();
  doorbell.Wait(seen, Deadline::AfterSeconds(kPatienceSeconds));
  EXPECT_LT(MonotonicNanoseconds() - start_ns, 10'000'000'000);
}

TEST(DoorbellTest, TheSequenceWraps) {
  DoorbellWords words = {};
  words.sequence.store(~uint32_t{0}, std::memory_order_relaxed);
  Doorbell doorbell(&words);
  const uint32_t seen = doorbell.Sequence();
  doorbell.Ring();
  EXPECT_EQ(doorbell.Sequence(), 0u);
  doorbell.Wait(seen, Deadline::AfterSeconds(kPatienceSeconds));
}

TEST(DoorbellTest, NoRingIsMissedByASleepingThread) {
  constexpr uint32_t kRings = 5'000;
  DoorbellWords words = {};
  std::atomic<uint32_t> published = 0;
  std::atomic<uint32_t> taken = 0;
  const Deadline deadline = Deadline::AfterSeconds(kPatienceSeconds);
  std::thread sleeper([&] {
    Doorbell doorbell(&words);
    for (uint32_t i = 1; i <= kRings && !deadline.Expired(); ++i) {
      for (;;) {
        const uint32_t seen = doorbell.Sequence();
        if (published.load(std::memory_order_acquire) >= i) break;
        doorbell.Wait(seen, deadline);
        if (deadline.Expired()) return;
      }
      taken.store(i, std::memory_order_release);
    }
  });
  Doorbell doorbell(&words);
  for (uint32_t i = 1; i <= kRings; ++i) {
    published.store(i, std::memory_order_release);
    doorbell.Ring();
    while (taken.load(std::memory_order_acquire) < i && !deadline.Expired()) {
      std::this_thread::yield();
    }
  }
  sleeper.join();
  EXPECT_EQ(taken.load(std::memory_order_relaxed), kRings);
}

TEST(DoorbellTest, RingsAcrossProcesses) {
  StatusOr<SharedMemory> memory =
      SharedMemory::Create("test-doorbell", 2 * sizeof(DoorbellWords));
  ASSERT_TRUE(memory.ok());
  auto* words = reinterpret_cast<DoorbellWords*>(memory->data());
  const Deadline deadline = Deadline::AfterSeconds(kPatienceSeconds);
  const auto wait_for = [&](Doorbell doorbell, uint32_t count) {
    // One reading: a ring between two of them would be waited for twice.
    uint32_t seen = doorbell.Sequence();
    while (seen < count && !deadline.Expired()) {
      doorbell.Wait(seen, deadline);
      seen = doorbell.Sequence();
    }
    return seen >= count;
  };
  constexpr uint32_t kRounds = 200;
  const pid_t child = fork();
  ASSERT_GE(child, 0);
  if (child == 0) {
    bool all = true;
    for (uint32_t i = 1; i <= kRounds && all; ++i) {
      all = wait_for(Doorbell(&words[0]), i);
      Doorbell(&words[1]).Ring();
    }
    _exit(all ? 0 : 1);
  }
  bool all = true;
  for (uint32_t i = 1; i <= kRounds && all; ++i) {
    Doorbell(&words[0]).Ring();
    all = wait_for(Doorbell(&words[1]), i);
  }
  EXPECT_TRUE(all) << "a wake-up did not cross the process boundary";
  int status = 0;
  ASSERT_EQ(waitpid(child, &status, 0), child);
  EXPECT_EQ(status, 0);
}

}  // namespace
}  // namespace jaxfabric
