// CallbackQueue: runs the callbacks of operations that have ended, beginning
// them in the order in which those ended.
//
// Thousands may end at once, and each callback may block: for a lock of the
// program's, or for what a later callback does. So one thread runs them all,
// and when it gets stuck in one, the next goes on in its place.

#ifndef JAXFABRIC_ENGINE_CALLBACK_QUEUE_H_
#define JAXFABRIC_ENGINE_CALLBACK_QUEUE_H_

#include <condition_variable>
#include <cstdint>
#include <deque>
#include <functional>
#include <mutex>

#include "base/deadline.h"

namespace jaxfabric {

class CallbackQueue {
 public:
  // That of this process. Like the ElasticPool, whose threads it uses, it is
  // never destroyed.
  static CallbackQueue& Get();

  void Post(std::function<void()> callback);
  // Waits until all have run, and what they held is let go; not in a callback.
  void Drain(Deadline deadline);

 private:
  void Run(uint64_t runner);
  void Watch();

  std::mutex mutex_;
  std::condition_variable watch_;
  std::condition_variable drained_;
  std::deque<std::function<void()>> waiting_;  // guarded by mutex_
  uint64_t runner_ = 0;    // who takes the next; guarded by mutex_
  bool running_ = false;   // there is one; guarded by mutex_
  bool watching_ = false;  // a thread does; guarded by mutex_
  uint64_t taken_ = 0;     // so far; guarded by mutex_
  uint64_t ended_ = 0;     // of them; guarded by mutex_
};

}  // namespace jaxfabric

#endif  // JAXFABRIC_ENGINE_CALLBACK_QUEUE_H_
