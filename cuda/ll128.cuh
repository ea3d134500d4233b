// LL128: packets that carry their own flag, sent and received by whole warps.
//
// A packet is what 32 lanes store in one instruction: 4 lines of 128 bytes. The
// last 8 bytes of each line are a flag, the call's, so that a line which shows
// it has come whole (128-byte lines travel whole over NVLink: a property of the
// hardware, measured and relied on by NCCL, which PTX does not promise). The
// other 480 bytes are data. Lanes 7, 15, 23 and 31 hold 8 bytes of it beside
// their flag, the other 28 lanes 16 bytes each:
//
//   data [0, 448)    16 bytes each: lane 8g + s at (7g + s) * 16, s < 7
//   data [448, 480)   8 bytes each: lane 8g + 7 at 448 + 8g
//
// so that all accesses to the data are aligned without exchange between lanes.

#ifndef JAXFABRIC_CUDA_LL128_CUH_
#define JAXFABRIC_CUDA_LL128_CUH_

#include <cstdint>

#include "bounded_wait.cuh"
#include "device_memory.cuh"
#include "group_state.h"

namespace jaxfabric::cuda {

inline constexpr int kPacketData = 480;
inline constexpr int kPacketWire = 512;

__host__ __device__ inline int64_t PacketsFor(int64_t bytes) {
  return (bytes + kPacketData - 1) / kPacketData;
}

struct LanePart {
  int offset;  // of this lane's data in the packet
  int bytes;   // 16, or 8 beside a flag
  int vector;  // offset of the 16 bytes that they are in
  bool upper;  // they are the upper half of these
};

__device__ inline LanePart MyPart(int lane) {
  const int group = lane >> 3, sub = lane & 7;
  if (sub == 7) {
    return {448 + 8 * group, 8, 448 + 16 * (group >> 1), (group & 1) != 0};
  }
  const int offset = (7 * group + sub) * 16;
  return {offset, 16, offset, false};
}

// Two 64-bit words of a lane; the second of a flag lane is the flag.
struct LaneWords {
  uint64_t low;
  uint64_t high;
};

// Whether all lanes' parts of an array of `bytes` are whole or absent, and
// aligned to their size.
__host__ __device__ inline bool IsVector(const void* data, int64_t bytes) {
  return ((reinterpret_cast<uintptr_t>(data) | bytes) & 15) == 0;
}

// This lane's part of the packet that begins at byte `at` of a row; anything
// beyond the row's end. For rows that are IsVector. Without a branch and the
// same for all lanes, so that the loads of several packets overlap.
__device__ inline LaneWords LoadVectorPart(const char* row, int64_t row_bytes,
                                           int64_t at, LanePart part) {
  const int64_t offset = at + part.vector;
  const uint4 v = LoadRow(row + (offset < row_bytes ? offset : 0));
  const uint64_t low = v.x | static_cast<uint64_t>(v.y) << 32;
  const uint64_t high = v.z | static_cast<uint64_t>(v.w) << 32;
  return {part.upper ? high : low, high};
}

__device__ inline void StoreVectorPart(char* data, int64_t left, LanePart part,
                                       LaneWords words) {
  const bool inside = part.offset + part.bytes <= left;
  asm volatile(
      "{\n"
      ".reg .pred wide, narrow;\n"
      "setp.eq.u32 wide, %3, 16;\n"
      "setp.eq.u32 narrow, %3, 8;\n"
      "@wide st.global.v2.u64 [%2], {%0, %1};\n"
      "@narrow st.global.u64 [%2], %0;\n"
      "}"
      :
      : "l"(words.low), "l"(words.high), "l"(data + part.offset),
        "r"(inside ? part.bytes : 0)
      : "memory");
}

// The same for any array, of generic addresses, byte by byte.
__device__ inline LaneWords LoadPart(const char* data, int64_t left,
                                     LanePart part) {
  LaneWords words = {0, 0};
  const char* const at = data + part.offset;
#pragma unroll 1
  for (int b = 0; b < part.bytes && part.offset + b < left; ++b) {
    const auto byte = static_cast<uint64_t>(static_cast<uint8_t>(at[b]));
    if (b < 8) words.low |= byte << (8 * b);
    if (b >= 8) words.high |= byte << (8 * (b - 8));
  }
  return words;
}

__device__ inline void StorePart(char* data, int64_t left, LanePart part,
                                 LaneWords words) {
  char* const at = data + part.offset;
#pragma unroll 1
  for (int b = 0; b < part.bytes && part.offset + b < left; ++b) {
    const uint64_t word = b < 8 ? words.low : words.high;
    at[b] = static_cast<char>(word >> (8 * (b & 7)));
  }
}

// The same for arrays of 4-byte words at their alignment.
__device__ inline LaneWords LoadWordPart(const uint32_t* data, int words_left,
                                         LanePart part) {
  uint32_t w[4] = {0, 0, 0, 0};
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    const int at = part.offset / 4 + i;
    if (i * 4 < part.bytes && at < words_left) w[i] = data[at];
  }
  return {w[0] | static_cast<uint64_t>(w[1]) << 32,
          w[2] | static_cast<uint64_t>(w[3]) << 32};
}

