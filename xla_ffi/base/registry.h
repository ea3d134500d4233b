// Registry: shared objects by number.
//
// Compiled programs hold no pointers, only numbers: their handlers look up here
// what a number stands for at run time.

#ifndef JAXFABRIC_BASE_REGISTRY_H_
#define JAXFABRIC_BASE_REGISTRY_H_

#include <atomic>
#include <cstdint>
#include <memory>
#include <mutex>
#include <unordered_map>
#include <utility>

namespace jaxfabric {

template <typename T>
class Registry {
 public:
  // The one of this process.
  static Registry& Get() {
    // Never destroyed: XLA's threads may look here while the process ends.
    static Registry* const registry = new Registry();
    return *registry;
  }

  // Never given twice.
  int64_t NextId() { return next_id_.fetch_add(1, std::memory_order_relaxed); }

  // Whether the number was free.
  bool Add(int64_t id, std::shared_ptr<T> entry) {
    std::lock_guard<std::mutex> lock(mutex_);
    return entries_.emplace(id, std::move(entry)).second;
  }

  void Remove(int64_t id) {
    std::shared_ptr<T> last;  // destroyed after the lock is released
    std::lock_guard<std::mutex> lock(mutex_);
    const auto found = entries_.find(id);
    if (found == entries_.end()) return;
    last = std::move(found->second);
    entries_.erase(found);
  }

  // Null if it is not there (any more).
  std::shared_ptr<T> Find(int64_t id) const {
    std::lock_guard<std::mutex> lock(mutex_);
    const auto found = entries_.find(id);
    return found == entries_.end() ? nullptr : found->second;
  }

 private:
  std::atomic<int64_t> next_id_{1};
  mutable std::mutex mutex_;
  std::unordered_map<int64_t, std::shared_ptr<T>>
      entries_;  // guarded by mutex_
};

}  // namespace jaxfabric

#endif  // JAXFABRIC_BASE_REGISTRY_H_
