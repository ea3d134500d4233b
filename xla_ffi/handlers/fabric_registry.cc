#include "handlers/fabric_registry.h"

#include <utility>

namespace jaxfabric {

FabricRegistry& FabricRegistry::Get() {
  // Never destroyed: XLA's threads may look here while the process ends.
  static FabricRegistry* registry = new FabricRegistry();
  return *registry;
}

Status FabricRegistry::Add(int64_t key, std::shared_ptr<Fabric> fabric) {
  std::lock_guard<std::mutex> lock(mutex_);
  if (!fabrics_.emplace(key, std::move(fabric)).second) {
    return Status(StatusCode::kAlreadyExists,
                  "a Fabric of this name is open over this mesh; close it, or "
                  "give one of them another name=");
  }
  return OkStatus();
}

void FabricRegistry::Remove(int64_t key) {
  std::shared_ptr<Fabric> last;  // destroyed after the lock is released
  std::lock_guard<std::mutex> lock(mutex_);
  const auto found = fabrics_.find(key);
  if (found == fabrics_.end()) return;
  last = std::move(found->second);
  fabrics_.erase(found);
}

StatusOr<std::shared_ptr<Fabric>> FabricRegistry::Find(int64_t key) const {
  std::lock_guard<std::mutex> lock(mutex_);
  const auto found = fabrics_.find(key);
  if (found == fabrics_.end()) {
    return Status(StatusCode::kFailedPrecondition,
                  "the Fabric that this program was traced under is closed; "
                  "run it inside `with jaxfabric.Fabric(mesh):`");
  }
  return found->second;
}

}  // namespace jaxfabric
