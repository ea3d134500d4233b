#include "engine/watcher.h"

#include <new>
#include <utility>

#include "base/cache_line.h"
#include "engine/callback_queue.h"

namespace jaxfabric {
namespace {

constexpr size_t kWordsBytes = 65536;

}  // namespace

StatusOr<WatcherWords::Word> WatcherWords::Take() {
  if (memory_ == nullptr || used_ == kWordsBytes) {
    JF_ASSIGN_OR_RETURN(
        SharedMemory words,
        SharedMemory::Create("jaxfabric-watchers", kWordsBytes));
    memory_ = std::make_shared<SharedMemory>(std::move(words));
    used_ = 0;
  }
  auto* const word = new (memory_->data() + used_) std::atomic<uint64_t>;
  used_ += kCacheLineBytes;
  return Word{memory_, word};
}

void Watcher::Bump(uint64_t by) {
  word_->fetch_add(by, std::memory_order_release);
  std::lock_guard<std::mutex> lock(mutex_);
  if (doorbell_ != nullptr) doorbell_->Ring();
}

bool Watcher::Look() {
  // Acquire: what the last call left in seen_.
  if (running_.load(std::memory_order_acquire)) return false;
  const uint64_t now = word_->load(std::memory_order_acquire);
  if (now == seen_) return false;
  running_.store(true, std::memory_order_relaxed);
  CallbackQueue::Get().Post([self = shared_from_this(), now] {
    Callback callback;
    {
      std::lock_guard<std::mutex> lock(self->mutex_);
      callback = self->callback_;
    }
    if (callback) callback(self->seen_, now);
    self->seen_ = now;
    self->running_.store(false, std::memory_order_release);
    // What came meanwhile rang while nobody would look.
    std::lock_guard<std::mutex> lock(self->mutex_);
    if (self->doorbell_ != nullptr) self->doorbell_->Ring();
  });
  return true;
}

void Watcher::Close() {
  Callback dropped;  // destroyed after the lock is released
  std::lock_guard<std::mutex> lock(mutex_);
  doorbell_ = nullptr;
  dropped.swap(callback_);
}

}  // namespace jaxfabric
