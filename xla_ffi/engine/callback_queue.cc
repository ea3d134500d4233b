#include "engine/callback_queue.h"

#include <algorithm>
#include <chrono>
#include <utility>

#include "base/elastic_pool.h"

namespace jaxfabric {
namespace {

// A callback that takes so long is stuck, if others wait. Twice as long after
// each in a row: one lock may be what all of them wait for, Python's above all.
constexpr std::chrono::milliseconds kStuckMin{10};
constexpr std::chrono::milliseconds kStuckMax{1000};

thread_local bool is_in_callback = false;

}  // namespace

CallbackQueue& CallbackQueue::Get() {
  static CallbackQueue* queue = new CallbackQueue();
  return *queue;
}

void CallbackQueue::Post(std::function<void()> callback) {
  std::lock_guard<std::mutex> lock(mutex_);
  waiting_.push_back(std::move(callback));
  if (!running_) {
    running_ = true;
    ElasticPool::Get().Post([this, runner = ++runner_] { Run(runner); });
  } else if (!watching_) {
    watching_ = true;
    ElasticPool::Get().Post([this] { Watch(); });
  }
}

void CallbackQueue::Run(uint64_t runner) {
  std::unique_lock<std::mutex> lock(mutex_);
  while (runner == runner_ && !waiting_.empty()) {
    std::function<void()> callback = std::move(waiting_.front());
    waiting_.pop_front();
    ++taken_;
    lock.unlock();
    is_in_callback = true;
    callback();
    callback = nullptr;  // what it holds is let go outside of the lock
    is_in_callback = false;
    lock.lock();
    if (++ended_ == taken_) drained_.notify_all();
  }
  if (runner != runner_) return;  // another has taken over
  running_ = false;
  watch_.notify_all();
}

void CallbackQueue::Drain(Deadline deadline) {
  if (is_in_callback) return;  // it would wait for itself
  const std::chrono::steady_clock::time_point until{
      std::chrono::nanoseconds(deadline.nanoseconds())};
  std::unique_lock<std::mutex> lock(mutex_);
  drained_.wait_until(lock, until,
                      [this] { return waiting_.empty() && ended_ == taken_; });
}

void CallbackQueue::Watch() {
  std::unique_lock<std::mutex> lock(mutex_);
  std::chrono::milliseconds patience = kStuckMin;
  while (running_) {
    const uint64_t seen = ended_;
    watch_.wait_for(lock, patience, [this] { return !running_; });
    if (!running_) break;
    if (ended_ != seen || waiting_.empty()) {
      patience = kStuckMin;
      continue;
    }
    patience = std::min(2 * patience, kStuckMax);
    ElasticPool::Get().Post([this, runner = ++runner_] { Run(runner); });
  }
  watching_ = false;
}

}  // namespace jaxfabric
