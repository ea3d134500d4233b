// A segment of a row that travels as e4m3: from x into a warp's part of shared
// memory, where packets are cut from, and from packets into it.

#ifndef JAXFABRIC_CUDA_SCALED_SEGMENT_CUH_
#define JAXFABRIC_CUDA_SCALED_SEGMENT_CUH_

#include <cstdint>

#include "dispatch_work.cuh"
#include "e4m3.cuh"
#include "ll128.cuh"

namespace jaxfabric::cuda {

template <RowType kType>
struct ScaledSegment {
  // Two blocks at a time: 8 elements of each lane.
  static constexpr int kChunkElements = 2 * kScaleBlock;
  static constexpr int kChunks = kSegmentPayload / kChunkElements;
  static constexpr int kSegmentPackets =
      (kSegmentBytes + kPacketData - 1) / kPacketData;
  static constexpr int kVectors = LaneRow<kType>::kVectors;

  // A segment as it was loaded.
  struct Loaded {
    LaneRow<kType> chunks[kChunks];
  };

  // Walks through the segments of the items that a warp has of some rows. Items
  // are as long as each other, and so go on in the next row: else some warps
  // had all the short ones. Segments are counted in 32 bits: each is a KiB.
  struct Cursor {
    int item, items;
    int count, per_item, segments, all;
    int row = -1, segment = 0, left = 0;

    __device__ Cursor(const MoeShape& shape, int per_item_of, int rows,
                      int first, int count_of)
        : item(first),
          count(count_of),
          per_item(per_item_of),
          segments(shape.scaled_segments),
          all(rows * segments) {
      items = (all + per_item - 1) / per_item;
      Enter();
    }
    __device__ bool Inside() const { return item < items; }
    __device__ void Enter() {
      const int at = item * per_item;
      row = at / segments;
      segment = at - row * segments;
      left = min(per_item, all - at);
    }
    __device__ void Advance() {
      if (--left <= 0) {
        item += count;
        Enter();
      } else if (++segment == segments) {
        segment = 0;
        ++row;
      }
    }
  };

  __device__ static const char* XRow(const DispatchWork& w, int token) {
    return w.io.x + token * w.shape.x_row_bytes;
  }

  __device__ static int64_t WireOffset(const MoeShape& shape, int token,
                                       int s) {
    return shape.rows_at +
           (int64_t{token} * shape.row_packets + s * kSegmentPackets) *
               kPacketWire;
  }

  // Blocks of a segment, which the last one may have fewer of.
  __device__ static int BlocksOf(const MoeShape& shape, int s) {
    return min(kSegmentBlocks, shape.scale_blocks - s * kSegmentBlocks);
  }

  __device__ static int SegmentBytes(const MoeShape& shape, int s) {
    return BlocksOf(shape, s) * (kScaleBlock + 4);
  }

  __device__ static char* Buffer(const DispatchWork& w) {
    return reinterpret_cast<char*>(w.warp_buffer);
  }

  __device__ static float* BufferScales(const DispatchWork& w, int s) {
    return reinterpret_cast<float*>(Buffer(w) +
                                    BlocksOf(w.shape, s) * kScaleBlock);
  }

  // The first of this lane's elements in a chunk of a segment.
  __device__ static int ElementAt(const DispatchWork& w, int s, int chunk) {
    return s * kSegmentPayload + chunk * kChunkElements +
           w.lane * kLaneElements;
  }

  // Whether all of a segment is there, as of nearly all: then nothing need be
  // asked of its parts.
  __device__ static bool IsFull(const MoeShape& shape, int s) {
    return (s + 1) * kSegmentPayload <= shape.hidden;
  }

