// Place: from everyone's routes to the rows of this rank's output.
//
// Assignments are taken in (source, token, k) order; the first `capacity` of
// them are kept. Kept rows are grouped by local expert, in the same order
// inside a group, and groups are padded to the alignment: the same bits on
// every transport and whatever the order of arrival.

#ifndef JAXFABRIC_MOE_PLACE_H_
#define JAXFABRIC_MOE_PLACE_H_

#include <cstdint>
#include <span>

#include "moe/layout.h"
#include "moe/message.h"
#include "moe/receive_plan.h"

namespace jaxfabric::moe {

// The program's result buffers; every element is written.
struct PlaceOutputs {
  std::span<int32_t> group_sizes;  // [E/N], padded
  std::span<int32_t> slot_row;     // [N*T, S], -1: no slot, dropped or unused
  std::span<int32_t> recv_count;   // [N]
  std::span<float> weights;        // [R], 0 in padding and tail
  // [R], row of `tokens` or -1; empty if layout.expand.
  std::span<int32_t> row_index;
};

struct Placement {
  ReceivePlan plan;     // refers to outputs.slot_row
  int32_t dropped = 0;  // assignments over capacity
};

// `by_source` holds one view per rank. Example (N=1, E=2, K=2, alignment 2,
// ids = {{1, 0}, {1, -1}, {1, -1}}): group_sizes = {2, 4}, slot_row =
// {{2, 0}, {3, -1}, {4, -1}}, padding = rows 1 and 5.
Placement Place(const Layout& layout, std::span<const RouteView> by_source,
                const PlaceOutputs& outputs);

}  // namespace jaxfabric::moe

#endif  // JAXFABRIC_MOE_PLACE_H_
