// ElasticPool: runs tasks that may block, and never lets one wait for another.
//
// Completing an XLA Future runs the rest of the XLA program on the completing
// thread, which may block in other calls. A task is therefore never queued
// behind a busy thread: when no thread is idle, one more is started.

#ifndef JAXFABRIC_BASE_ELASTIC_POOL_H_
#define JAXFABRIC_BASE_ELASTIC_POOL_H_

#include <condition_variable>
#include <cstddef>
#include <deque>
#include <functional>
#include <mutex>

namespace jaxfabric {

class ElasticPool {
 public:
  // The pool of this process. It is never destroyed: XLA's threads may still
  // post to it while the process ends.
  static ElasticPool& Get();

  void Post(std::function<void()> task);

  size_t ThreadCount() const;

 private:
  void Run();

  mutable std::mutex mutex_;
  std::condition_variable wake_;
  std::deque<std::function<void()>> tasks_;  // guarded by mutex_
  size_t idle_ = 0;                          // guarded by mutex_
  size_t threads_ = 0;                       // guarded by mutex_
};

}  // namespace jaxfabric

#endif  // JAXFABRIC_BASE_ELASTIC_POOL_H_
