// MoeShape: the static shape of a dispatch or combine, equal on all ranks, and
// where its parts lie in a mailbox. Letters as in jaxfabric.moe: T tokens of a
// rank, K experts of a token, N ranks, L experts of a rank, S = min(K, L).

#ifndef JAXFABRIC_CUDA_MOE_SHAPE_H_
#define JAXFABRIC_CUDA_MOE_SHAPE_H_

#include <cstdint>

namespace jaxfabric::cuda {

enum class RowType : int32_t { kF32 = 0, kBf16 = 1, kF16 = 2 };

constexpr int ElementBytes(RowType type) {
  return type == RowType::kF32 ? 4 : 2;
}

// Rows that travel as e4m3 (the contract: jaxfabric/moe/_plan.py) are cut into
// segments of so many blocks. On the wire a segment is the payloads of its
// blocks, 128 bytes each, and then their scales: it can be read by itself.
inline constexpr int kScaleBlock = 128;
inline constexpr int kSegmentBlocks = 8;
inline constexpr int kSegmentPayload = kSegmentBlocks * kScaleBlock;
inline constexpr int kSegmentBytes = kSegmentPayload + kSegmentBlocks * 4;

// Routes are planned by the ballots of a warp: 32 tokens at a time.
inline constexpr int kTileTokens = 32;
inline constexpr int kExpertsPerTokenMax = 32;
inline constexpr int kExpertsPerRankMax = 1024;

struct MoeShape {
  int32_t ranks;
  int32_t tokens;
  int32_t k;
  int32_t experts;  // of this rank, L
  int32_t slots;
  int32_t alignment;
  int64_t row_bytes;  // as dispatch returns and combine takes them
  int64_t kept_max;
  int64_t rows;  // R
  bool expand;
  bool zero_tail;
  RowType type;  // of what is summed, or scaled
  bool scaled;   // rows travel as e4m3: dispatch only
  bool keep;     // and are returned so, with their scales
  int32_t hidden;

  // Derived by Complete, so that host and device read the same numbers.
  int32_t tiles_per_source;
  int32_t tiles;          // of all sources
  int32_t route_packets;  // of the ids of a tile; as many for its weights
  int32_t row_packets;
  int64_t x_row_bytes;
  int32_t scale_blocks;  // of a row
  int32_t scaled_segments;
  int32_t scalar_packets;  // of the S scalars beside a row; 0 without
  int64_t rows_at;         // where rows begin in a route message
};

// Fills in what follows from the sizes above.
inline void Complete(MoeShape& shape, bool with_scalars) {
  constexpr int64_t kData = 480, kWire = 512;  // of a packet, as in ll128.cuh
  const auto packets = [](int64_t bytes) {
    return static_cast<int32_t>((bytes + kData - 1) / kData);
  };
  shape.tiles_per_source = (shape.tokens + kTileTokens - 1) / kTileTokens;
  shape.tiles = shape.tiles_per_source * shape.ranks;
  shape.route_packets = packets(int64_t{kTileTokens} * shape.k * 4);
  shape.scale_blocks = (shape.hidden + kScaleBlock - 1) / kScaleBlock;
  shape.scaled_segments =
      (shape.scale_blocks + kSegmentBlocks - 1) / kSegmentBlocks;
  shape.x_row_bytes = shape.scaled
                          ? int64_t{shape.hidden} * ElementBytes(shape.type)
                          : shape.row_bytes;
  shape.row_packets = shape.scaled
                          ? shape.scaled_segments * packets(kSegmentBytes)
                          : packets(shape.row_bytes);
  shape.scalar_packets = with_scalars ? packets(int64_t{shape.slots} * 4) : 0;
  shape.rows_at = shape.tiles_per_source * 2 * shape.route_packets * kWire;
}

// The largest of the messages of this shape.
inline int64_t MessageBytes(const MoeShape& shape) {
  constexpr int64_t kWire = 512;
  return shape.rows_at + int64_t{shape.tokens} *
                             (shape.row_packets + shape.scalar_packets) * kWire;
}

}  // namespace jaxfabric::cuda

#endif  // JAXFABRIC_CUDA_MOE_SHAPE_H_
