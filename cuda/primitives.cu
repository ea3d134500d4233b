// Barrier, put and wait over NVLink.
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

__global__ void __launch_bounds__(kRanksMax)
    BarrierKernel(const __grid_constant__ Peers peers) {
  const int peer = threadIdx.x;
  if (HasFailed(peers)) return;
  const uint64_t epoch = peers.state->barrier_epoch + 1;
  __syncthreads();  // all have read it
  if (peer == 0) {
    peers.state->barrier_epoch = epoch;
    EnterProgramCall(peers, Operation::kBarrier, epoch);
  }
  if (peer >= peers.ranks || peer == peers.rank) return;
  StoreReleaseSystem(FlagLine(peers.heap[peer], kBarrierFlags, peers.rank),
                     epoch);
  WaitForFlag(peers, Operation::kBarrier, peer,
              FlagLine(peers.heap[peers.rank], kBarrierFlags, peer), epoch,
              /*acquire=*/true);
}

__device__ uint64_t* Counter(char* heap, int counter) {
  return reinterpret_cast<uint64_t*>(heap + kArrivals) + counter;
}

// Not the read-only path: a peer may have written it while this kernel ran.
__device__ uint4 Load(const char* at) {
  return __ldcg(reinterpret_cast<const uint4*>(at));
}

// Copies by all threads of the grid. Four vectors a turn, so that their loads
// overlap.
__device__ void CopyBytes(char* to, const char* from, int64_t bytes) {
  const int64_t thread = int64_t{blockIdx.x} * blockDim.x + threadIdx.x;
  const int64_t threads = int64_t{gridDim.x} * blockDim.x;
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
  for (; i < vectors; i += threads) {
    StoreStreaming(to + i * 16, Load(from + i * 16));
  }
  for (int64_t b = vectors * 16 + thread; b < bytes; b += threads) {
    to[b] = from[b];
  }
}

// True for one thread of the grid: after all threads' accesses.
__device__ bool LastOfGrid(uint32_t* blocks_done) {
  __syncthreads();
  if (threadIdx.x != 0) return false;
  if (gridDim.x == 1) return true;
  if (AddAcquireReleaseGpu(blocks_done, 1) != gridDim.x - 1) return false;
  *blocks_done = 0;
  return true;
}

__global__ void __launch_bounds__(kThreads)
    PutKernel(const __grid_constant__ Peers peers,
              const __grid_constant__ PutArguments put) {
  if (HasFailed(peers)) return;
  if (blockIdx.x == 0 && threadIdx.x == 0) {
    EnterProgramCall(peers, Operation::kPut, 0);
  }
  const int target = *put.target;
  const int64_t offset = *put.offset * put.element_bytes;
  if (target < 0 || offset < 0) return;
  if (target >= peers.ranks ||
      offset + put.bytes > static_cast<int64_t>(put.window_bytes)) {
    Fail(peers, ErrorCode::kBadTarget, Operation::kPut, target, *put.offset, 0,
         0);
    return;
  }
  CopyBytes(peers.heap[target] + put.window_begin + offset, put.source,
            put.bytes);
  if (LastOfGrid(&peers.state->put_blocks)) {
    AddReleaseSystem(Counter(peers.heap[target], put.counter), 1);
  }
}

__global__ void __launch_bounds__(kThreads)
    WaitKernel(const __grid_constant__ Peers peers,
               const __grid_constant__ WaitArguments wait) {
  __shared__ bool arrived;
  if (HasFailed(peers)) return;
  RankState* const state = peers.state;
  char* const heap = peers.heap[peers.rank];
  const uint64_t wanted = state->consumed[wait.counter] + wait.count;
  if (blockIdx.x == 0 && threadIdx.x == 0) {
    EnterProgramCall(peers, Operation::kWait, 0);
  }
  if (threadIdx.x == 0) {
    // Puts are counted, not named: nobody knows which of the ranks is late.
    arrived = WaitForFlag(peers, Operation::kWait, peers.rank,
                          Counter(heap, wait.counter), wanted,
                          /*acquire=*/true);
  }
  __syncthreads();
  if (arrived) {
    CopyBytes(wait.out, heap + wait.window_begin,
              static_cast<int64_t>(wait.window_bytes));
  }
  if (LastOfGrid(&state->wait_blocks)) state->consumed[wait.counter] = wanted;
}

int BlocksFor(int64_t bytes, int blocks_max) {
  const int64_t blocks = (bytes + kBytesPerBlock - 1) / kBytesPerBlock;
  return static_cast<int>(std::clamp<int64_t>(blocks, 1, blocks_max));
}

}  // namespace

cudaError_t LaunchBarrier(const Peers& peers, cudaStream_t stream) {
  BarrierKernel<<<1, kRanksMax, 0, stream>>>(peers);
  return cudaGetLastError();
}

cudaError_t LaunchPut(const Peers& peers, const PutArguments& put,
                      int blocks_max, cudaStream_t stream) {
  PutKernel<<<BlocksFor(put.bytes, blocks_max), kThreads, 0, stream>>>(peers,
                                                                       put);
  return cudaGetLastError();
}

cudaError_t LaunchWait(const Peers& peers, const WaitArguments& wait,
                       int blocks_max, cudaStream_t stream) {
  const auto bytes = static_cast<int64_t>(wait.window_bytes);
  WaitKernel<<<BlocksFor(bytes, blocks_max), kThreads, 0, stream>>>(peers,
                                                                    wait);
  return cudaGetLastError();
}

cudaError_t PreloadPrimitiveKernels() {
  cudaFuncAttributes unused;
  for (const void* kernel : {reinterpret_cast<const void*>(BarrierKernel),
                             reinterpret_cast<const void*>(PutKernel),
                             reinterpret_cast<const void*>(WaitKernel)}) {
    const cudaError_t error = cudaFuncGetAttributes(&unused, kernel);
    if (error != cudaSuccess) return error;
  }
  return cudaSuccess;
}

}  // namespace jaxfabric::cuda
