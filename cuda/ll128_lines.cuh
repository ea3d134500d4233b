// Packets whose last ones are short: lines without data are not sent.

#ifndef JAXFABRIC_CUDA_LL128_LINES_CUH_
#define JAXFABRIC_CUDA_LL128_LINES_CUH_

#include <cstdint>

#include "bounded_wait.cuh"
#include "device_memory.cuh"
#include "ll128.cuh"

namespace jaxfabric::cuda {

// Of a packet with so many bytes of data, from the first on: lines that have
// any. Those after them need not be sent.
__device__ inline int LinesOf(int bytes) {
  constexpr int kLineVectors = 112;  // the 16 bytes of 7 lanes
  return bytes > 4 * kLineVectors ? 4
                                  : (bytes + kLineVectors - 1) / kLineVectors;
}

// Sends `bytes` (of at most kMost packets), without the lines that are empty.
template <int kMost>
__device__ void SendLines(char* wire, int bytes, int lane, LanePart part,
                          const LaneWords (&words)[kMost], uint64_t flag) {
#pragma unroll
  for (int i = 0; i < kMost; ++i) {
    const int left = bytes - i * kPacketData;
    if (left > 0 && lane < 8 * LinesOf(left)) {
      SendPart(wire + i * kPacketWire, lane, part, words[i], flag);
    }
  }
}

// Whether these packets are what SendLines sent, all of it. By a whole warp.
template <int kMost>
__device__ bool HaveLines(int bytes, int lane, LanePart part, uint64_t flag,
                          const LaneWords (&words)[kMost]) {
  bool here = true;
#pragma unroll
  for (int i = 0; i < kMost; ++i) {
    const int left = bytes - i * kPacketData;
    if (part.bytes == 8 && left > 0 && lane < 8 * LinesOf(left)) {
      here &= words[i].high == flag;
    }
  }
  return __all_sync(kAllLanes, here) != 0;
}

// Waits for what SendLines sent: as ReceiveParts. Where no data is the words
// are anything.
template <int kMost>
__device__ bool ReceiveLines(const char* wire, int bytes, int lane,
                             LanePart part, uint64_t flag, BoundedWait& wait,
                             Waiting waiting, LaneWords (&words)[kMost]) {
  for (;;) {
    if (waiting == Waiting::kPatient) {
      const int last = (bytes - 1) / kPacketData;
      if (!WatchLine(wire + last * kPacketWire,
                     LinesOf(bytes - last * kPacketData) - 1, flag, wait)) {
        return false;
      }
    }
#pragma unroll
    for (int i = 0; i < kMost; ++i) {
      words[i] = LoadWire(wire + i * kPacketWire, lane);
    }
    if (HaveLines(bytes, lane, part, flag, words)) return true;
    // The lanes' clocks differ, and all must leave together.
    if (__any_sync(kAllLanes, wait.Expired())) return false;
  }
}

}  // namespace jaxfabric::cuda

#endif  // JAXFABRIC_CUDA_LL128_LINES_CUH_
