// DispatchWork: what every warp of a dispatch knows.

#ifndef JAXFABRIC_CUDA_DISPATCH_WORK_CUH_
#define JAXFABRIC_CUDA_DISPATCH_WORK_CUH_

#include <cstddef>
#include <cstdint>

#include "dispatch_plan.cuh"
#include "ll128.cuh"
#include "moe_kernels.h"
#include "moe_shape.h"

namespace jaxfabric::cuda {

inline constexpr int kDispatchThreads = 512;
inline constexpr int kDispatchWarps = kDispatchThreads / kLanes;
// Beyond this a plan does not fit a block's shared memory next to the rest.
inline constexpr size_t kSharedPlanBytesMax = size_t{96} << 10;

struct DispatchWork {
  const Peers& peers;
  const MoeShape& shape;
  const DispatchBuffers& io;
  PlanTables tables;
  PlanTotals totals;
  uint32_t* warp_buffer;
  uint64_t flag;  // of packets
  int lane;
  LanePart part;
  bool many;  // tokens: blocks have roles
  int per_item;
  bool aligned;  // rows of x and of tokens, to 16 bytes
  // Of this rank's own rows, items that receivers place; senders those after.
  int own_items;
};

}  // namespace jaxfabric::cuda

#endif  // JAXFABRIC_CUDA_DISPATCH_WORK_CUH_
