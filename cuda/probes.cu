// Bare kernels: see probe_kernels.h. They check nothing, but every spin ends.

#include <cstdint>

#include "device_memory.cuh"
#include "probe_kernels.h"

namespace jaxfabric::cuda {

namespace {

constexpr int kThreads = 512;

__device__ uint64_t* Line(char* heap, const WindowPlace& window, int line) {
  return reinterpret_cast<uint64_t*>(heap + window.begin + line * kLineBytes);
}

__global__ void EmptyProbe() {}

__global__ void __launch_bounds__(kRanksMax)
    BarrierProbe(const __grid_constant__ Peers peers,
                 const __grid_constant__ WindowPlace window) {
  const int peer = threadIdx.x;
  uint64_t* const last = Line(peers.heap[peers.rank], window, kRanksMax);
  const uint64_t epoch = *last + 1;
  __syncthreads();
  if (peer == peers.rank) *last = epoch;
  if (peer == peers.rank || peer >= peers.ranks) return;
  StoreReleaseSystem(Line(peers.heap[peer], window, peers.rank), epoch);
  const uint64_t* const flag = Line(peers.heap[peers.rank], window, peer);
  const uint64_t began = GlobalNanoseconds();
  while (LoadAcquireSystem(flag) < epoch) {
    if (GlobalNanoseconds() - began > peers.timeout_ns) return;
  }
}

__device__ void Store(const Peers& peers, const ProbeArguments& probe,
                      char* heap) {
  const auto* const from = reinterpret_cast<const uint4*>(probe.source);
  auto* const to =
      reinterpret_cast<uint4*>(heap + probe.window.begin + kProbeData);
  const int64_t threads = int64_t{gridDim.x} * blockDim.x;
  for (int64_t i = int64_t{blockIdx.x} * blockDim.x + threadIdx.x;
       i < probe.bytes / 16; i += threads) {
    to[i] = from[i];
  }
}

__global__ void __launch_bounds__(kThreads)
    PutProbe(const __grid_constant__ Peers peers,
             const __grid_constant__ ProbeArguments probe) {
  char* const heap = peers.heap[(peers.rank + 1) % peers.ranks];
  Store(peers, probe, heap);
  __syncthreads();
  if (threadIdx.x != 0) return;
  AddReleaseSystem(
      reinterpret_cast<uint64_t*>(heap + kArrivals) + probe.window.counter, 1);
}

__global__ void __launch_bounds__(kThreads)
    StoresProbe(const __grid_constant__ Peers peers,
                const __grid_constant__ ProbeArguments probe) {
  Store(peers, probe, peers.heap[(peers.rank + 1) % peers.ranks]);
}

// What a dispatch of rows that all go both to the next rank and to this one
// would have to do at least, if it stored them where they belong: nothing is
// planned, and no routes are sent. Buffers may have moved since the call
// before, so the ranks must hear of each other's first.
__global__ void __launch_bounds__(kThreads, 1)
    PushProbe(const __grid_constant__ Peers peers,
              const __grid_constant__ ProbeArguments probe) {
  constexpr int kReady = 17, kArrived = 18, kCalls = 19, kBlocks = 20;
  char* const own = peers.heap[peers.rank];
  char* const next = peers.heap[(peers.rank + 1) % peers.ranks];
  char* const previous =
      peers.heap[(peers.rank + peers.ranks - 1) % peers.ranks];
  const WindowPlace& window = probe.window;
  const uint64_t call = LoadRelaxedSystem(Line(own, window, kCalls)) + 1;
  const uint64_t began = GlobalNanoseconds();
  const auto await = [&](int line, uint64_t value) {
    while (LoadAcquireSystem(Line(own, window, line)) < value) {
      if (GlobalNanoseconds() - began > peers.timeout_ns) return;
    }
  };
  if (threadIdx.x == 0) {
    if (blockIdx.x == 0) {
      StoreReleaseSystem(Line(previous, window, kReady), call);
    }
    await(kReady, call);
  }
  __syncthreads();
  const auto* const from = reinterpret_cast<const uint4*>(probe.source);
  auto* const there =
      reinterpret_cast<uint4*>(next + window.begin + kProbeData);
  auto* const here =
      reinterpret_cast<uint4*>(own + window.begin + kProbeData + probe.bytes);
  const int64_t threads = int64_t{gridDim.x} * blockDim.x;
#pragma unroll 4
  for (int64_t i = int64_t{blockIdx.x} * blockDim.x + threadIdx.x;
       i < probe.bytes / 16; i += threads) {
    const uint4 v = LoadRow(from + i);
    there[i] = v;
    here[i] = v;
  }
  __syncthreads();
  if (threadIdx.x != 0) return;
  AddReleaseSystem(Line(next, window, kArrived), 1);
  await(kArrived, call * gridDim.x);
  auto* const blocks = reinterpret_cast<uint32_t*>(Line(own, window, kBlocks));
  if (AddRelaxedGpu(blocks, 1) != gridDim.x - 1) return;
  *blocks = 0;
  StoreRelaxedSystem(Line(own, window, kCalls), call);
}

}  // namespace

cudaError_t LaunchProbe(const Peers& peers, const ProbeArguments& probe,
                        int blocks, cudaStream_t stream) {
  switch (probe.probe) {
    case Probe::kEmpty:
      EmptyProbe<<<1, 1, 0, stream>>>();
      break;
    case Probe::kBarrier:
      BarrierProbe<<<1, kRanksMax, 0, stream>>>(peers, probe.window);
      break;
    case Probe::kPut:
      PutProbe<<<1, kThreads, 0, stream>>>(peers, probe);
      break;
    case Probe::kStores:
      StoresProbe<<<blocks, kThreads, 0, stream>>>(peers, probe);
      break;
    case Probe::kPush:
      PushProbe<<<blocks, kThreads, 0, stream>>>(peers, probe);
      break;
  }
  return cudaGetLastError();
}

cudaError_t PreloadProbeKernels() {
  cudaFuncAttributes unused;
  for (const void* kernel : {reinterpret_cast<const void*>(EmptyProbe),
                             reinterpret_cast<const void*>(BarrierProbe),
                             reinterpret_cast<const void*>(PutProbe),
                             reinterpret_cast<const void*>(StoresProbe),
                             reinterpret_cast<const void*>(PushProbe)}) {
    const cudaError_t error = cudaFuncGetAttributes(&unused, kernel);
    if (error != cudaSuccess) return error;
  }
  return cudaSuccess;
}

}  // namespace jaxfabric::cuda
