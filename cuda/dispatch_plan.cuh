// DispatchPlan: from everyone's routes to the rows of this rank's output.
//
// For each tile of 32 tokens and each local expert there is a word with one bit
// per token that chose the expert, and the number of such tokens in all tiles
// before. An assignment's row is then
//   base[expert] + before[tile][expert] + popc(bits[tile][expert] & lower
//   bits).
// One more column, kHere, has the tokens with any expert on this rank; it gives
// the unique rows. The same order as on the host: (source, token, k).
//
// Few tokens: every block makes the whole plan in its shared memory. Many: the
// receiving blocks make it together in global memory, each its share of tiles.

#ifndef JAXFABRIC_CUDA_DISPATCH_PLAN_CUH_
#define JAXFABRIC_CUDA_DISPATCH_PLAN_CUH_

#include <cstdint>

#include "bounded_wait.cuh"
#include "moe_shape.h"
#include "route_tiles.cuh"

namespace jaxfabric::cuda {

// Tables of the plan; columns are the local experts, then kHere.
struct PlanTables {
  int32_t* ids;         // [N*T, K]
  uint32_t* bits;       // [tiles, columns]
  uint32_t* before;     // [tiles, columns]
  uint32_t* block_sum;  // [blocks, columns]
  uint32_t* arrivals;   // [tiles], assignments to this rank
};

// In shared memory of every block.
struct PlanTotals {
  uint32_t* total;    // [columns]
  uint32_t* base;     // [columns], first row of each expert
  uint32_t* earlier;  // [columns], of the blocks before this one
};

// The blocks that make a plan together.
struct PlanTeam {
  int block;
  int blocks;
};

// A barrier of the team's blocks; false if it was left because of a failure.
__device__ inline bool SyncTeam(const Peers& peers, PlanTeam team,
                                uint64_t epoch) {
  __syncthreads();
  if (team.blocks == 1) return true;
  __shared__ bool together;
  if (threadIdx.x == 0) {
    together = true;
    BlockBarrier* const barrier = &peers.state->plan_barrier;
    const uint32_t generation = LoadRelaxedGpu(&barrier->generation);
    if (AddAcquireReleaseGpu(&barrier->arrived, 1) ==
        static_cast<uint32_t>(team.blocks) - 1) {
      barrier->arrived = 0;
      StoreReleaseGpu(&barrier->generation, generation + 1);
    } else {
      BoundedWait wait(peers, Operation::kDispatch, peers.rank, epoch,
                       /*patience=*/2);
      while (LoadAcquireGpu(&barrier->generation) == generation) {
        if (wait.Expired()) {
          together = false;
          break;
        }
      }
    }
  }
  __syncthreads();
  return together;
}

// The first tile of block `block` of the team.
__device__ inline int FirstTile(const MoeShape& shape, PlanTeam team,
                                int block) {
  return static_cast<int>(int64_t{shape.tiles} * block / team.blocks);
}

// Exclusive sum of the padded group sizes, by one warp: base[0, L), and the sum
// of all in base[L]. Four experts to a lane, so that few sums follow each
// other.
__device__ inline void PlaceGroups(const MoeShape& shape, PlanTotals totals) {
  constexpr int kPerLane = 4;
  const int lane = threadIdx.x % kLanes;
  uint32_t carried = 0;
  for (int first = 0; first < shape.experts; first += kPerLane * kLanes) {
    uint32_t sizes[kPerLane];
    uint32_t mine = 0;
#pragma unroll
    for (int i = 0; i < kPerLane; ++i) {
      const int expert = first + lane * kPerLane + i;
      const uint32_t size = expert < shape.experts ? totals.total[expert] : 0;
      sizes[i] = shape.alignment == 1 ? size
                                      : (size + shape.alignment - 1) /
                                            shape.alignment * shape.alignment;
      mine += sizes[i];
    }
    uint32_t sum = mine;
    for (int step = 1; step < kLanes; step *= 2) {
      const uint32_t other = __shfl_up_sync(kAllLanes, sum, step);
      if (lane >= step) sum += other;
    }
    uint32_t base = carried + sum - mine;
#pragma unroll
    for (int i = 0; i < kPerLane; ++i) {
      const int expert = first + lane * kPerLane + i;
      if (expert < shape.experts) totals.base[expert] = base;
      base += sizes[i];
    }
    carried += __shfl_sync(kAllLanes, sum, kLanes - 1);
  }
  if (lane == 0) totals.base[shape.experts] = carried;
}

// Running sums of the block's own tiles, and their total, for all blocks.
__device__ inline void SumOwnTiles(const MoeShape& shape, PlanTeam team,
                                   const PlanTables& tables,
                                   PlanTotals totals) {
  const int columns = PlanColumns(shape);
  const int begin = FirstTile(shape, team, team.block);
  const int end = FirstTile(shape, team, team.block + 1);
  for (int c = threadIdx.x; c < columns; c += blockDim.x) {
    uint32_t sum = 0;
    for (int tile = begin; tile < end; ++tile) {
      tables.before[tile * columns + c] = sum;
      sum += __popc(tables.bits[tile * columns + c]);
    }
    if (team.blocks == 1) totals.total[c] = sum;
    if (team.blocks > 1) tables.block_sum[team.block * columns + c] = sum;
  }
}

// After the team has synced: totals of all blocks, and what comes before this
// block is added to its tiles. Nothing to do for a team of one.
__device__ inline void SumBlocks(const MoeShape& shape, PlanTeam team,
                                 const PlanTables& tables, PlanTotals totals) {
  const int columns = PlanColumns(shape);
  for (int c = threadIdx.x; c < columns; c += blockDim.x) {
    totals.total[c] = 0;
    totals.earlier[c] = 0;
  }
  __syncthreads();
  // Several threads to a column, so that their loads overlap.
  const int threads_per_column = max(1, static_cast<int>(blockDim.x) / columns);
  const int share = threadIdx.x / columns;
  if (share < threads_per_column || columns > static_cast<int>(blockDim.x)) {
    for (int c = threadIdx.x % columns; c < columns; c += blockDim.x) {
      uint32_t sum = 0, earlier = 0;
#pragma unroll 8
      for (int b = share; b < team.blocks; b += threads_per_column) {
        const uint32_t value = tables.block_sum[b * columns + c];
        sum += value;
        if (b < team.block) earlier += value;
      }
      if (sum != 0) atomicAdd(&totals.total[c], sum);
      if (earlier != 0) atomicAdd(&totals.earlier[c], earlier);
      if (columns <= static_cast<int>(blockDim.x)) break;
    }
  }
  __syncthreads();
  if (threadIdx.x < kLanes) PlaceGroups(shape, totals);
  const int begin = FirstTile(shape, team, team.block);
  const int end = FirstTile(shape, team, team.block + 1);
  if (team.block > 0) {
    for (int i = begin * columns + threadIdx.x; i < end * columns;
         i += blockDim.x) {
      tables.before[i] += totals.earlier[i % columns];
    }
  }
  __syncthreads();
}

// A plan's number: calls over other axes have epochs of their own.
__device__ inline uint64_t PlanNumber(const Peers& peers, uint64_t epoch) {
  const auto set = peers.sequence - peers.state->sequences;
  return epoch * kAxisSetsMax + static_cast<uint64_t>(set);
}

// By one block of the team, with all its threads, after the last SyncTeam.
__device__ inline void AnnouncePlan(const Peers& peers, uint64_t epoch) {
  if (threadIdx.x != 0) return;
  StoreReleaseGpu(&peers.state->planned, PlanNumber(peers, epoch));
}

// By a warp of a block outside of the team; false if in vain.
__device__ inline bool AwaitPlan(const Peers& peers, uint64_t epoch) {
  BoundedWait wait(peers, Operation::kDispatch, peers.rank, epoch,
                   /*patience=*/2);
  const uint64_t number = PlanNumber(peers, epoch);
  for (;;) {
    const bool made = LoadAcquireGpu(&peers.state->planned) == number;
    if (__all_sync(kAllLanes, made)) return true;
    if (__any_sync(kAllLanes, wait.Expired())) return false;
  }
}

// Where one token's assignments go; lane k has the k-th, if rows are repeated.
struct TokenRows {
  uint32_t unique;  // row among the unique rows, where the token is here
  bool here;
  int32_t row;    // expert row, -1 if not on this rank or dropped
  bool local;     // on this rank, dropped or not
  uint32_t kept;  // lanes with a row
};

__device__ inline TokenRows FindRows(const MoeShape& shape, int rank,
                                     const PlanTables& tables,
                                     const PlanTotals& totals, int source,
                                     int token) {
  const int lane = threadIdx.x % kLanes;
  const int columns = PlanColumns(shape);
  const int tile = source * shape.tiles_per_source + token / kTileTokens;
  const uint32_t bit = 1u << (token % kTileTokens);
  const uint32_t* const bits = tables.bits + tile * columns;
  const uint32_t* const before = tables.before + tile * columns;
  TokenRows rows = {0, false, -1, false, 0};
  const uint32_t here = bits[shape.experts];
  // Nothing is asked of them yet: whoever called may go on meanwhile.
  rows.here = (here & bit) != 0;
  rows.unique = before[shape.experts] + __popc(here & (bit - 1));
  if (!shape.expand || !rows.here) return rows;
  if (lane < shape.k) {
    const int id =
        tables.ids[(int64_t{source} * shape.tokens + token) * shape.k + lane];
    const int expert = LocalExpert(shape, rank, id);
    rows.local = expert >= 0;
    if (rows.local && (bits[expert] & bit) != 0) {
      rows.row = static_cast<int32_t>(totals.base[expert] + before[expert] +
                                      __popc(bits[expert] & (bit - 1)));
    }
  }
  rows.kept = __ballot_sync(kAllLanes, rows.row >= 0);
  return rows;
}

}  // namespace jaxfabric::cuda

#endif  // JAXFABRIC_CUDA_DISPATCH_PLAN_CUH_
