#include "engine/callback_queue.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <atomic>
#include <chrono>
#include <future>
#include <memory>
#include <thread>
#include <vector>

#include "base/deadline.h"
#include "base/elastic_pool.h"
#include "engine/transfer_future.h"

namespace jaxfabric {
namespace {

constexpr auto kPatience = std::chrono::seconds(30);

TEST(CallbackQueueTest, ThousandsThatEndAtOnceNeedFewThreads) {
  constexpr int kFutures = 10'000;
  std::vector<TransferFuturePtr> futures;
  std::atomic<int> called{0};
  for (int i = 0; i < kFutures; ++i) {
    futures.push_back(
        std::make_shared<TransferFuture>(std::string("an operation"), i, 0));
    futures.back()->OnDone(
        [&](const Status&) { called.fetch_add(1, std::memory_order_relaxed); });
  }
  size_t threads_max = 0;
  for (const TransferFuturePtr& future : futures) {
    future->Finish(OkStatus());
    threads_max = std::max(threads_max, ElasticPool::Get().ThreadCount());
  }
  CallbackQueue::Get().Drain(Deadline::AfterSeconds(30));
  EXPECT_EQ(called.load(std::memory_order_relaxed), kFutures);
  // A busy machine makes some callbacks look stuck.
  EXPECT_LT(threads_max, 16u);
}

TEST(CallbackQueueTest, DrainingWaitsForAllButNotForItself) {
  auto ended = std::make_shared<std::atomic<int>>(0);
  for (int i = 0; i < 100; ++i) {
    CallbackQueue::Get().Post([ended] {
      CallbackQueue::Get().Drain(Deadline::AfterSeconds(30));
      ended->fetch_add(1, std::memory_order_relaxed);
    });
  }
  CallbackQueue::Get().Drain(Deadline::AfterSeconds(30));
  EXPECT_EQ(ended->load(std::memory_order_relaxed), 100);
  EXPECT_EQ(ended.use_count(), 1);
}

TEST(CallbackQueueTest, OneThatWaitsForALaterOneHoldsUpNobody) {
  constexpr int kWaiting = 3;
  // They outlive the test, should it fail.
  auto last = std::make_shared<std::promise<void>>();
  const std::shared_future<void> released = last->get_future().share();
  std::vector<std::shared_ptr<std::promise<bool>>> met;
  for (int i = 0; i < kWaiting; ++i) {
    met.push_back(std::make_shared<std::promise<bool>>());
    CallbackQueue::Get().Post([released, done = met.back()] {
      done->set_value(released.wait_for(kPatience) ==
                      std::future_status::ready);
    });
  }
  CallbackQueue::Get().Post([last] { last->set_value(); });
  const int64_t begin_ns = MonotonicNanoseconds();
  for (const auto& one : met) EXPECT_TRUE(one->get_future().get());
  EXPECT_LT(MonotonicNanoseconds() - begin_ns, 5'000'000'000);
}

}  // namespace
}  // namespace jaxfabric
