// Watcher: a 64-bit word that host code, a program or a device increments, and
// that an engine watches.
//
// The engine's callback gets the value before and after; it runs on the
// CallbackQueue, one call at a time, and skips values that came while it ran.

#ifndef JAXFABRIC_ENGINE_WATCHER_H_
#define JAXFABRIC_ENGINE_WATCHER_H_

#include <atomic>
#include <cstddef>
#include <cstdint>
#include <functional>
#include <memory>
#include <mutex>

#include "base/doorbell.h"
#include "base/shared_memory.h"
#include "base/status.h"

namespace jaxfabric {

class Watcher : public std::enable_shared_from_this<Watcher> {
 public:
  using Callback = std::function<void(uint64_t before, uint64_t after)>;

  // `word` lies in `memory`, which lives as long as the watcher.
  Watcher(int64_t id, std::shared_ptr<SharedMemory> memory,
          std::atomic<uint64_t>* word, Doorbell* doorbell, Callback callback)
      : id_(id),
        memory_(std::move(memory)),
        word_(word),
        doorbell_(doorbell),
        callback_(std::move(callback)) {}

  // Names it in this process, in compiled programs too; never used twice.
  int64_t id() const { return id_; }
  uint64_t value() const { return word_->load(std::memory_order_acquire); }

  // All that the caller wrote before is visible to the callback. May be called
  // by any thread, also after the engine has gone; then nobody watches.
  void Bump(uint64_t by = 1);

  // For the engine's worker: starts the callback if there is something new.
  bool Look();
  // The callback is not started again. It may be under way.
  void Close();

 private:
  const int64_t id_;
  const std::shared_ptr<SharedMemory> memory_;
  std::atomic<uint64_t>* const word_;
  std::atomic<bool> running_{false};
  uint64_t seen_ = 0;  // the worker's, and the callback's while it runs
  std::mutex mutex_;
  Doorbell* doorbell_;  // guarded by mutex_; null once closed
  Callback callback_;   // guarded by mutex_
};

// The words of an engine's watchers, a cache line each. Not thread-safe.
class WatcherWords {
 public:
  struct Word {
    std::shared_ptr<SharedMemory> memory;
    std::atomic<uint64_t>* word;
  };
  StatusOr<Word> Take();

 private:
  std::shared_ptr<SharedMemory> memory_;
  size_t used_ = 0;
};

}  // namespace jaxfabric

#endif  // JAXFABRIC_ENGINE_WATCHER_H_
