// Segments: the unit of work of a warp, a few packets of one row, so that few
// rows keep many warps busy and each has several loads in flight.

#ifndef JAXFABRIC_CUDA_ROW_SEGMENTS_CUH_
#define JAXFABRIC_CUDA_ROW_SEGMENTS_CUH_

#include <cstdint>

#include "ll128.cuh"
#include "moe_shape.h"

namespace jaxfabric::cuda {

// A share of something: this warp is number `index` of `count`.
struct WarpShare {
  int index;
  int count;
};

// Packets of a row that one warp has in its registers.
template <int kPackets>
struct Segment {
  LaneWords words[kPackets];
};

template <int kPackets>
__host__ __device__ int SegmentsOf(const MoeShape& shape) {
  return (shape.row_packets + kPackets - 1) / kPackets;
}

// kVector: whether the rows are IsVector. Known when compiled, so that nothing
// stands between the loads of one segment and those of the next.
template <bool kVector, int kPackets>
__device__ void LoadSegment(const MoeShape& shape, const char* row, int segment,
                            LanePart part, Segment<kPackets>& out) {
#pragma unroll
  for (int i = 0; i < kPackets; ++i) {
    const int64_t at = (int64_t{segment} * kPackets + i) * kPacketData;
    if constexpr (kVector) {
      out.words[i] = LoadVectorPart(row, shape.row_bytes, at, part);
    } else {
      out.words[i] = LoadPart(row + at, shape.row_bytes - at, part);
    }
  }
}

template <bool kVector, int kPackets>
__device__ void StoreSegment(const MoeShape& shape, char* row, int segment,
                             LanePart part, const Segment<kPackets>& in) {
  const int64_t at = int64_t{segment} * kPackets * kPacketData;
  const int64_t left = shape.row_bytes - at;
#pragma unroll
  for (int i = 0; i < kPackets; ++i) {
    const int skipped = i * kPacketData;
    char* const data = row + at + skipped;
    if constexpr (kVector) {
      StoreVectorPart(data, left - skipped, part, in.words[i]);
    } else {
      StorePart(data, left - skipped, part, in.words[i]);
    }
  }
}

// `wire` is where the row's packets begin in a peer's heap.
template <int kPackets>
__device__ void SendSegment(const MoeShape& shape, char* wire, int segment,
                            int lane, LanePart part,
                            const Segment<kPackets>& in, uint64_t flag) {
  const int packets = min(kPackets, shape.row_packets - segment * kPackets);
  char* const at = wire + segment * kPackets * kPacketWire;
#pragma unroll
  for (int i = 0; i < kPackets; ++i) {
    if (i < packets) {
      SendPart(at + i * kPacketWire, lane, part, in.words[i], flag);
    }
  }
}

template <int kPackets>
__device__ bool ReceiveSegment(const MoeShape& shape, const char* wire,
                               int segment, int lane, LanePart part,
                               uint64_t flag, BoundedWait& wait,
                               Segment<kPackets>& out) {
  // Of many rows a warp has many packets.
  constexpr Waiting kWaiting =
      kPackets >= 5 ? Waiting::kPatient : Waiting::kEager;
  const int packets = min(kPackets, shape.row_packets - segment * kPackets);
  return ReceiveParts(wire + segment * kPackets * kPacketWire, packets, lane,
                      part, flag, wait, kWaiting, out.words);
}

// The work on rows, in items of one or more segments of a row.
struct RowItems {
  int segments;  // of a row
  int per_item;
  int items;  // of a row

  __device__ RowItems(int segments_of_row, int segments_per_item)
      : segments(segments_of_row),
        per_item(segments_per_item),
        items((segments_of_row + segments_per_item - 1) / segments_per_item) {}
};

// Ranks that own an expert of a token, as bits; each lane has one of its ids,
// or -1.
__device__ inline uint32_t DestinationsOf(const MoeShape& shape, int id) {
  const bool valid = id >= 0 && id < shape.experts * shape.ranks;
  return __reduce_or_sync(kAllLanes, valid ? 1u << (id / shape.experts) : 0u);
}

__device__ inline uint32_t Destinations(const MoeShape& shape,
                                        const int32_t* ids) {
  const int lane = threadIdx.x % kLanes;
  return DestinationsOf(shape, lane < shape.k ? ids[lane] : -1);
}

}  // namespace jaxfabric::cuda

#endif  // JAXFABRIC_CUDA_ROW_SEGMENTS_CUH_
