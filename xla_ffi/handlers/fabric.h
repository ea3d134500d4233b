// Fabric: what the stable key in a compiled program stands for at run time.
//
// The key is a hash of mesh and name: a function jitted under one Fabric runs
// under its successor.

#ifndef JAXFABRIC_HANDLERS_FABRIC_H_
#define JAXFABRIC_HANDLERS_FABRIC_H_

#include <cstdint>
#include <memory>
#include <mutex>
#include <string>
#include <unordered_map>
#include <vector>

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

}  // namespace jaxfabric

#endif  // JAXFABRIC_HANDLERS_FABRIC_H_
