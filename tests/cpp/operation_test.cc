#include "engine/operation.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <atomic>
#include <future>
#include <memory>
#include <optional>
#include <thread>
#include <utility>
#include <vector>

#include "base/elastic_pool.h"

namespace jaxfabric {
namespace {

using testing::HasSubstr;
using testing::Not;

constexpr auto kPatience = std::chrono::seconds(30);

Status Failure(const std::string& text) {
  return Status(StatusCode::kUnavailable, text);
}

// Where an operation ended, and how.
struct End {
  Status status;
  std::thread::id thread;
};

class Watched {
 public:
  OperationPtr Begin() {
    // Shared: the pool may still be in it when the test has seen its end.
    return std::make_shared<Operation>(
        "call", 30, [state = state_](Status status) {
          state->ends.fetch_add(1, std::memory_order_relaxed);
          state->end.set_value({std::move(status), std::this_thread::get_id()});
        });
  }
  int ends() const { return state_->ends.load(std::memory_order_relaxed); }
  End Await() {
    auto future = state_->end.get_future();
    JF_CHECK(future.wait_for(kPatience) == std::future_status::ready);
    return future.get();
  }

 private:
  struct State {
    std::atomic<int> ends{0};
    std::promise<End> end;
  };
  const std::shared_ptr<State> state_ = std::make_shared<State>();
};

TEST(OperationTest, TheLastReferenceCompletesIt) {
  Watched watched;
  OperationPtr first = watched.Begin();
  OperationPtr second = first;
  first.reset();
  EXPECT_EQ(watched.ends(), 0);
  second.reset();
  EXPECT_TRUE(watched.Await().status.ok());
  EXPECT_EQ(watched.ends(), 1);
}

TEST(OperationTest, AFailureAloneDoesNotHandBuffersBack) {
  Watched watched;
  OperationPtr operation = watched.Begin();
  EXPECT_FALSE(operation->failed());
  operation->Fail(Failure("first"));
  operation->Fail(Failure("second"));
  EXPECT_TRUE(operation->failed());
  // A wrong completion would be in the pool before this.
  std::promise<void> passed;
  ElasticPool::Get().Post([&passed] { passed.set_value(); });
  EXPECT_EQ(passed.get_future().wait_for(std::chrono::seconds(10)),
            std::future_status::ready);
  EXPECT_EQ(watched.ends(), 0);
  operation.reset();
  EXPECT_EQ(watched.Await().status.message(), "first");
}

TEST(OperationTest, OneOfManyThreadsCompletesItOnce) {
  for (int round = 0; round < 50; ++round) {
    Watched watched;
    OperationPtr operation = watched.Begin();
    std::vector<std::thread> threads;
    for (int t = 0; t < 4; ++t) {
      threads.emplace_back([mine = operation, t]() mutable {
        mine->Fail(Failure(std::to_string(t)));
        mine.reset();
      });
    }
    operation.reset();
    for (std::thread& thread : threads) thread.join();
    EXPECT_FALSE(watched.Await().status.ok());
    EXPECT_EQ(watched.ends(), 1);
  }
}

TEST(OperationTest, CompletesElsewhereUnlessToldOtherwise) {
  Watched elsewhere;
  elsewhere.Begin().reset();
  EXPECT_NE(elsewhere.Await().thread, std::this_thread::get_id());
  Watched here;
  {
    const Operation::CompleteHere complete_here;
    here.Begin().reset();
    EXPECT_EQ(here.ends(), 1) << "at once";
  }
  EXPECT_EQ(here.Await().thread, std::this_thread::get_id());
  Watched later;
  later.Begin().reset();
  EXPECT_NE(later.Await().thread, std::this_thread::get_id());
}

TEST(OperationTest, ScopesNest) {
  const Operation::CompleteHere outer;
  {
    const Operation::CompleteHere inner;
  }
  Watched watched;
  watched.Begin().reset();
  EXPECT_EQ(watched.Await().thread, std::this_thread::get_id());
}

TEST(OperationTest, WhatACompletionStartsDoesNotCompleteInIt) {
  // A completion runs the rest of the program, which must not run nested.
  Watched nested;
  int after = 0;
  {
    const Operation::CompleteHere complete_here;
    OperationPtr outer =
        std::make_shared<Operation>("outer", 30, [&](const Status&) {
          nested.Begin().reset();
          ++after;
        });
    outer.reset();
    EXPECT_EQ(after, 1);
    Watched next;
    next.Begin().reset();
    EXPECT_EQ(next.Await().thread, std::this_thread::get_id());
  }
  EXPECT_NE(nested.Await().thread, std::this_thread::get_id());
}

TEST(OperationTest, DescribesItself) {
  Watched watched;
  OperationPtr operation = watched.Begin();
  EXPECT_THAT(operation->Describe(), HasSubstr("call: 0.0 s into"));
  EXPECT_THAT(operation->Describe(), HasSubstr("time limit of 30 s"));
  EXPECT_THAT(operation->Describe(), Not(HasSubstr("waiting")));
  operation->SetWaitingFor([] { return std::string("rank 2"); });
  EXPECT_THAT(operation->Describe(), HasSubstr("waiting for rank 2"));
  // It asks without its lock: what it asks may look at the operation.
  operation->SetWaitingFor([raw = operation.get()] {
    return std::string(raw->failed() ? "nothing" : "all");
  });
  EXPECT_THAT(operation->Describe(), HasSubstr("waiting for all"));
  EXPECT_FALSE(operation->deadline().Expired());
}

TEST(OperationTest, ItsDeadlineCountsFromItsStart) {
  Operation operation("call", 1e-6, [](const Status&) {});
  while (!operation.deadline().Expired()) std::this_thread::yield();
}

}  // namespace
}  // namespace jaxfabric
