// Tiles: the routes of 32 tokens, sent, received and marked by a warp.

#ifndef JAXFABRIC_CUDA_ROUTE_TILES_CUH_
#define JAXFABRIC_CUDA_ROUTE_TILES_CUH_

#include <cstdint>

#include "bounded_wait.cuh"
#include "ll128.cuh"
#include "moe_shape.h"

namespace jaxfabric::cuda {

// Of the plan's tables: the local experts, and one for tokens with any of them.
__device__ inline int PlanColumns(const MoeShape& shape) {
  return shape.experts + 1;
}

struct Tile {
  int source;
  int first;  // token of the source
  int tokens;
};

__device__ inline Tile TileAt(const MoeShape& shape, int tile) {
  const int source = tile / shape.tiles_per_source;
  const int first = (tile - source * shape.tiles_per_source) * kTileTokens;
  return {source, first, min(kTileTokens, shape.tokens - first)};
}

// Sends a tile of this rank's ids or weights to each other rank, by a warp.
__device__ inline void SendRoutes(const Peers& peers, const MoeShape& shape,
                                  int tile, bool weights, uint64_t flag,
                                  const void* array) {
  const int lane = threadIdx.x % kLanes;
  const LanePart part = MyPart(lane);
  const int first = tile * kTileTokens;
  const int tokens = min(kTileTokens, shape.tokens - first);
  const int words_all = tokens * shape.k;
  const uint32_t* const from =
      static_cast<const uint32_t*>(array) + int64_t{first} * shape.k;
  const int64_t at = (tile * 2 + (weights ? 1 : 0)) *
                     int64_t{shape.route_packets} * kPacketWire;
  const int packets = static_cast<int>(PacketsFor(words_all * 4));
  for (int p = 0; p < packets; ++p) {
    const int skipped = p * kPacketData / 4;
    const LaneWords words =
        LoadWordPart(from + skipped, words_all - skipped, part);
    for (int peer = 0; peer < peers.ranks; ++peer) {
      if (peer == peers.rank) continue;
      char* const wire = Mailbox(peers, peer, peers.rank, flag) + at;
      SendPart(wire + p * kPacketWire, lane, part, words, flag);
    }
  }
}

// Receives one of the two arrays of a tile's routes into `out`, by a warp.
__device__ inline bool ReceiveRoutes(const Peers& peers, const MoeShape& shape,
                                     Tile tile, bool weights, uint64_t flag,
                                     void* out) {
  constexpr int kBatch = 3;
  const int lane = threadIdx.x % kLanes;
  const LanePart part = MyPart(lane);
  const int words_all = tile.tokens * shape.k;
  const int packet =
      (tile.first / kTileTokens * 2 + (weights ? 1 : 0)) * shape.route_packets;
  const char* const wire =
      Mailbox(peers, peers.rank, tile.source, flag) + packet * kPacketWire;
  BoundedWait wait(peers, Operation::kDispatch, tile.source, flag);
  const int packets = static_cast<int>(PacketsFor(words_all * 4));
  for (int p = 0; p < packets; p += kBatch) {
    LaneWords words[kBatch];
    const int count = min(kBatch, packets - p);
    if (!ReceiveParts(wire + p * kPacketWire, count, lane, part, flag, wait,
                      Waiting::kEager, words)) {
      return false;
    }
#pragma unroll
    for (int i = 0; i < kBatch; ++i) {
      if (i >= count) continue;
      const int skipped = (p + i) * kPacketData / 4;
      StoreWordPart(static_cast<uint32_t*>(out) + skipped, words_all - skipped,
                    part, words[i]);
    }
  }
  __syncwarp();
  return true;
}

// The local expert of an id, or -1.
__device__ inline int LocalExpert(const MoeShape& shape, int rank, int id) {
  const int expert = id - rank * shape.experts;
  return id >= 0 && expert >= 0 && expert < shape.experts ? expert : -1;
}

// The words of one tile, by a warp. `first_arrival` counts the assignments of
// the tiles before; those from shape.kept_max on are left out. Returns the
// first of this lane's ids that names no expert, or one twice; -1 if all are
// good.
__device__ inline int MarkTile(const MoeShape& shape, int rank, int tokens,
                               const int32_t* ids, int64_t first_arrival,
                               uint32_t* row) {
  const int lane = threadIdx.x % kLanes;
  for (int c = lane; c < PlanColumns(shape); c += kLanes) row[c] = 0;
  __syncwarp();
  int64_t arrival = first_arrival;
  if (shape.kept_max < INT32_MAX) {
    int mine = 0;
    for (int k = 0; k < shape.k && lane < tokens; ++k) {
      if (LocalExpert(shape, rank, ids[lane * shape.k + k]) >= 0) ++mine;
    }
    int sum = mine;
    for (int step = 1; step < kLanes; step *= 2) {
      const int other = __shfl_up_sync(kAllLanes, sum, step);
      if (lane >= step) sum += other;
    }
    arrival += sum - mine;
  }
  bool any = false;
  int bad = -1;
  const uint32_t bit = 1u << lane;
#pragma unroll 4
  for (int k = 0; k < shape.k && lane < tokens; ++k) {
    const int id = ids[lane * shape.k + k];
    if (id < -1 || id >= shape.experts * shape.ranks) bad = k;
    const int expert = LocalExpert(shape, rank, id);
    if (expert < 0) continue;
    any = true;
    if (arrival++ >= shape.kept_max) continue;
    if ((atomicOr(&row[expert], bit) & bit) != 0) bad = k;
  }
  const uint32_t here = __ballot_sync(kAllLanes, any);
  if (lane == 0) row[shape.experts] = here;
  __syncwarp();
  return bad;
}

// Assignments of a tile to this rank, by a warp.
__device__ inline uint32_t CountArrivals(const MoeShape& shape, int rank,
                                         int tokens, const int32_t* ids) {
  uint32_t count = 0;
  for (int i = threadIdx.x % kLanes; i < tokens * shape.k; i += kLanes) {
    if (LocalExpert(shape, rank, ids[i]) >= 0) ++count;
  }
  return __reduce_add_sync(kAllLanes, count);
}

}  // namespace jaxfabric::cuda

#endif  // JAXFABRIC_CUDA_ROUTE_TILES_CUH_