__device__ inline void StoreWordPart(uint32_t* data, int words_left,
                                     LanePart part, LaneWords words) {
  const uint64_t w[2] = {words.low, words.high};
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    const int at = part.offset / 4 + i;
    if (i * 4 < part.bytes && at < words_left) {
      data[at] = static_cast<uint32_t>(w[i / 2] >> (32 * (i % 2)));
    }
  }
}

// Sends a part of the packet at `wire` in a peer's heap.
__device__ inline void SendPart(char* wire, int lane, LanePart part,
                                LaneWords words, uint64_t flag) {
  if (part.bytes == 8) words.high = flag;
  asm volatile("st.volatile.global.v2.u64 [%0], {%1, %2};"
               :
               : "l"(wire + lane * 16), "l"(words.low), "l"(words.high)
               : "memory");
}

// This lane's part of a packet in this rank's heap, which may not be there yet.
__device__ inline LaneWords LoadWire(const char* wire, int lane) {
  LaneWords words;
  asm volatile("ld.volatile.global.v2.u64 {%0, %1}, [%2];"
               : "=l"(words.low), "=l"(words.high)
               : "l"(wire + lane * 16)
               : "memory");
  return words;
}

// How a warp waits for packets. Eager: it asks for all of them again and again,
// and has them once they are there. Patient: it watches one flag, now and then,
// for where there are many warps that wait: what they all ask for would be
// most of the traffic.
enum class Waiting { kEager, kPatient };

// Waits for a line of the packet at `wire`; false if in vain. By a whole warp.
__device__ inline bool WatchLine(const char* wire, int line, uint64_t flag,
                                 BoundedWait& wait) {
  constexpr int kFlagOffset = 120;
  constexpr unsigned kNanoseconds = 200;
  const auto* const word = reinterpret_cast<const uint64_t*>(
      wire + line * static_cast<int>(kLineBytes) + kFlagOffset);
  for (;;) {
    const bool here = LoadRelaxedSystem(word) == flag;
    if (__all_sync(kAllLanes, here)) return true;
    if (__any_sync(kAllLanes, wait.Expired())) return false;
    __nanosleep(kNanoseconds);
  }
}

// Waits for `count` (at most kMost) packets from `wire` on in this rank's heap.
// All lanes of the warp call it; false if they waited in vain.
template <int kMost>
__device__ bool ReceiveParts(const char* wire, int count, int lane,
                             LanePart part, uint64_t flag, BoundedWait& wait,
                             Waiting waiting, LaneWords (&words)[kMost]) {
  for (;;) {
    bool here = true;
#pragma unroll
    for (int i = 0; i < kMost; ++i) {
      if (i < count) words[i] = LoadWire(wire + i * kPacketWire, lane);
    }
#pragma unroll
    for (int i = 0; i < kMost; ++i) {
      if (i < count && part.bytes == 8) here &= words[i].high == flag;
    }
    if (__all_sync(kAllLanes, here)) return true;
    if (waiting == Waiting::kPatient &&
        !WatchLine(wire + (count - 1) * kPacketWire, 3, flag, wait)) {
      return false;
    }
    // Also where the watched line is there: a rank that runs another program
    // may never send those before it. The lanes' clocks differ, and all must
    // leave together.
    if (__any_sync(kAllLanes, wait.Expired())) return false;
  }
}

}  // namespace jaxfabric::cuda

#endif  // JAXFABRIC_CUDA_LL128_CUH_
