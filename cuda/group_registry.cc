#include "group_registry.h"

#include <utility>

namespace jaxfabric::cuda {

GroupRegistry& GroupRegistry::Get() {
  // Never destroyed: XLA may run programs until the process ends.
  static GroupRegistry* const registry = new GroupRegistry;
  return *registry;
}

Status GroupRegistry::Add(int64_t key, Published published) {
  const std::lock_guard<std::mutex> lock(mutex_);
  if (!groups_.emplace(key, std::move(published)).second) {
    return Status(StatusCode::kAlreadyExists,
                  "a Fabric of this mesh and name is open already");
  }
  return OkStatus();
}

void GroupRegistry::Remove(const Group* group) {
  const std::lock_guard<std::mutex> lock(mutex_);
  for (auto it = groups_.begin(); it != groups_.end();) {
    it = it->second.group.get() == group ? groups_.erase(it) : std::next(it);
  }
}

StatusOr<Published> GroupRegistry::Find(int64_t key) const {
  const std::lock_guard<std::mutex> lock(mutex_);
  const auto found = groups_.find(key);
  if (found == groups_.end()) {
    return Status(StatusCode::kFailedPrecondition,
                  "the Fabric of this program is closed; run it inside "
                  "`with jf.Fabric(mesh):`");
  }
  return found->second;
}

}  // namespace jaxfabric::cuda
