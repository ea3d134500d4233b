#include "engine/mesh_group.h"

#include <string>

namespace jaxfabric {

StatusOr<MeshGroup> GroupOf(const std::vector<int64_t>& mesh_shape,
                            const std::vector<int64_t>& axes, uint32_t rank) {
  std::vector<int64_t> strides(mesh_shape.size(), 1);
  for (size_t i = mesh_shape.size(); i-- > 1;) {
    strides[i - 1] = strides[i] * mesh_shape[i];
  }
  int64_t group_size = 1;
  int64_t base = rank;
  for (int64_t axis : axes) {
    if (axis < 0 || axis >= static_cast<int64_t>(mesh_shape.size()) ||
        mesh_shape[axis] < 1) {
      return Status(StatusCode::kInvalidArgument,
                    "the mesh has no axis " + std::to_string(axis));
    }
    group_size *= mesh_shape[axis];
    base -= rank / strides[axis] % mesh_shape[axis] * strides[axis];
  }
  MeshGroup group;
  for (int64_t position = 0; position < group_size; ++position) {
    int64_t member = base;
    int64_t rest = position;
    for (size_t i = axes.size(); i-- > 0;) {
      member += rest % mesh_shape[axes[i]] * strides[axes[i]];
      rest /= mesh_shape[axes[i]];
    }
    if (member == rank) group.position = static_cast<uint32_t>(position);
    group.ranks.push_back(static_cast<uint32_t>(member));
  }
  return group;
}

}  // namespace jaxfabric
