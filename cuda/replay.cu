// Replay: the rows of another x along a known plan, to the places that dispatch
// gave them. The way of combine's rows, backwards: they are numbered by their
// order for each rank, the sender makes the numbers from its ids, the receiver
// from the plan. Every place without a row is zero.

#include <cstdint>

#include "bounded_wait.cuh"
#include "known_plan.cuh"
#include "ll128.cuh"
#include "moe_kernels.h"
#include "moe_shape.h"
#include "row_segments.cuh"
#include "send_index.cuh"

namespace jaxfabric::cuda {

namespace {

constexpr int kThreads = 512;
constexpr int kWarps = kThreads / kLanes;
constexpr int kPackets = 5;
using Row = Segment<kPackets>;

struct Work {
  const Peers& peers;
  const MoeShape& shape;
  const ReplayBuffers& io;
  const uint32_t* source_begin;  // [N + 1], unique rows by source
  SendIndex index;
  uint64_t flag;  // of packets
  int lane;
  LanePart part;
};

template <bool kVector>
__device__ void Send(const Work& w, WarpShare share) {
  const MoeShape& shape = w.shape;
  const int segments = SegmentsOf<kPackets>(shape);
  const int64_t items = int64_t{shape.tokens} * segments;
  for (int64_t i = share.index; i < items; i += share.count) {
    const int token = static_cast<int>(i / segments);
    const int s = static_cast<int>(i - int64_t{token} * segments);
    Row words;
    LoadSegment<kVector>(shape, w.io.x + token * shape.row_bytes, s, w.part,
                         words);
    for (int rank = 0; rank < shape.ranks; ++rank) {
      uint32_t number;
      if (rank == w.peers.rank ||
          !GoesTo(shape, w.index, rank, token, &number)) {
        continue;
      }
      char* const wire = Mailbox(w.peers, rank, w.peers.rank, w.flag) +
                         number * WireRowBytes(shape);
      SendSegment(shape, wire, s, w.lane, w.part, words, w.flag);
    }
  }
}

// One segment of a unique row, to every place that the plan has for it.
template <bool kVector>
__device__ void Place(const Work& w, uint32_t unique, int s, const Row& words) {
  const MoeShape& shape = w.shape;
  if (!shape.expand) {
    StoreSegment<kVector>(shape, w.io.rows + unique * shape.row_bytes, s,
                          w.part, words);
    return;
  }
  int32_t row = -1;
  if (w.lane < shape.slots) {
    row = SlotRow(w.peers, shape, w.io.slot_row, Operation::kReplay, w.flag,
                  unique, w.lane);
  }
  for (uint32_t left = __ballot_sync(kAllLanes, row >= 0); left != 0;
       left &= left - 1) {
    const int64_t to = __shfl_sync(kAllLanes, row, __ffs(left) - 1);
    StoreSegment<kVector>(shape, w.io.rows + to * shape.row_bytes, s, w.part,
                          words);
  }
}

template <bool kVector>
__device__ void PlaceOwn(const Work& w, WarpShare share) {
  const MoeShape& shape = w.shape;
  const int segments = SegmentsOf<kPackets>(shape);
  const int64_t items = int64_t{shape.tokens} * segments;
  for (int64_t i = share.index; i < items; i += share.count) {
    const int token = static_cast<int>(i / segments);
    const int s = static_cast<int>(i - int64_t{token} * segments);
    uint32_t number;
    if (!GoesTo(shape, w.index, w.peers.rank, token, &number)) continue;
    Row words;
    LoadSegment<kVector>(shape, w.io.x + token * shape.row_bytes, s, w.part,
                         words);
    Place<kVector>(w, w.source_begin[w.peers.rank] + number, s, words);
  }
}

template <bool kVector>
__device__ void PlaceOthers(const Work& w, WarpShare share) {
  const MoeShape& shape = w.shape;
  const int segments = SegmentsOf<kPackets>(shape);
  const uint32_t own_begin = w.source_begin[w.peers.rank];
  const uint32_t own = w.source_begin[w.peers.rank + 1] - own_begin;
  const int64_t items = int64_t{w.source_begin[shape.ranks] - own} * segments;
  for (int64_t i = share.index; i < items; i += share.count) {
    auto unique = static_cast<uint32_t>(i / segments);
    const int s = static_cast<int>(i % segments);
    if (unique >= own_begin) unique += own;
    int source = 0;
    while (unique >= w.source_begin[source + 1]) ++source;
    const char* const wire =
        Mailbox(w.peers, w.peers.rank, source, w.flag) +
        (unique - w.source_begin[source]) * WireRowBytes(shape);
    BoundedWait wait(w.peers, Operation::kReplay, source, w.flag);
    Row words;
    if (!ReceiveSegment(shape, wire, s, w.lane, w.part, w.flag, wait, words)) {
      return;
    }
    Place<kVector>(w, unique, s, words);
  }
}

// Tokens of this rank that stay here, by one thread.
__device__ uint32_t OwnRows(const Work& w) {
  const int last = (w.peers.rank + 1) * w.shape.tiles_per_source - 1;
  return w.index.before[last] + __popc(w.index.bits[last]);
}

template <bool kVector>
__global__ void __launch_bounds__(kThreads, 1)
    ReplayKernel(const __grid_constant__ Peers peers,
                 const __grid_constant__ MoeShape shape,
                 const __grid_constant__ ReplayBuffers io) {
  extern __shared__ uint32_t index_memory[];
  __shared__ uint32_t source_begin[kRanksMax + 1];
  const uint64_t epoch = ReadEpoch(peers, Operation::kReplay);
  if (epoch == 0) return;
  const int warp = threadIdx.x / kLanes, lane = threadIdx.x % kLanes;
  if (blockIdx.x == 0) SayHello(peers, epoch);
  if (blockIdx.x == gridDim.x - 1 && threadIdx.x == 0) {
    EnterProgramCall(peers, Operation::kReplay, epoch);
  }
  bool good = true;
  if (warp == kWarps - 1) {
    good = BeginOfSources(peers, shape, io.recv_count, Operation::kReplay,
                          epoch, source_begin);
  }
  const SendIndex index = LaySendIndex(shape, index_memory);
  MakeSendIndex(shape, io.ids, index);
  const Work w = {peers,        shape,       io,
                  source_begin, index,       PacketFlag(peers, epoch),
                  lane,         MyPart(lane)};
  if (threadIdx.x == 0 && good) {
    // Else the own rows would be given places that are others'.
    const uint32_t planned =
        source_begin[peers.rank + 1] - source_begin[peers.rank];
    good = OwnRows(w) == planned;
    if (!good) {
      Fail(peers, ErrorCode::kBadPlan, Operation::kReplay, peers.rank,
           static_cast<int>(planned), epoch, 0);
    }
  }
  if (__syncthreads_or(!good)) return;
  if (threadIdx.x == 0) AdvanceEpoch(peers, epoch);
  const int blocks = gridDim.x;
  const WarpShare share = {warp * blocks + static_cast<int>(blockIdx.x),
                           blocks * kWarps};
  Send<kVector>(w, share);
  PlaceOwn<kVector>(w, share);
  PlaceOthers<kVector>(w, share);
  if (blockIdx.x == 0) AwaitHellos(peers, Operation::kReplay, epoch);
}

__global__ void __launch_bounds__(kThreads)
    ZeroKernel(char* data, int64_t bytes) {
  const int64_t thread = int64_t{blockIdx.x} * blockDim.x + threadIdx.x;
  const int64_t threads = int64_t{gridDim.x} * blockDim.x;
  const int64_t vectors = bytes / 16;
  for (int64_t i = thread; i < vectors; i += threads) {
    StoreStreaming(data + i * 16, make_uint4(0, 0, 0, 0));
  }
  for (int64_t b = vectors * 16 + thread; b < bytes; b += threads) data[b] = 0;
}

using Kernel = void (*)(Peers, MoeShape, ReplayBuffers);

Kernel KernelFor(bool vector) {
  return vector ? ReplayKernel<true> : ReplayKernel<false>;
}

}  // namespace

cudaError_t LaunchReplay(const Peers& peers, const MoeShape& shape, int blocks,
                         const ReplayBuffers& buffers, cudaStream_t stream) {
  const int64_t rows =
      shape.expand ? shape.rows : int64_t{shape.ranks} * shape.tokens;
  // A kernel of its own: which places get a row is not known before all rows
  // are placed. The program's results are aligned to more than 16 bytes.
  ZeroKernel<<<blocks, kThreads, 0, stream>>>(buffers.rows,
                                              rows * shape.row_bytes);
  cudaLaunchConfig_t config = {};
  config.gridDim = dim3(blocks);
  config.blockDim = dim3(kThreads);
  config.dynamicSmemBytes = SendIndexBytes(shape);
  config.stream = stream;
  const bool vector = IsVector(buffers.x, shape.row_bytes) &&
                      IsVector(buffers.rows, shape.row_bytes);
  return cudaLaunchKernelEx(&config, KernelFor(vector), peers, shape, buffers);
}

cudaError_t PreloadReplayKernels() {
  constexpr int kShared = 160 << 10;
  for (const bool vector : {false, true}) {
    const cudaError_t error = cudaFuncSetAttribute(
        KernelFor(vector), cudaFuncAttributeMaxDynamicSharedMemorySize,
        kShared);
    if (error != cudaSuccess) return error;
  }
  cudaFuncAttributes unused;
  return cudaFuncGetAttributes(&unused,
                               reinterpret_cast<const void*>(ZeroKernel));
}

}  // namespace jaxfabric::cuda
