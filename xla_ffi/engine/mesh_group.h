// Which ranks take part in a call over some axes of a mesh. Pure; C++17,
// because cuda/ compiles it too.

#ifndef JAXFABRIC_ENGINE_MESH_GROUP_H_
#define JAXFABRIC_ENGINE_MESH_GROUP_H_

#include <cstdint>
#include <vector>

#include "base/status.h"

namespace jaxfabric {

// Ranks count through the mesh in row-major order. The group of `rank` over
// `axes` are the ranks that differ from it in these axes only, in the row-major
// order of the axes as given: position i of the group is axis index i.
struct MeshGroup {
  std::vector<uint32_t> ranks;
  uint32_t position = 0;  // of `rank` itself
};

StatusOr<MeshGroup> GroupOf(const std::vector<int64_t>& mesh_shape,
                            const std::vector<int64_t>& axes, uint32_t rank);

}  // namespace jaxfabric

#endif  // JAXFABRIC_ENGINE_MESH_GROUP_H_
