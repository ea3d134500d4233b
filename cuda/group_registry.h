// GroupRegistry: what a compiled program's stable key stands for at run time.

#ifndef JAXFABRIC_CUDA_GROUP_REGISTRY_H_
#define JAXFABRIC_CUDA_GROUP_REGISTRY_H_

#include <cstdint>
#include <map>
#include <memory>
#include <mutex>

#include "base/status.h"
#include "group.h"

namespace jaxfabric::cuda {

struct Published {
  std::shared_ptr<Group> group;
  double timeout_s = 0;
};

class GroupRegistry {
 public:
  static GroupRegistry& Get();

  Status Add(int64_t key, Published published);
  void Remove(const Group* group);
  StatusOr<Published> Find(int64_t key) const;

 private:
  mutable std::mutex mutex_;
  std::map<int64_t, Published> groups_;  // guarded by mutex_
};

}  // namespace jaxfabric::cuda

#endif  // JAXFABRIC_CUDA_GROUP_REGISTRY_H_
