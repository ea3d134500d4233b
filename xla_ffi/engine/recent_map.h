// RecentMap: what was added last, up to a bound; the oldest is forgotten first.

#ifndef JAXFABRIC_ENGINE_RECENT_MAP_H_
#define JAXFABRIC_ENGINE_RECENT_MAP_H_

#include <cstddef>
#include <deque>
#include <map>

#include "base/check.h"

namespace jaxfabric {

template <typename Key, typename Value>
class RecentMap {
 public:
  explicit RecentMap(size_t size_max) : size_max_(size_max) {
    JF_CHECK(size_max > 0);
  }

  // False if it is there already; its first value stays.
  bool Add(const Key& key, const Value& value) {
    if (!values_.try_emplace(key, value).second) return false;
    order_.push_back(key);
    if (order_.size() > size_max_) {
      values_.erase(order_.front());
      order_.pop_front();
    }
    return true;
  }
  // Null if it was never added, or is forgotten.
  const Value* Find(const Key& key) const {
    const auto found = values_.find(key);
    return found == values_.end() ? nullptr : &found->second;
  }
  // Rare: it takes time that grows with what is remembered.
  void Forget(const Key& key) {
    if (values_.erase(key) > 0) std::erase(order_, key);
  }
  const std::map<Key, Value>& values() const { return values_; }

 private:
  const size_t size_max_;
  std::map<Key, Value> values_;
  std::deque<Key> order_;
};

}  // namespace jaxfabric

#endif  // JAXFABRIC_ENGINE_RECENT_MAP_H_
