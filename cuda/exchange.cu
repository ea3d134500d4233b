// Exchange: each rank's array to the rank that a permutation names, as packets.
//
// Every rank says hello to every other, as in combine: most pairs of ranks
// send each other nothing.

#include <algorithm>
#include <cstdint>

#include "bounded_wait.cuh"
#include "device_memory.cuh"
#include "known_plan.cuh"
#include "ll128.cuh"
#include "primitive_kernels.h"
#include "row_segments.cuh"

namespace jaxfabric::cuda {

namespace {

constexpr int kThreads = 512;
constexpr int kWarps = kThreads / kLanes;
constexpr int kPackets = 5;
constexpr int64_t kPieceBytes = int64_t{kPackets} * kPacketData;

struct Work {
  const Peers& peers;
  const ExchangeArguments& io;
  MoeShape array;  // the whole of it is one row
  uint64_t flag;   // of packets
  int lane;
  LanePart part;
  bool aligned;
};

// Whether a segment may be read and written in 16 bytes: the last one may end
// anywhere.
__device__ bool IsWhole(const Work& w, int segment) {
  return w.aligned && (segment + 1) * kPieceBytes <= w.io.bytes;
}

__device__ void Load(const Work& w, int segment, Segment<kPackets>& words) {
  if (IsWhole(w, segment)) {
    LoadSegment<true>(w.array, w.io.x, segment, w.part, words);
  } else {
    LoadSegment<false>(w.array, w.io.x, segment, w.part, words);
  }
}

__device__ void Store(const Work& w, int segment,
                      const Segment<kPackets>& words) {
  if (IsWhole(w, segment)) {
    StoreSegment<true>(w.array, w.io.y, segment, w.part, words);
  } else {
    StoreSegment<false>(w.array, w.io.y, segment, w.part, words);
  }
}

__device__ void Send(const Work& w, WarpShare share) {
  const int segments = SegmentsOf<kPackets>(w.array);
  char* const wire = Mailbox(w.peers, w.io.to, w.peers.rank, w.flag);
  for (int i = share.index; i < segments; i += share.count) {
    Segment<kPackets> words;
    Load(w, i, words);
    SendSegment(w.array, wire, i, w.lane, w.part, words, w.flag);
  }
}

// What comes from the source, which may be this rank or none.
__device__ void Receive(const Work& w, WarpShare share) {
  const int segments = SegmentsOf<kPackets>(w.array);
  const bool remote = w.io.from >= 0 && w.io.from != w.peers.rank;
  const char* const wire =
      remote ? Mailbox(w.peers, w.peers.rank, w.io.from, w.flag) : nullptr;
  for (int i = share.index; i < segments; i += share.count) {
    Segment<kPackets> words = {};
    if (remote) {
      BoundedWait wait(w.peers, Operation::kExchange, w.io.from, w.flag);
      if (!ReceiveSegment(w.array, wire, i, w.lane, w.part, w.flag, wait,
                          words)) {
        return;
      }
    } else if (w.io.from >= 0) {
      Load(w, i, words);
    }
    Store(w, i, words);
  }
}

// The first `send_blocks` blocks send while the others receive; all do both if
// it is 0.
__global__ void __launch_bounds__(kThreads, 1)
    ExchangeKernel(const __grid_constant__ Peers peers,
                   const __grid_constant__ ExchangeArguments io,
                   int send_blocks) {
  const uint64_t epoch = ReadEpoch(peers, Operation::kExchange);
  if (epoch == 0) return;
  const int block = blockIdx.x;
  if (block == 0) SayHello(peers, epoch);
  if (blockIdx.x == gridDim.x - 1 && threadIdx.x == 0) {
    EnterProgramCall(peers, Operation::kExchange, epoch);
  }
  __syncthreads();  // all warps have read the epoch
  if (threadIdx.x == 0) AdvanceEpoch(peers, epoch);
  const int warp = threadIdx.x / kLanes, lane = threadIdx.x % kLanes;
  MoeShape array = {};
  array.row_bytes = io.bytes;
  array.row_packets = static_cast<int32_t>(PacketsFor(io.bytes));
  const Work w = {peers,
                  io,
                  array,
                  PacketFlag(peers, epoch),
                  lane,
                  MyPart(lane),
                  IsVector(io.x, 0) && IsVector(io.y, 0)};
  const bool roles = send_blocks > 0;
  if ((!roles || block < send_blocks) && io.to >= 0 && io.to != peers.rank) {
    const int senders = roles ? send_blocks : gridDim.x;
    Send(w, {warp * senders + block, senders * kWarps});
  }
  if (!roles || block >= send_blocks) {
    const int receivers = gridDim.x - send_blocks;
    Receive(w, {warp * receivers + block - send_blocks, receivers * kWarps});
  }
  if (block == 0) AwaitHellos(peers, Operation::kExchange, epoch);
}

}  // namespace

int64_t ExchangeMessageBytes(int64_t bytes) {
  return PacketsFor(bytes) * kPacketWire;
}

cudaError_t LaunchExchange(const Peers& peers,
                           const ExchangeArguments& exchange, int blocks_max,
                           cudaStream_t stream) {
  // Two segments for each warp before another pair of blocks has work.
  constexpr int64_t kBytesPerPair = 2 * kWarps * kPieceBytes;
  const int64_t pairs = (exchange.bytes + kBytesPerPair - 1) / kBytesPerPair;
  const auto blocks = static_cast<int>(
      std::clamp<int64_t>(2 * pairs, 1, std::max(1, blocks_max)));
  ExchangeKernel<<<blocks, kThreads, 0, stream>>>(peers, exchange, blocks / 2);
  return cudaGetLastError();
}

cudaError_t PreloadExchangeKernel() {
  cudaFuncAttributes unused;
  return cudaFuncGetAttributes(&unused, ExchangeKernel);
}

}  // namespace jaxfabric::cuda
