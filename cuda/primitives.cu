// Barrier, put, put_pages and wait over NVLink.
//
// A message has one release at system scope, by its last thread to finish; the
// reader spins on an acquire and needs no fence after it.

#include <algorithm>
#include <cstdint>

#include "bounded_wait.cuh"
#include "device_memory.cuh"
#include "primitive_kernels.h"

namespace jaxfabric::cuda {

namespace {

constexpr int kThreads = 512;
// One block moves this much before a second is worth its part of the notice.
constexpr int64_t kBytesPerBlock = int64_t{32} << 10;

// The first warp has the flags. What is done for the program besides is the
// second's, so that no flag waits for it.
constexpr int kBarrierThreads = 2 * kLanes;
static_assert(kRanksMax <= kLanes);

__global__ void __launch_bounds__(kBarrierThreads)
    BarrierKernel(const __grid_constant__ Peers peers) {
  const int peer = threadIdx.x;
  const bool failed = HasFailed(peers);
  const uint64_t epoch = peers.sequence->barrier_epoch + 1;
  if (__syncthreads_or(failed)) return;  // all have read both
  const bool is_peer = peer < peers.ranks && peer != peers.rank;
  if (is_peer) {
    StoreReleaseSystem(FlagLine(peers, kBarrierFlags, peer, peers.rank), epoch);
  }
  if (peer == kLanes) {
    peers.sequence->barrier_epoch = epoch;
    EnterProgramCall(peers, Operation::kBarrier, epoch);
  }
  if (!is_peer) return;
  WaitForFlag(peers, Operation::kBarrier, peer,
              FlagLine(peers, kBarrierFlags, peers.rank, peer), epoch,
              /*acquire=*/true);
}

__device__ uint64_t* Counter(char* heap, int counter) {
  return reinterpret_cast<uint64_t*>(heap + kArrivals) + counter;
}

// Not the read-only path: a peer may have written it while this kernel ran.
__device__ uint4 Load(const char* at) {
  return __ldcg(reinterpret_cast<const uint4*>(at));
}

// Threads that copy together: this one is number `index` of `count`.
struct ThreadShare {
  int64_t index;
  int64_t count;
};

__device__ ThreadShare ShareOfGrid() {
  return {int64_t{blockIdx.x} * blockDim.x + threadIdx.x,
          int64_t{gridDim.x} * blockDim.x};
}

// Four vectors a turn, so that their loads overlap.
__device__ void CopyBytes(char* to, const char* from, int64_t bytes,
                          ThreadShare share) {
  const int64_t thread = share.index;
  const int64_t threads = share.count;
  const auto misaligned =
      (reinterpret_cast<uintptr_t>(to) | reinterpret_cast<uintptr_t>(from)) &
      15;
  const int64_t vectors = misaligned ? 0 : bytes / 16;
  constexpr int kBatch = 4;
  int64_t i = thread;
  for (; i + (kBatch - 1) * threads < vectors; i += kBatch * threads) {
    uint4 batch[kBatch];
#pragma unroll
    for (int b = 0; b < kBatch; ++b) {
      batch[b] = Load(from + (i + b * threads) * 16);
    }
#pragma unroll
    for (int b = 0; b < kBatch; ++b) {
      StoreStreaming(to + (i + b * threads) * 16, batch[b]);
    }
  }
  uint4 rest[kBatch - 1];
#pragma unroll
  for (int b = 0; b < kBatch - 1; ++b) {
    if (i + b * threads < vectors)
      rest[b] = Load(from + (i + b * threads) * 16);
  }
#pragma unroll
  for (int b = 0; b < kBatch - 1; ++b) {
    if (i + b * threads < vectors) {
      StoreStreaming(to + (i + b * threads) * 16, rest[b]);
    }
  }
  for (int64_t b = vectors * 16 + thread; b < bytes; b += threads) {
    to[b] = from[b];
  }
}

// True for one thread of the grid: after all threads' accesses. With slices, of
// the blocks of one slice.
__device__ bool LastOfGrid(uint32_t* blocks_done) {
  __syncthreads();
  if (threadIdx.x != 0) return false;
  if (gridDim.x == 1) return true;
  if (AddAcquireReleaseGpu(blocks_done, 1) != gridDim.x - 1) return false;
  *blocks_done = 0;
  return true;
}

// One row of blocks for each slice.
__global__ void __launch_bounds__(kThreads)
    PutKernel(const __grid_constant__ Peers peers,
              const __grid_constant__ PutArguments put) {
  const bool failed = HasFailed(peers);
  const int slice = blockIdx.y;
  const auto operation =
      put.target == nullptr ? Operation::kScatter : Operation::kPut;
  // Not by the first warp, which has the notice to send, and last.
  const auto enter = [&] {
    if (slice == 0 && blockIdx.x == 0 && threadIdx.x == kLanes) {
      EnterProgramCall(peers, operation, 0);
    }
  };
  const int target = put.target == nullptr ? slice : *put.target;
  const int64_t offset = put.offset[slice] * put.element_bytes;
  if (failed) return;
  if (target < 0 || offset < 0) return enter();
  if (target >= peers.ranks ||
      offset + put.bytes > static_cast<int64_t>(put.window.bytes)) {
    Fail(peers, ErrorCode::kBadTarget, operation, target, put.offset[slice], 0,
         0);
    return;
  }
  CopyBytes(peers.heap[target] + put.window.begin + offset,
            put.source + slice * put.bytes, put.bytes, ShareOfGrid());
  if (LastOfGrid(&peers.state->put_blocks[slice])) {
    AddReleaseSystem(Counter(peers.heap[target], put.window.counter), 1);
  }
  enter();
}

// What a warp copies of a page at a time.
constexpr int64_t kPagePiece = 4 << 10;

// Whether an entry is good; an error if not. A page that was stamped by this
// call already is in the list twice.
__device__ bool CheckEntry(const Peers& peers, const PutPagesArguments& put,
                           int entry, uint32_t stamp) {
  const int from = put.source_index[entry], to = put.target_index[entry];
  ErrorCode code = ErrorCode::kNone;
  if (from >= put.source_pages || to >= put.window_pages) {
    code = ErrorCode::kBadPage;
  } else if (atomicExch(&put.stamps[to], stamp) == stamp) {
    code = ErrorCode::kPageTwice;
  }
  if (code == ErrorCode::kNone) return true;
  Fail(peers, code, Operation::kPutPages, *put.target, entry, 0, 0);
  return false;
}

__global__ void __launch_bounds__(kThreads)
    PutPagesKernel(const __grid_constant__ Peers peers,
                   const __grid_constant__ PutPagesArguments put) {
  if (HasFailed(peers)) return;
  const uint32_t stamp = peers.state->pages_stamp + 1;
  if (blockIdx.x == 0 && threadIdx.x == 0) {
    EnterProgramCall(peers, Operation::kPutPages, 0);
  }
  const int target = *put.target;
  if (target < 0) return;
  if (target >= peers.ranks) {
    Fail(peers, ErrorCode::kBadTarget, Operation::kPutPages, target, 0, 0, 0);
    return;
  }
  char* const window = peers.heap[target] + put.window.begin;
  const int lane = threadIdx.x % kLanes;
  const ThreadShare grid = ShareOfGrid();
  const int64_t pieces =
      max(int64_t{1}, (put.page_bytes + kPagePiece - 1) / kPagePiece);
  for (int64_t i = grid.index / kLanes; i < put.entries * pieces;
       i += grid.count / kLanes) {
    const int entry = static_cast<int>(i / pieces);
    const int64_t at = (i - entry * pieces) * kPagePiece;
    const int64_t from = put.source_index[entry], to = put.target_index[entry];
    if (from < 0 || to < 0) continue;
    bool good = from < put.source_pages && to < put.window_pages;
    if (at == 0 && lane == 0) good = CheckEntry(peers, put, entry, stamp);
    if (!__shfl_sync(kAllLanes, good, 0)) continue;
    CopyBytes(window + to * put.page_bytes + at,
              put.pages + from * put.page_bytes + at,
              min(kPagePiece, put.page_bytes - at), {lane, kLanes});
  }
  if (LastOfGrid(&peers.state->pages_blocks)) {
    peers.state->pages_stamp = stamp;
    if (HasFailed(peers)) return;
    AddReleaseSystem(Counter(peers.heap[target], put.window.counter), 1);
  }
}

// Puts are counted, not named: nobody knows which of the ranks is late, but how
// many came.
__device__ bool WaitForPuts(const Peers& peers, const uint64_t* counter,
                            uint64_t consumed, uint64_t count) {
  BoundedWait wait(peers, Operation::kWait, peers.rank, count);
  for (;;) {
    const uint64_t come = LoadAcquireSystem(counter) - consumed;
    if (come >= count) return true;
    wait.SetDetail(static_cast<int>(come));
    if (wait.Expired()) return false;
  }
}

__global__ void __launch_bounds__(kThreads)
    WaitKernel(const __grid_constant__ Peers peers,
               const __grid_constant__ WaitArguments wait) {
  __shared__ bool arrived;
  if (HasFailed(peers)) return;
  RankState* const state = peers.state;
  char* const heap = peers.heap[peers.rank];
  const uint64_t consumed = state->consumed[wait.window.counter];
  if (blockIdx.x == 0 && threadIdx.x == 0) {
    EnterProgramCall(peers, Operation::kWait, 0);
  }
  if (threadIdx.x == 0) {
    arrived = WaitForPuts(peers, Counter(heap, wait.window.counter), consumed,
                          wait.count);
  }
  __syncthreads();
  if (arrived) {
    CopyBytes(wait.out, heap + wait.window.begin,
              static_cast<int64_t>(wait.window.bytes), ShareOfGrid());
  }
  if (LastOfGrid(&state->wait_blocks)) {
    state->consumed[wait.window.counter] = consumed + wait.count;
  }
}

int BlocksFor(int64_t bytes, int blocks_max) {
  const int64_t blocks = (bytes + kBytesPerBlock - 1) / kBytesPerBlock;
  return static_cast<int>(std::clamp<int64_t>(blocks, 1, blocks_max));
}

}  // namespace

cudaError_t LaunchBarrier(const Peers& peers, cudaStream_t stream) {
  BarrierKernel<<<1, kBarrierThreads, 0, stream>>>(peers);
  return cudaGetLastError();
}

cudaError_t LaunchPut(const Peers& peers, const PutArguments& put,
                      int blocks_max, cudaStream_t stream) {
  const dim3 grid(BlocksFor(put.bytes, std::max(1, blocks_max / put.slices)),
                  put.slices);
  PutKernel<<<grid, kThreads, 0, stream>>>(peers, put);
  return cudaGetLastError();
}

cudaError_t LaunchPutPages(const Peers& peers, const PutPagesArguments& put,
                           int blocks_max, cudaStream_t stream) {
  const int blocks = BlocksFor(put.entries * put.page_bytes, blocks_max);
  PutPagesKernel<<<blocks, kThreads, 0, stream>>>(peers, put);
  return cudaGetLastError();
}

cudaError_t LaunchWait(const Peers& peers, const WaitArguments& wait,
                       int blocks_max, cudaStream_t stream) {
  const auto bytes = static_cast<int64_t>(wait.window.bytes);
  WaitKernel<<<BlocksFor(bytes, blocks_max), kThreads, 0, stream>>>(peers,
                                                                    wait);
  return cudaGetLastError();
}

cudaError_t PreloadPrimitiveKernels() {
  cudaFuncAttributes unused;
  for (const void* kernel : {reinterpret_cast<const void*>(BarrierKernel),
                             reinterpret_cast<const void*>(PutKernel),
                             reinterpret_cast<const void*>(PutPagesKernel),
                             reinterpret_cast<const void*>(WaitKernel)}) {
    const cudaError_t error = cudaFuncGetAttributes(&unused, kernel);
    if (error != cudaSuccess) return error;
  }
  return cudaSuccess;
}

}  // namespace jaxfabric::cuda
