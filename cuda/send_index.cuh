// SendIndex: which of this rank's tokens go where, and as the how-manieth. Made
// from the ids by each block for itself, in its shared memory.

#ifndef JAXFABRIC_CUDA_SEND_INDEX_CUH_
#define JAXFABRIC_CUDA_SEND_INDEX_CUH_

#include <cstddef>
#include <cstdint>

#include "device_memory.cuh"
#include "moe_shape.h"

namespace jaxfabric::cuda {

// Of tile i and rank d: the tile's tokens that go to d, and how many of the
// tiles before do, at [d * tiles_per_source + i].
struct SendIndex {
  uint32_t* bits;
  uint32_t* before;
};

inline size_t SendIndexBytes(const MoeShape& shape) {
  return size_t{2} * shape.ranks * shape.tiles_per_source * sizeof(uint32_t);
}

__device__ inline SendIndex LaySendIndex(const MoeShape& shape,
                                         uint32_t* memory) {
  return {memory, memory + shape.ranks * shape.tiles_per_source};
}

// By all threads of a block.
__device__ inline void MakeSendIndex(const MoeShape& shape, const int32_t* ids,
                                     SendIndex index) {
  const int lane = threadIdx.x % kLanes, warp = threadIdx.x / kLanes;
  const int warps = blockDim.x / kLanes, tiles = shape.tiles_per_source;
  for (int tile = warp; tile < tiles; tile += warps) {
    const int token = tile * kTileTokens + lane;
    uint32_t to = 0;
    for (int k = 0; k < shape.k && token < shape.tokens; ++k) {
      const int id = ids[int64_t{token} * shape.k + k];
      if (id >= 0 && id < shape.experts * shape.ranks) {
        to |= 1u << (id / shape.experts);
      }
    }
    for (int rank = 0; rank < shape.ranks; ++rank) {
      const uint32_t going = __ballot_sync(kAllLanes, (to >> rank & 1u) != 0);
      if (lane == 0) index.bits[rank * tiles + tile] = going;
    }
  }
  __syncthreads();
  for (int rank = warp; rank < shape.ranks; rank += warps) {
    uint32_t carried = 0;
    for (int first = 0; first < tiles; first += kLanes) {
      const int tile = first + lane;
      const uint32_t count =
          tile < tiles ? __popc(index.bits[rank * tiles + tile]) : 0;
      uint32_t sum = count;
      for (int step = 1; step < kLanes; step *= 2) {
        const uint32_t other = __shfl_up_sync(kAllLanes, sum, step);
        if (lane >= step) sum += other;
      }
      if (tile < tiles) {
        index.before[rank * tiles + tile] = carried + sum - count;
      }
      carried += __shfl_sync(kAllLanes, sum, kLanes - 1);
    }
  }
  __syncthreads();
}

// Whether a token goes to `rank`, and its number among those that do.
__device__ inline bool GoesTo(const MoeShape& shape, SendIndex index, int rank,
                              int token, uint32_t* number) {
  const int at = rank * shape.tiles_per_source + token / kTileTokens;
  const uint32_t bit = 1u << (token % kTileTokens);
  *number = index.before[at] + __popc(index.bits[at] & (bit - 1));
  return (index.bits[at] & bit) != 0;
}

}  // namespace jaxfabric::cuda

#endif  // JAXFABRIC_CUDA_SEND_INDEX_CUH_