  __device__ static Loaded Load(const DispatchWork& w, const Cursor& at) {
    constexpr int kSize = kElementBytes<kType>;
    const int hidden = w.shape.hidden;
    const int first = ElementAt(w, at.segment, 0);
    const char* const from = XRow(w, at.row) + int64_t{first} * kSize;
    Loaded out;
    if (w.aligned && IsFull(w.shape, at.segment)) {
#pragma unroll
      for (int c = 0; c < kChunks; ++c) {
#pragma unroll
        for (int v = 0; v < kVectors; ++v) {
          out.chunks[c].vectors[v] =
              LoadStreamingNow(from + c * kChunkElements * kSize + v * 16);
        }
      }
      return out;
    }
#pragma unroll
    for (int c = 0; c < kChunks; ++c) {
      const char* const at_chunk = from + c * kChunkElements * kSize;
      const int left = hidden - first - c * kChunkElements;
      if (!w.aligned) {
        out.chunks[c] = LoadBytes(at_chunk, left);
        continue;
      }
#pragma unroll
      for (int v = 0; v < kVectors; ++v) {
        out.chunks[c].vectors[v] =
            left > 0 ? LoadRow(at_chunk + v * 16) : make_uint4(0, 0, 0, 0);
      }
    }
    return out;
  }

  // Quantises a segment into the warp's buffer.
  template <bool kFull>
  __device__ static void Pack(const DispatchWork& w, int s,
                              const Loaded& loaded) {
    static_assert(kChunks == 4);
    const int blocks = kFull ? kSegmentBlocks : BlocksOf(w.shape, s);
    const int in_block = w.lane % kBlockLanes;
    uint32_t most[kChunks];
    LargestOfBlocks(loaded.chunks, most);
    // A lane makes the factors of one chunk, which it may not have itself.
    const uint32_t low = (w.lane & 1) != 0 ? most[1] : most[0];
    const uint32_t high = (w.lane & 1) != 0 ? most[3] : most[2];
    const BlockFactors mine = FactorsOf<kType>((w.lane & 2) != 0 ? high : low);
    char* const out = Buffer(w) + w.lane * kLaneElements;
#pragma unroll
    for (int c = 0; c < kChunks; ++c) {
      const int from = w.lane - in_block + c;
      const uint2 bytes = Quantize(
          loaded.chunks[c], __shfl_sync(kAllLanes, mine.reciprocal, from));
      const int block = 2 * c + w.lane / kBlockLanes;
      if (kFull || block < blocks) {
        *reinterpret_cast<uint2*>(out + c * kChunkElements) = bytes;
      }
    }
    const int block = 2 * in_block + w.lane / kBlockLanes;
    if (in_block < kChunks && block < blocks) {
      reinterpret_cast<float*>(Buffer(w) + blocks * kScaleBlock)[block] =
          mine.scale;
    }
    __syncwarp();
  }

  // This lane's part of a packet that is cut from the buffer; anything beyond
  // the segment's end.
  __device__ static LaneWords PacketWords(const DispatchWork& w, int packet) {
    const char* const at = Buffer(w) + packet * kPacketData;
    const auto v = *reinterpret_cast<const ulonglong2*>(at + w.part.vector);
    return {w.part.upper ? v.y : v.x, v.y};
  }

  // Fills the buffer with a segment that a peer sent.
  __device__ static void Unpack(const DispatchWork& w, int bytes,
                                const LaneWords (&words)[kSegmentPackets]) {
#pragma unroll
    for (int i = 0; i < kSegmentPackets; ++i) {
      const int offset = i * kPacketData + w.part.offset;
      char* const at = Buffer(w) + offset;
      if (offset >= bytes) continue;
      if (w.part.bytes == 8) {
        *reinterpret_cast<uint64_t*>(at) = words[i].low;
      } else {
        *reinterpret_cast<ulonglong2*>(at) =
            make_ulonglong2(words[i].low, words[i].high);
      }
    }
    __syncwarp();
  }

 private:
  // A lane's elements of a row of any alignment and length, of which `left` are
  // inside.
  __device__ __noinline__ static LaneRow<kType> LoadBytes(const char* at,
                                                          int left) {
    LaneRow<kType> out;
    auto* const bytes = reinterpret_cast<char*>(&out);
    for (int b = 0; b < kVectors * 16; ++b) {
      bytes[b] = b < left * kElementBytes<kType> ? at[b] : 0;
    }
    return out;
  }
};

}  // namespace jaxfabric::cuda

#endif  // JAXFABRIC_CUDA_SCALED_SEGMENT_CUH_
