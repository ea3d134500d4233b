#include "base/elastic_pool.h"

#include <gtest/gtest.h>

#include <chrono>
#include <condition_variable>
#include <memory>
#include <mutex>

namespace jaxfabric {
namespace {

constexpr auto kPatience = std::chrono::seconds(30);

// Counts down, and lets threads wait for zero.
class Latch {
 public:
  explicit Latch(int count) : count_(count) {}
  void CountDown() {
    std::lock_guard<std::mutex> lock(mutex_);
    --count_;
    zero_.notify_all();
  }
  bool Wait() {
    std::unique_lock<std::mutex> lock(mutex_);
    return zero_.wait_for(lock, kPatience, [&] { return count_ <= 0; });
  }

 private:
  std::mutex mutex_;
  std::condition_variable zero_;
  int count_;
};

TEST(ElasticPoolTest, TasksThatBlockNeverHoldUpOthers) {
  // All tasks wait for each other: any that is queued behind another one would
  // dead-lock the lot.
  constexpr int kTasks = 64;
  auto met = std::make_shared<Latch>(kTasks);
  auto finished = std::make_shared<Latch>(kTasks);
  for (int i = 0; i < kTasks; ++i) {
    ElasticPool::Get().Post([met, finished] {
      met->CountDown();
      if (met->Wait()) finished->CountDown();
    });
  }
  EXPECT_TRUE(finished->Wait());
  EXPECT_GE(ElasticPool::Get().ThreadCount(), static_cast<size_t>(kTasks));
}

TEST(ElasticPoolTest, ATaskMayPostAndWaitForAnother) {
  auto outer = std::make_shared<Latch>(1);
  ElasticPool::Get().Post([outer] {
    auto inner = std::make_shared<Latch>(1);
    ElasticPool::Get().Post([inner] { inner->CountDown(); });
    if (inner->Wait()) outer->CountDown();
  });
  EXPECT_TRUE(outer->Wait());
}

TEST(ElasticPoolTest, IdleThreadsAreUsedAgain) {
  constexpr int kRounds = 200;
  const size_t before = ElasticPool::Get().ThreadCount();
  for (int i = 0; i < kRounds; ++i) {
    auto ran = std::make_shared<Latch>(1);
    ElasticPool::Get().Post([ran] { ran->CountDown(); });
    ASSERT_TRUE(ran->Wait());
  }
  // A few more at most: a thread that has counted down may not be idle yet.
  EXPECT_LE(ElasticPool::Get().ThreadCount(), before + 8);
}

TEST(ElasticPoolTest, WhatATaskHoldsIsReleased) {
  auto ran = std::make_shared<Latch>(1);
  const std::weak_ptr<Latch> held = ran;
  auto released = std::make_shared<Latch>(1);
  ElasticPool::Get().Post(
      [ran = std::shared_ptr<Latch>(ran.get(), [ran, released](Latch*) mutable {
         ran = nullptr;
         released->CountDown();
       })] { ran->CountDown(); });
  ran = nullptr;
  EXPECT_TRUE(released->Wait());
  EXPECT_TRUE(held.expired());
}

}  // namespace
}  // namespace jaxfabric
