// KnownPlan: what combine and replay share. Both follow the plan of an earlier
// dispatch, whose integers come from the program and are checked before use.

#ifndef JAXFABRIC_CUDA_KNOWN_PLAN_CUH_
#define JAXFABRIC_CUDA_KNOWN_PLAN_CUH_

#include <cstdint>

#include "bounded_wait.cuh"
#include "moe_shape.h"

namespace jaxfabric::cuda {

// Of one unique row in a mailbox, with its scalars.
__device__ inline int64_t WireRowBytes(const MoeShape& shape) {
  constexpr int64_t kWire = 512;
  return (shape.row_packets + shape.scalar_packets) * kWire;
}

// A slot's row, or -1; a plan that points elsewhere is an error, not a fault.
__device__ inline int32_t SlotRow(const Peers& peers, const MoeShape& shape,
                                  const int32_t* slot_row, Operation operation,
                                  uint64_t epoch, uint32_t unique, int slot) {
  const int32_t row = slot_row[int64_t{unique} * shape.slots + slot];
  if (row >= -1 && row < shape.rows) return row;
  Fail(peers, ErrorCode::kBadPlan, operation, peers.rank, row, epoch, 0);
  return -1;
}

// Prefix of recv_count, by one warp; false and an error if it cannot be one.
__device__ inline bool BeginOfSources(const Peers& peers, const MoeShape& shape,
                                      const int32_t* recv_count,
                                      Operation operation, uint64_t epoch,
                                      uint32_t* begin) {
  const int lane = threadIdx.x % kLanes;
  const int count = lane < shape.ranks ? recv_count[lane] : 0;
  const bool bad = count < 0 || count > shape.tokens;
  uint32_t sum = bad ? 0 : count;
  for (int step = 1; step < kLanes; step *= 2) {
    const uint32_t other = __shfl_up_sync(kAllLanes, sum, step);
    if (lane >= step) sum += other;
  }
  if (lane < shape.ranks) begin[lane + 1] = sum;
  if (lane == 0) begin[0] = 0;
  if (bad) {
    Fail(peers, ErrorCode::kBadPlan, operation, peers.rank, count, epoch, 0);
  }
  return __any_sync(kAllLanes, bad) == 0;
}

// Every rank hears of every other in each epoch, also where no rows travel: see
// group_state.h. Halves do without.
__device__ inline void SayHello(const Peers& peers, uint64_t epoch) {
  const int peer = threadIdx.x;
  if (peers.phase == Phase::kWhole && peer < peers.ranks &&
      peer != peers.rank) {
    StoreRelaxedSystem(FlagLine(peers, kHelloFlags, peer, peers.rank), epoch);
  }
}

__device__ inline void AwaitHellos(const Peers& peers, Operation operation,
                                   uint64_t epoch) {
  const int peer = threadIdx.x;
  if (peers.phase == Phase::kWhole && peer < peers.ranks &&
      peer != peers.rank) {
    WaitForFlag(peers, operation, peer,
                FlagLine(peers, kHelloFlags, peers.rank, peer), epoch,
                /*acquire=*/false);
  }
}

}  // namespace jaxfabric::cuda

#endif  // JAXFABRIC_CUDA_KNOWN_PLAN_CUH_
