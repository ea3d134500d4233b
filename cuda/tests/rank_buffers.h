// RankBuffers: what dispatch takes and gives on one rank of a random world.

#ifndef JAXFABRIC_CUDA_TESTS_RANK_BUFFERS_H_
#define JAXFABRIC_CUDA_TESTS_RANK_BUFFERS_H_

#include <cstdint>

#include "moe/layout.h"
#include "moe_kernels.h"
#include "tests/cluster.h"
#include "tests/cpp/moe_oracle.h"

namespace jaxfabric::cuda {

// All buffers of one rank.
struct RankBuffers {
  DeviceBuffer x, ids, weights;
  DeviceBuffer tokens, scales, group_sizes, row_weights, row_index, recv_count,
      slot_row, sent, dropped;

  RankBuffers(int device, const moe::World& world, int rank)
      : x(Upload(device, world.x[rank])),
        ids(Upload(device, world.ids[rank])),
        weights(Upload(device, world.weights[rank])),
        tokens(device, world.layout.output_rows() * world.layout.row_bytes),
        scales(device, world.layout.output_rows() * world.layout.row_bytes * 4),
        group_sizes(device, world.layout.experts_local() * 4),
        row_weights(device, world.layout.rows() * 4),
        row_index(device, world.layout.rows() * 4),
        recv_count(device, world.layout.num_ranks * 4),
        slot_row(device,
                 world.layout.unique_rows_max() * world.layout.slots() * 4),
        sent(device, world.layout.num_ranks * 4),
        dropped(device, 4) {}

  DispatchBuffers Dispatch(const moe::Layout& layout) const {
    return {x.as<char>(),
            ids.as<int32_t>(),
            weights.as<float>(),
            tokens.as<char>(),
            scales.as<float>(),
            group_sizes.as<int32_t>(),
            row_weights.as<float>(),
            layout.expand ? nullptr : row_index.as<int32_t>(),
            recv_count.as<int32_t>(),
            slot_row.as<int32_t>(),
            sent.as<int32_t>(),
            dropped.as<int32_t>()};
  }
};

}  // namespace jaxfabric::cuda

#endif  // JAXFABRIC_CUDA_TESTS_RANK_BUFFERS_H_
