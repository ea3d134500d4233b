#include "base/elastic_pool.h"

#include <pthread.h>

#include <chrono>
#include <thread>
#include <utility>

namespace jaxfabric {
namespace {

// Long enough that a training loop keeps its threads, short enough that a
// burst's threads go away.
constexpr auto kIdleThreadLife = std::chrono::seconds(30);

}  // namespace

ElasticPool& ElasticPool::Get() {
  static ElasticPool* pool = new ElasticPool();
  return *pool;
}

void ElasticPool::Post(std::function<void()> task) {
  bool start_thread = false;
  {
    std::lock_guard<std::mutex> lock(mutex_);
    tasks_.push_back(std::move(task));
    // Idle threads that were notified but have not run yet still count as
    // idle, hence the comparison with all queued tasks.
    if (tasks_.size() > idle_) {
      ++threads_;
      start_thread = true;
    }
  }
  if (start_thread) {
    std::thread([this] { Run(); }).detach();
  } else {
    wake_.notify_one();
  }
}

size_t ElasticPool::ThreadCount() const {
  std::lock_guard<std::mutex> lock(mutex_);
  return threads_;
}

void ElasticPool::Run() {
  pthread_setname_np(pthread_self(), "jaxfabric-pool");
  std::unique_lock<std::mutex> lock(mutex_);
  for (;;) {
    ++idle_;
    const bool has_task = wake_.wait_for(lock, kIdleThreadLife,
                                         [this] { return !tasks_.empty(); });
    --idle_;
    if (!has_task) {
      --threads_;
      return;
    }
    std::function<void()> task = std::move(tasks_.front());
    tasks_.pop_front();
    lock.unlock();
    task();
    task = nullptr;  // what it holds is released outside the lock
    lock.lock();
  }
}

}  // namespace jaxfabric
