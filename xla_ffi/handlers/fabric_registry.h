// FabricRegistry: what a compiled program's stable key stands for at run time.
//
// Programs hold no pointers: only the key of their Fabric (a hash of mesh and
// name). A function jitted under one Fabric therefore runs under its successor.

#ifndef JAXFABRIC_HANDLERS_FABRIC_REGISTRY_H_
#define JAXFABRIC_HANDLERS_FABRIC_REGISTRY_H_

#include <cstdint>
#include <memory>
#include <mutex>
#include <string>
#include <unordered_map>
#include <vector>

#include "base/status.h"
#include "engine/engine.h"

namespace jaxfabric {

struct Window {
  uint64_t offset = 0;  // in all windows
  uint64_t bytes = 0;
};

struct Fabric {
  std::string name;
  std::vector<int64_t> mesh_shape;
  std::unordered_map<int64_t, uint32_t> rank_by_device;  // local devices
  std::unique_ptr<Engine> engine;

  mutable std::mutex mutex;
  std::vector<Window> windows;  // guarded by mutex
};

class FabricRegistry {
 public:
  static FabricRegistry& Get();

  Status Add(int64_t key, std::shared_ptr<Fabric> fabric);
  void Remove(int64_t key);
  StatusOr<std::shared_ptr<Fabric>> Find(int64_t key) const;

 private:
  mutable std::mutex mutex_;
  std::unordered_map<int64_t, std::shared_ptr<Fabric>> fabrics_;
};

}  // namespace jaxfabric

#endif  // JAXFABRIC_HANDLERS_FABRIC_REGISTRY_H_
