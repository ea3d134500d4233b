// Placing: what a dispatch writes into the program's results, by warps that
// follow the plan.

#ifndef JAXFABRIC_CUDA_DISPATCH_PLACE_CUH_
#define JAXFABRIC_CUDA_DISPATCH_PLACE_CUH_

#include <cstdint>

#include "bounded_wait.cuh"
#include "dispatch_plan.cuh"
#include "dispatch_work.cuh"
#include "moe_kernels.h"
#include "moe_shape.h"
#include "row_segments.cuh"

namespace jaxfabric::cuda {

__device__ inline const int32_t* TileIds(const DispatchWork& w,
                                         const Tile& tile) {
  return w.tables.ids +
         (int64_t{tile.source} * w.shape.tokens + tile.first) * w.shape.k;
}

// Assignments in the tiles before `tile`, by a warp.
__device__ inline int64_t ArrivalsBefore(const DispatchWork& w, int tile) {
  uint32_t sum = 0;
  for (int i = w.lane; i < tile; i += kLanes) sum += w.tables.arrivals[i];
  return __reduce_add_sync(kAllLanes, sum);
}

// Weights, slots and row indices of one tile, by a warp: a token to a lane.
__device__ inline void PlaceRoutes(const DispatchWork& w, int number) {
  const MoeShape& shape = w.shape;
  const Tile tile = TileAt(shape, number);
  const float* weights = w.io.weights + int64_t{tile.first} * shape.k;
  if (tile.source != w.peers.rank) {
    if (!ReceiveRoutes(w.peers, shape, tile, true, w.flag, w.warp_buffer)) {
      return;
    }
    weights = reinterpret_cast<const float*>(w.warp_buffer);
  }
  const int columns = PlanColumns(shape);
  const uint32_t* const bits = w.tables.bits + number * columns;
  const uint32_t* const before = w.tables.before + number * columns;
  const uint32_t bit = 1u << w.lane;
  const uint32_t here = bits[shape.experts];
  if ((here & bit) != 0) {
    const int32_t* const ids = TileIds(w, tile) + w.lane * shape.k;
    const uint32_t unique = before[shape.experts] + __popc(here & (bit - 1));
    int32_t* const slots = w.io.slot_row + int64_t{unique} * shape.slots;
    int q = 0;
#pragma unroll 4
    for (int k = 0; k < shape.k; ++k) {
      const int expert = LocalExpert(shape, w.peers.rank, ids[k]);
      if (expert < 0) continue;
      int32_t row = -1;
      if ((bits[expert] & bit) != 0) {
        row = static_cast<int32_t>(w.totals.base[expert] + before[expert] +
                                   __popc(bits[expert] & (bit - 1)));
        w.io.row_weights[row] = weights[w.lane * shape.k + k];
        if (!shape.expand) w.io.row_index[row] = static_cast<int32_t>(unique);
      }
      // A token with an expert twice is reported by its own rank.
      if (q < shape.slots) slots[q++] = row;
    }
    for (; q < shape.slots; ++q) slots[q] = -1;
  }
  __syncwarp();
}

// Rows without an assignment: padding in the groups and what comes after them.
template <class Rows>
__device__ void PlaceNothing(const DispatchWork& w, WarpShare share) {
  const MoeShape& shape = w.shape;
  const uint32_t* const total = w.totals.total;
  const int64_t rows_end = w.totals.base[shape.experts];
  const int segments = Rows::Segments(shape);
  const auto vacant = [&](int64_t row) {
    if (w.lane == 0) {
      w.io.row_weights[row] = 0.0f;
      if (!shape.expand) w.io.row_index[row] = -1;
    }
  };
  const int pads = shape.alignment - 1;
  for (int64_t i = share.index; i < int64_t{shape.experts} * pads;
       i += share.count) {
    const int expert = static_cast<int>(i / pads);
    const uint32_t row = w.totals.base[expert] + total[expert] + i % pads;
    if (row >= w.totals.base[expert + 1]) continue;
    vacant(row);
    for (int s = 0; s < segments && shape.expand; ++s) {
      Rows::Zero(w, row, s);
    }
  }
  const int64_t thread = int64_t{share.index} * kLanes + w.lane;
  const int64_t threads = int64_t{share.count} * kLanes;
  for (int64_t row = rows_end + thread; row < shape.rows; row += threads) {
    w.io.row_weights[row] = 0.0f;
    if (!shape.expand) w.io.row_index[row] = -1;
  }
  const int64_t unique = total[shape.experts];
  const int64_t unique_max = int64_t{shape.ranks} * shape.tokens;
  for (int64_t i = unique * shape.slots + thread; i < unique_max * shape.slots;
       i += threads) {
    w.io.slot_row[i] = -1;
  }
  if (!shape.zero_tail) return;
  const int64_t begin = shape.expand ? rows_end : unique;
  const int64_t end = shape.expand ? shape.rows : unique_max;
  for (int64_t i = share.index; i < (end - begin) * segments;
       i += share.count) {
    Rows::Zero(w, begin + i / segments, static_cast<int>(i % segments));
  }
}

// The small results, by one warp.
__device__ inline void PlaceCounts(const DispatchWork& w) {
  const MoeShape& shape = w.shape;
  const int columns = PlanColumns(shape);
  for (int e = w.lane; e < shape.experts; e += kLanes) {
    w.io.group_sizes[e] = w.totals.base[e + 1] - w.totals.base[e];
  }
  const uint32_t* const here = w.tables.before + shape.experts;
  if (w.lane < shape.ranks) {
    const int first = w.lane * shape.tiles_per_source;
    const int next = first + shape.tiles_per_source;
    const uint32_t end = next < shape.tiles ? here[next * columns]
                                            : w.totals.total[shape.experts];
    w.io.recv_count[w.lane] = end - here[first * columns];
  }
  const int64_t wanted =
      shape.kept_max < INT32_MAX ? ArrivalsBefore(w, shape.tiles) : 0;
  if (w.lane == 0) {
    *w.io.dropped =
        wanted > shape.kept_max ? static_cast<int>(wanted - shape.kept_max) : 0;
  }
}

// Unique rows that this rank sends to each, by one block.
__device__ inline void CountSent(const DispatchWork& w) {
  __shared__ int32_t sent[kRanksMax];
  const MoeShape& shape = w.shape;
  if (threadIdx.x < kRanksMax) sent[threadIdx.x] = 0;
  __syncthreads();
  int mine = 0;  // lane r: of this warp's tokens, those that go to rank r
  for (int first = static_cast<int>(threadIdx.x) - w.lane; first < shape.tokens;
       first += kDispatchThreads) {
    const int token = first + w.lane;
    uint32_t to = 0;
#pragma unroll 8
    for (int k = 0; k < shape.k && token < shape.tokens; ++k) {
      const int id = w.io.ids[int64_t{token} * shape.k + k];
      if (id >= 0 && id < shape.experts * shape.ranks) {
        to |= 1u << (id / shape.experts);
      }
    }
    for (int rank = 0; rank < shape.ranks; ++rank) {
      const uint32_t going = __ballot_sync(kAllLanes, (to >> rank & 1) != 0);
      if (w.lane == rank) mine += __popc(going);
    }
  }
  if (mine != 0) atomicAdd(&sent[w.lane], mine);
  __syncthreads();
  if (static_cast<int>(threadIdx.x) < shape.ranks) {
    w.io.sent[threadIdx.x] = sent[threadIdx.x];
  }
}

}  // namespace jaxfabric::cuda

#endif  // JAXFABRIC_CUDA_DISPATCH_PLACE_CUH_
