// Rows that travel as e4m3. A warp quantises a segment of a row into its part
// of shared memory, where packets are cut from; the receiver's warp fills its
// part from packets, and writes out from there. So a rank's own rows and those
// of others take the same way out.

#ifndef JAXFABRIC_CUDA_SCALED_ROWS_CUH_
#define JAXFABRIC_CUDA_SCALED_ROWS_CUH_

#include <cstdint>

#include "bounded_wait.cuh"
#include "dispatch_work.cuh"
#include "ll128.cuh"
#include "ll128_lines.cuh"
#include "row_segments.cuh"
#include "scaled_output.cuh"
#include "scaled_segment.cuh"

namespace jaxfabric::cuda {

template <RowType kType>
class ScaledRows {
  using S = ScaledSegment<kType>;
  using Cursor = typename S::Cursor;
  using Loaded = typename S::Loaded;
  static constexpr int kSegmentPackets = S::kSegmentPackets;

 public:
  __device__ static int Segments(const MoeShape& shape) {
    return shape.scaled_segments;
  }

  // All rows of this rank, to the ranks that want them, and from w.own_items on
  // to their places here too. While a segment is worked on the next one is
  // loaded, of the next row too.
  __device__ static void Send(const DispatchWork& w, WarpShare share) {
    const MoeShape& shape = w.shape;
    Cursor at(shape, w.per_item, shape.tokens, share.index, share.count);
    if (!at.Inside()) return;
    Loaded loaded = S::Load(w, at);
    uint32_t others = OthersOf(w, IdOf(w, at));
    TokenRows own = {};
    while (at.Inside()) {
      Cursor next = at;
      next.Advance();
      Loaded ahead;
      int id = -1;
      if (next.Inside()) {
        ahead = S::Load(w, next);
        if (next.row != at.row) id = IdOf(w, next);
      }
      if (others != 0 || own.here) {
        if (S::IsFull(w.shape, at.segment)) {
          S::template Pack<true>(w, at.segment, loaded);
          SendPacked(w, at, kSegmentBytes, others);
        } else {
          S::template Pack<false>(w, at.segment, loaded);
          SendPacked(w, at, S::SegmentBytes(w.shape, at.segment), others);
        }
        if (own.here) ScaledOutput<kType>::Write(w, own, at.segment);
      }
      const bool first = at.item < w.own_items;
      if (next.Inside() && next.item >= w.own_items) {
        if (first && !AwaitPlan(w.peers, EpochOf(w.flag))) return;
        if (first || next.row != at.row) {
          own = RowsOf(w, w.peers.rank, next.row);
        }
      }
      if (next.row != at.row) others = OthersOf(w, id);
      at = next;
      loaded = ahead;
    }
  }

  // All rows that come here, to their places. This rank's own come first,
  // because nobody has to wait for them.
  __device__ static void Place(const DispatchWork& w, WarpShare share) {
    // From the last warp on: the first ones were busy with the routes.
    const int first = share.count - 1 - share.index;
    Cursor own(w.shape, w.per_item, w.shape.tokens, first, share.count);
    own.items = min(own.items, w.own_items);
    PlaceOwn(w, own);
    // Who had an item less goes on first.
    const int done = own.items % share.count;
    const int turn = (first + share.count - done) % share.count;
    PlaceOthers(
        w, Cursor(w.shape, w.per_item, (w.shape.ranks - 1) * w.shape.tokens,
                  turn, share.count));
  }

  __device__ static void Zero(const DispatchWork& w, int64_t row, int s) {
    ScaledOutput<kType>::Zero(w, row, s);
  }

 private:
  // This lane's expert of a row.
  __device__ static int IdOf(const DispatchWork& w, const Cursor& at) {
    const MoeShape& shape = w.shape;
    return w.lane < shape.k ? w.io.ids[int64_t{at.row} * shape.k + w.lane] : -1;
  }

  __device__ static uint32_t OthersOf(const DispatchWork& w, int id) {
    return DestinationsOf(w.shape, id) & ~(1u << w.peers.rank);
  }

