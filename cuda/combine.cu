// Combine: one kernel that sums rows at the experts' rank, sends one row per
// token and rank, and sums again at the token's rank.
//
// Every rank says hello to every other, because it may have nothing to send:
// who has seen all hellos of an epoch knows that the epoch before is over.

#include <algorithm>
#include <cstdint>

#include "bounded_wait.cuh"
#include "known_plan.cuh"
#include "ll128.cuh"
#include "moe_kernels.h"
#include "moe_shape.h"
#include "row_segments.cuh"
#include "row_sums.cuh"
#include "send_index.cuh"

namespace jaxfabric::cuda {

namespace {

constexpr int kThreads = 512;
constexpr int kWarps = kThreads / kLanes;
// A warp has kPackets packets of the rows of some slots in flight: for few
// tokens little of several rows, so that more warps have work; for many tokens
// more of one row.
constexpr int kPacketsOfFew = 2, kPacketsOfMany = 5;
constexpr int kManyTokens = 1024;

__host__ __device__ constexpr int SlotsInFlight(int packets) {
  return packets == kPacketsOfFew ? 4 : 1;
}
// More slots than a packet of scalars holds are refused.
constexpr int kScalarsMax = kPacketData / static_cast<int>(sizeof(float));

struct Work {
  const Peers& peers;
  const MoeShape& shape;
  const CombineBuffers& io;
  const uint32_t* source_begin;  // [N + 1], unique rows by source
  SendIndex index;
  float* warp_scalars;  // kScalarsMax of this warp
  uint64_t flag;        // of packets
  int lane;
  LanePart part;
  int per_item;
};

// The rows that a unique row's slots name, each with its factor: lane q has the
// q-th slot's.
struct SlotRows {
  int32_t row;
  float factor;
  uint32_t kept;  // lanes with a row
};

__device__ SlotRows FindSlots(const Work& w, uint32_t unique) {
  SlotRows slots = {-1, 0.0f, 0};
  if (!w.shape.expand) return slots;
  if (w.lane < w.shape.slots)
    slots.row = SlotRow(w.peers, w.shape, w.io.slot_row, Operation::kCombine,
                        w.flag, unique, w.lane);
  if (w.io.row_weights != nullptr && slots.row >= 0) {
    slots.factor = w.io.row_weights[slots.row];
  }
  slots.kept = __ballot_sync(kAllLanes, slots.row >= 0);
  return slots;
}

// One segment of what this rank returns for a unique row.
template <RowType kType, bool kVector, int kPackets>
__device__ Segment<kPackets> Partial(const Work& w, uint32_t unique,
                                     const SlotRows& slots, int segment) {
  const MoeShape& shape = w.shape;
  if (!shape.expand) {
    Segment<kPackets> words;
    LoadSegment<kVector>(shape, w.io.rows + unique * shape.row_bytes, segment,
                         w.part, words);
    return words;
  }
  const bool weighted = w.io.row_weights != nullptr;
  constexpr int kBatch = SlotsInFlight(kPackets);
  RowSum<kType, kPackets> sum;
  for (uint32_t left = slots.kept; left != 0;) {
    Segment<kPackets> words[kBatch];
    int froms[kBatch];
    int taken = 0;
#pragma unroll
    for (int i = 0; i < kBatch; ++i) {
      const int from = left == 0 ? 0 : __ffs(left) - 1;
      const int64_t row = __shfl_sync(kAllLanes, slots.row, from);
      froms[i] = from;
      if (left == 0) continue;
      LoadSegment<kVector>(shape, w.io.rows + row * shape.row_bytes, segment,
                           w.part, words[i]);
      left &= left - 1;
      ++taken;
    }
    // Factors come later than rows are asked for: they must not hold these up.
#pragma unroll
    for (int i = 0; i < kBatch; ++i) {
      const float factor = __shfl_sync(kAllLanes, slots.factor, froms[i]);
      if (i < taken) sum.Add(words[i], weighted, factor);
    }
  }
  return sum.Round();
}

// The scalars of a unique row's slots, lane by lane: a packet's words.
__device__ LaneWords ScalarWords(const Work& w, uint32_t unique) {
  const auto at = [&](int slot) -> uint64_t {
    if (slot >= w.shape.slots) return 0;
    const int32_t row = SlotRow(w.peers, w.shape, w.io.slot_row,
                                Operation::kCombine, w.flag, unique, slot);
    return row < 0 ? 0 : __float_as_uint(w.io.scalars[row]);
  };
  const int slot = w.part.offset / 4;
  LaneWords words = {at(slot) | at(slot + 1) << 32, 0};
  if (w.part.bytes == 16) words.high = at(slot + 2) | at(slot + 3) << 32;
  return words;
}

// Row items, and after them one for the scalars.
template <int kPackets>
__device__ RowItems ItemsOf(const Work& w) {
  return RowItems(SegmentsOf<kPackets>(w.shape), w.per_item);
}

template <RowType kType, bool kVector, int kPackets>
__device__ void Send(const Work& w, WarpShare share) {
  const MoeShape& shape = w.shape;
  const RowItems work = ItemsOf<kPackets>(w);
  const int pieces = work.items + (shape.scalar_packets > 0 ? 1 : 0);
  const uint32_t own_begin = w.source_begin[w.peers.rank];
  const uint32_t own = w.source_begin[w.peers.rank + 1] - own_begin;
  const int64_t items = int64_t{w.source_begin[shape.ranks] - own} * pieces;
  for (int64_t i = share.index; i < items; i += share.count) {
    auto unique = static_cast<uint32_t>(i / pieces);
    const int piece = static_cast<int>(i % pieces);
    if (unique >= own_begin) unique += own;  // this rank's rows stay
    int source = 0;
    while (unique >= w.source_begin[source + 1]) ++source;
    char* const wire = Mailbox(w.peers, source, w.peers.rank, w.flag) +
                       (unique - w.source_begin[source]) * WireRowBytes(shape);
    if (piece == work.items) {
      SendPart(wire + shape.row_packets * kPacketWire, w.lane, w.part,
               ScalarWords(w, unique), w.flag);
      continue;
    }
    const SlotRows slots = FindSlots(w, unique);
    const int end = min((piece + 1) * work.per_item, work.segments);
    for (int segment = piece * work.per_item; segment < end; ++segment) {
      const Segment<kPackets> words =
          Partial<kType, kVector, kPackets>(w, unique, slots, segment);
      SendSegment(shape, wire, segment, w.lane, w.part, words, w.flag);
    }
  }
}

template <RowType kType, bool kVector, int kPackets>
__device__ void SumToken(const Work& w, int token, int first, int end) {
  const MoeShape& shape = w.shape;
  uint32_t number;
  SlotRows slots = {-1, 0.0f, 0};
  const bool here = GoesTo(shape, w.index, w.peers.rank, token, &number);
  const uint32_t unique = w.source_begin[w.peers.rank] + number;
  if (here) slots = FindSlots(w, unique);
  for (int s = first; s < end; ++s) {
    // First what waits for nobody, added when its turn comes.
    Segment<kPackets> own = {};
    if (here) own = Partial<kType, kVector, kPackets>(w, unique, slots, s);
    RowSum<kType, kPackets> sum;
    for (int rank = 0; rank < shape.ranks; ++rank) {
      if (rank == w.peers.rank) {
        if (here) sum.Add(own, false, 0.0f);
        continue;
      }
      if (!GoesTo(shape, w.index, rank, token, &number)) continue;
      const char* const wire = Mailbox(w.peers, w.peers.rank, rank, w.flag) +
                               number * WireRowBytes(shape);
      BoundedWait wait(w.peers, Operation::kCombine, rank, w.flag);
      Segment<kPackets> words = {};
      if (!ReceiveSegment(shape, wire, s, w.lane, w.part, w.flag, wait,
                          words)) {
        return;
      }
      sum.Add(words, false, 0.0f);
    }
    StoreSegment<kVector>(shape, w.io.y + token * shape.row_bytes, s, w.part,
                          sum.Round());
  }
}

// The scalars of one token's slots, from where their experts are.
__device__ void PlaceScalars(const Work& w, int token) {
  const MoeShape& shape = w.shape;
  const int id =
      w.lane < shape.k ? w.io.ids[int64_t{token} * shape.k + w.lane] : -1;
  const bool valid = id >= 0 && id < shape.experts * shape.ranks;
  const int owner = valid ? id / shape.experts : -1;
  float mine = 0.0f;
  for (int rank = 0; rank < shape.ranks; ++rank) {
    uint32_t number;
    if (!GoesTo(shape, w.index, rank, token, &number)) continue;
    const uint32_t slots = __ballot_sync(kAllLanes, owner == rank);
    LaneWords words[1];
    if (rank == w.peers.rank) {
      words[0] = ScalarWords(w, w.source_begin[rank] + number);
    } else {
      const char* const wire = Mailbox(w.peers, w.peers.rank, rank, w.flag) +
                               number * WireRowBytes(shape) +
                               shape.row_packets * kPacketWire;
      BoundedWait wait(w.peers, Operation::kCombine, rank, w.flag);
      if (!ReceiveParts(wire, 1, w.lane, w.part, w.flag, wait, Waiting::kEager,
                        words))
        return;
    }
    StoreWordPart(reinterpret_cast<uint32_t*>(w.warp_scalars), kScalarsMax,
                  w.part, words[0]);
    __syncwarp();
    if (owner == rank) {
      mine = w.warp_scalars[__popc(slots & ((1u << w.lane) - 1))];
    }
    __syncwarp();
  }
  if (w.lane < shape.k) {
    w.io.slot_scalars[int64_t{token} * shape.k + w.lane] = mine;
  }
}

template <RowType kType, bool kVector, int kPackets>
__device__ void Receive(const Work& w, WarpShare share) {
  const MoeShape& shape = w.shape;
  const RowItems work = ItemsOf<kPackets>(w);
  const int pieces = work.items + (shape.scalar_packets > 0 ? 1 : 0);
  const int64_t items = int64_t{shape.tokens} * pieces;
  for (int64_t i = share.index; i < items; i += share.count) {
    const int token = static_cast<int>(i / pieces);
    const int piece = static_cast<int>(i - int64_t{token} * pieces);
    if (piece == work.items) {
      PlaceScalars(w, token);
    } else {
      SumToken<kType, kVector, kPackets>(
          w, token, piece * work.per_item,
          min((piece + 1) * work.per_item, work.segments));
    }
  }
}

template <RowType kType, bool kVector, int kPackets>
__global__ void __launch_bounds__(kThreads, 1)
    CombineKernel(const __grid_constant__ Peers peers,
                  const __grid_constant__ MoeShape shape,
                  const __grid_constant__ CombineBuffers io, int send_blocks,
                  int per_item) {
  extern __shared__ uint32_t index_memory[];
  __shared__ uint32_t source_begin[kRanksMax + 1];
  __shared__ float scalars[kWarps][kScalarsMax];
  const uint64_t epoch = ReadEpoch(peers, Operation::kCombine);
  if (epoch == 0) return;
  const int warp = threadIdx.x / kLanes;
  const int block = blockIdx.x;
  if (block == 0) SayHello(peers, epoch);
  bool good = true;
  if (warp == kWarps - 1) {  // the others begin with the index
    good = BeginOfSources(peers, shape, io.recv_count, Operation::kCombine,
                          epoch, source_begin);
  }
  const SendIndex index = LaySendIndex(shape, index_memory);
  const bool roles = send_blocks > 0;
  const bool sends =
      peers.phase != Phase::kDone && (!roles || block < send_blocks);
  const bool receives =
      peers.phase != Phase::kStart && (!roles || block >= send_blocks);
  if (receives) MakeSendIndex(shape, io.ids, index);
  if (__syncthreads_or(!good)) return;
  if (threadIdx.x == 0) AdvanceEpoch(peers, epoch);
  const int lane = threadIdx.x % kLanes;
  const Work w = {peers,
                  shape,
                  io,
                  source_begin,
                  index,
                  scalars[warp],
                  PacketFlag(peers, epoch),
                  lane,
                  MyPart(lane),
                  per_item};
  if (sends) {
    if (peers.phase == Phase::kStart &&
        !AwaitReleases(peers, Operation::kCombine, epoch)) {
      return;
    }
    const int senders = roles ? send_blocks : gridDim.x;
    Send<kType, kVector, kPackets>(w,
                                   {warp * senders + block, senders * kWarps});
  }
  // Late and by a warp in the middle, which nobody waits for: it takes a
  // microsecond.
  if (block == 0 && threadIdx.x == kThreads / 2) {
    EnterProgramCall(peers, Operation::kCombine, epoch);
  }
  if (receives) {
    const int receivers = gridDim.x - send_blocks;
    Receive<kType, kVector, kPackets>(
        w, {warp * receivers + block - send_blocks, receivers * kWarps});
  }
  if (peers.phase == Phase::kDone) Release(peers, epoch);
  if (block == 0) AwaitHellos(peers, Operation::kCombine, epoch);
}

using Kernel = void (*)(Peers, MoeShape, CombineBuffers, int, int);

template <bool kVector, int kPackets>
Kernel KernelOf(RowType type) {
  switch (type) {
    case RowType::kF32:
      return CombineKernel<RowType::kF32, kVector, kPackets>;
    case RowType::kBf16:
      return CombineKernel<RowType::kBf16, kVector, kPackets>;
    case RowType::kF16:
      return CombineKernel<RowType::kF16, kVector, kPackets>;
  }
  return nullptr;
}

Kernel KernelFor(RowType type, bool vector, bool many) {
  if (many) {
    return vector ? KernelOf<true, kPacketsOfMany>(type)
                  : KernelOf<false, kPacketsOfMany>(type);
  }
  return vector ? KernelOf<true, kPacketsOfFew>(type)
                : KernelOf<false, kPacketsOfFew>(type);
}

}  // namespace

// Blocks that send, and blocks that receive. Sums keep the senders busy.
Grid CombineGrid(const MoeShape& shape, int blocks_max) {
  if (blocks_max < 2) return {blocks_max, 0, 1, false, 0};
  if (shape.tokens > kManyTokens) {
    return {blocks_max, std::max(1, blocks_max * 3 / 8), shape.expand ? 1 : 2,
            false, 0};
  }
  if (!shape.expand)
    return {blocks_max, std::max(1, blocks_max / 4), 1, false, 0};
  if (shape.tokens <= 64) return {blocks_max, blocks_max / 2, 1, false, 0};
  if (shape.tokens <= 128)
    return {blocks_max, blocks_max * 7 / 16, 1, false, 0};
  return {blocks_max, blocks_max / 2, 2, false, 0};
}

cudaError_t LaunchCombine(const Peers& peers, const MoeShape& shape, Grid grid,
                          const CombineBuffers& buffers, cudaStream_t stream) {
  cudaLaunchConfig_t config = {};
  config.gridDim = dim3(grid.blocks);
  config.blockDim = dim3(kThreads);
  config.dynamicSmemBytes = SendIndexBytes(shape);
  config.stream = stream;
  const bool vector = IsVector(buffers.rows, shape.row_bytes) &&
                      IsVector(buffers.y, shape.row_bytes);
  const Kernel kernel =
      KernelFor(shape.type, vector, shape.tokens > kManyTokens);
  // All blocks of a half have the same role.
  const int send_blocks = peers.phase == Phase::kWhole ? grid.send_blocks : 0;
  return cudaLaunchKernelEx(&config, kernel, peers, shape, buffers, send_blocks,
                            grid.segments_per_item);
}

cudaError_t PreloadCombineKernels() {
  constexpr int kShared = 160 << 10;
  for (RowType type : {RowType::kF32, RowType::kBf16, RowType::kF16}) {
    for (int form = 0; form < 4; ++form) {
      const cudaError_t error = cudaFuncSetAttribute(
          KernelFor(type, (form & 1) != 0, (form & 2) != 0),
          cudaFuncAttributeMaxDynamicSharedMemorySize, kShared);
      if (error != cudaSuccess) return error;
    }
  }
  return cudaSuccess;
}

}  // namespace jaxfabric::cuda
