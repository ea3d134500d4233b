// Rows that travel as they are, in a warp's registers.

#ifndef JAXFABRIC_CUDA_PLAIN_ROWS_CUH_
#define JAXFABRIC_CUDA_PLAIN_ROWS_CUH_

#include <cstdint>

#include "dispatch_work.cuh"
#include "row_segments.cuh"

namespace jaxfabric::cuda {

// kPackets: loads that a warp has in flight. kVector: see LoadSegment.
template <bool kVector, int kPackets>
class PlainRows {
 public:
  __device__ static int Segments(const MoeShape& shape) {
    return SegmentsOf<kPackets>(shape);
  }

  // All rows of this rank, to the ranks that want them.
  __device__ static void Send(const DispatchWork& w, WarpShare share) {
    const RowItems work(Segments(w.shape), w.per_item);
    const int64_t items = int64_t{w.shape.tokens} * work.items;
    for (int64_t i = share.index; i < items; i += share.count) {
      const int token = static_cast<int>(i / work.items);
      const int first =
          static_cast<int>(i - int64_t{token} * work.items) * work.per_item;
      SendRow(w, token, first, min(first + work.per_item, work.segments));
    }
  }

  // All rows that come here, to their places.
  __device__ static void Place(const DispatchWork& w, WarpShare share) {
    const MoeShape& shape = w.shape;
    const RowItems work(Segments(shape), w.per_item);
    const int64_t items = int64_t{shape.ranks} * shape.tokens * work.items;
    // From the last warp on: the first ones were busy with the routes. This
    // rank's own rows come first, because nobody has to wait for them.
    for (int64_t i = share.count - 1 - share.index; i < items;
         i += share.count) {
      const auto row = static_cast<int>(i / work.items);
      const int first =
          static_cast<int>(i - int64_t{row} * work.items) * work.per_item;
      const int turn = row / shape.tokens;
      const int source = (w.peers.rank + turn) % shape.ranks;
      PlaceRow(w, source, row - turn * shape.tokens, first,
               min(first + work.per_item, work.segments));
    }
  }

  __device__ static void Zero(const DispatchWork& w, int64_t row, int s) {
    const Segment<kPackets> zeros = {};
    StoreSegment<kVector>(w.shape, w.io.tokens + row * w.shape.row_bytes, s,
                          w.part, zeros);
  }

 private:
  // Segments [first, end) of a token.
  __device__ static void SendRow(const DispatchWork& w, int token, int first,
                                 int end) {
    const MoeShape& shape = w.shape;
    const char* const row = w.io.x + token * shape.row_bytes;
    Segment<kPackets> words;
    // On its way before it is known where to.
    LoadSegment<kVector>(shape, row, first, w.part, words);
    const uint32_t others =
        Destinations(shape, w.io.ids + int64_t{token} * shape.k) &
        ~(1u << w.peers.rank);
    if (others == 0) return;
    const int64_t at =
        shape.rows_at + int64_t{token} * shape.row_packets * kPacketWire;
    for (int s = first; s < end; ++s) {
      if (s != first) LoadSegment<kVector>(shape, row, s, w.part, words);
      for (uint32_t left = others; left != 0; left &= left - 1) {
        char* const wire =
            Mailbox(w.peers, __ffs(left) - 1, w.peers.rank, w.flag) + at;
        SendSegment(shape, wire, s, w.lane, w.part, words, w.flag);
      }
    }
  }

  // Segments [first, end) of one received row, to its places.
  __device__ static void PlaceRow(const DispatchWork& w, int source, int token,
                                  int first, int end) {
    const MoeShape& shape = w.shape;
    const bool own = source == w.peers.rank;
    const char* const row = w.io.x + token * shape.row_bytes;
    const char* const wire =
        own ? nullptr
            : Mailbox(w.peers, w.peers.rank, source, w.flag) + shape.rows_at +
                  int64_t{token} * shape.row_packets * kPacketWire;
    Segment<kPackets> words;
    if (own) LoadSegment<kVector>(shape, row, first, w.part, words);
    const TokenRows rows =
        FindRows(shape, w.peers.rank, w.tables, w.totals, source, token);
    if (!rows.here) return;
    BoundedWait wait(w.peers, Operation::kDispatch, source, w.flag);
    for (int s = first; s < end; ++s) {
      if (own) {
        if (s != first) LoadSegment<kVector>(shape, row, s, w.part, words);
      } else if (!ReceiveSegment(shape, wire, s, w.lane, w.part, w.flag, wait,
                                 words)) {
        return;
      }
      if (!shape.expand) {
        StoreSegment<kVector>(shape,
                              w.io.tokens + rows.unique * shape.row_bytes, s,
                              w.part, words);
        continue;
      }
      for (uint32_t left = rows.kept; left != 0; left &= left - 1) {
        const int64_t to = __shfl_sync(kAllLanes, rows.row, __ffs(left) - 1);
        StoreSegment<kVector>(shape, w.io.tokens + to * shape.row_bytes, s,
                              w.part, words);
      }
    }
  }
};

}  // namespace jaxfabric::cuda

#endif  // JAXFABRIC_CUDA_PLAIN_ROWS_CUH_