  __device__ static void SendPacked(const DispatchWork& w, const Cursor& at,
                                    int bytes, uint32_t others) {
    LaneWords words[kSegmentPackets];
#pragma unroll
    for (int i = 0; i < kSegmentPackets; ++i) words[i] = S::PacketWords(w, i);
    for (uint32_t left = others; left != 0; left &= left - 1) {
      char* const wire =
          Mailbox(w.peers, __ffs(left) - 1, w.peers.rank, w.flag) +
          S::WireOffset(w.shape, at.row, at.segment);
      SendLines(wire, bytes, w.lane, w.part, words, w.flag);
    }
    __syncwarp();  // all have read before the next is packed
  }

  __device__ static void PlaceOwn(const DispatchWork& w, Cursor at) {
    if (!at.Inside()) return;
    Loaded loaded = S::Load(w, at);
    TokenRows rows = RowsOf(w, w.peers.rank, at.row);
    while (at.Inside()) {
      Cursor next = at;
      next.Advance();
      Loaded ahead;
      if (next.Inside()) ahead = S::Load(w, next);
      if (rows.here) {
        if (S::IsFull(w.shape, at.segment)) {
          S::template Pack<true>(w, at.segment, loaded);
        } else {
          S::template Pack<false>(w, at.segment, loaded);
        }
        ScaledOutput<kType>::Write(w, rows, at.segment);
      }
      if (next.Inside() && next.row != at.row) {
        rows = RowsOf(w, w.peers.rank, next.row);
      }
      at = next;
      loaded = ahead;
    }
  }

  // Rows of the other ranks, one rank after the other.
  __device__ static void PlaceOthers(const DispatchWork& w, Cursor at) {
    if (!at.Inside()) return;
    const auto source_of = [&](const Cursor& cursor) {
      return (w.peers.rank + 1 + cursor.row / w.shape.tokens) % w.shape.ranks;
    };
    LaneWords words[kSegmentPackets];
    LoadPackets(w, WireOf(w, source_of(at), at), words);
    TokenRows rows = RowsOf(w, source_of(at), at.row % w.shape.tokens);
    while (at.Inside()) {
      Cursor next = at;
      next.Advance();
      LaneWords ahead[kSegmentPackets] = {};
      if (next.Inside())
        LoadPackets(w, WireOf(w, source_of(next), next), ahead);
      if (rows.here) {
        const int source = source_of(at);
        const int bytes = S::SegmentBytes(w.shape, at.segment);
        BoundedWait wait(w.peers, Operation::kDispatch, source, w.flag);
        if (!HaveLines(bytes, w.lane, w.part, w.flag, words) &&
            !ReceiveLines(WireOf(w, source, at), bytes, w.lane, w.part, w.flag,
                          wait, w.many ? Waiting::kPatient : Waiting::kEager,
                          words)) {
          return;
        }
        S::Unpack(w, bytes, words);
        ScaledOutput<kType>::Write(w, rows, at.segment);
      }
      if (next.Inside() && next.row != at.row) {
        rows = RowsOf(w, source_of(next), next.row % w.shape.tokens);
      }
      at = next;
#pragma unroll
      for (int i = 0; i < kSegmentPackets; ++i) words[i] = ahead[i];
    }
  }

  __device__ static TokenRows RowsOf(const DispatchWork& w, int source,
                                     int token) {
    return FindRows(w.shape, w.peers.rank, w.tables, w.totals, source, token);
  }

  __device__ static const char* WireOf(const DispatchWork& w, int source,
                                       const Cursor& at) {
    return Mailbox(w.peers, w.peers.rank, source, w.flag) +
           S::WireOffset(w.shape, at.row % w.shape.tokens, at.segment);
  }

  __device__ static void LoadPackets(const DispatchWork& w, const char* wire,
                                     LaneWords (&words)[kSegmentPackets]) {
#pragma unroll
    for (int i = 0; i < kSegmentPackets; ++i) {
      words[i] = LoadWire(wire + i * kPacketWire, w.lane);
    }
  }
};

}  // namespace jaxfabric::cuda

#endif  // JAXFABRIC_CUDA_SCALED_ROWS_CUH_
