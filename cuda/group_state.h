// What the kernels of one rank share with the host and with their peers.
//
// Every rank of a group has one heap of the same layout, mapped by all of them:
//
//   offset                 bytes                       written by
//   kBarrierFlags          kRanksMax x 128             each peer, its own line
//   kHelloFlags            kRanksMax x 128             each peer, its own line
//   kArrivals              kCountersMax x 8            all peers, by addition
//   kWindowsBegin          window_bytes                all peers
//   message_begin          2 x (N - 1) x mailbox_bytes each peer, its own part
//
// Messages are LL128 packets and nothing else: the last 8 bytes of each
// 128-byte line there have never held anything but an epoch, so a stale line
// cannot look like a live one. Two parts per peer, by the epoch's parity: who
// has seen everyone's epoch e + 1 knows that everyone has finished e, and may
// write e + 2 where e was.

#ifndef JAXFABRIC_CUDA_GROUP_STATE_H_
#define JAXFABRIC_CUDA_GROUP_STATE_H_

#include <cstddef>
#include <cstdint>

namespace jaxfabric::cuda {

// Peers of one NVLink domain; their addresses travel as kernel arguments.
inline constexpr int kRanksMax = 16;
inline constexpr int kCountersMax = 4096;
// Flags stand in lines of their own, so that peers do not share one.
inline constexpr size_t kLineBytes = 128;

inline constexpr size_t kBarrierFlags = 0;
inline constexpr size_t kHelloFlags = kBarrierFlags + kRanksMax * kLineBytes;
inline constexpr size_t kArrivals = kHelloFlags + kRanksMax * kLineBytes;
inline constexpr size_t kWindowsBegin = size_t{64} << 10;
static_assert(kArrivals + kCountersMax * sizeof(uint64_t) <= kWindowsBegin);

enum class ErrorCode : uint32_t {
  kNone = 0,
  kTimeout = 1,        // `peer` did not send in time
  kBadExpert = 2,      // ids[detail] names no expert, or one twice in a token
  kBadTarget = 3,      // put: rank, offset or length outside of the window
  kWrongPosition = 4,  // the program's mesh orders its devices otherwise
  kBadPlan = 5,        // recv_count or slot_row outside of their ranges
};

// What was going on: for the error's text.
enum class Operation : uint32_t {
  kBarrier = 1,
  kPut = 2,
  kWait = 3,
  kDispatch = 4,
  kCombine = 5,
  kReplay = 6,
};

// In pinned host memory, written by the first thread that fails.
struct ErrorWord {
  uint32_t code;
  uint32_t operation;
  uint32_t peer;
  int32_t detail;
  uint64_t epoch;
  uint64_t elapsed_ns;
};

// A barrier among the blocks of one kernel.
struct BlockBarrier {
  uint32_t arrived;
  uint32_t generation;
};

// Counters of one rank, in its own device memory. Kernels advance them, because
// a replayed command buffer never asks the host. Zero at first.
struct RankState {
  uint64_t message_epoch;
  uint64_t barrier_epoch;
  uint32_t message_blocks;  // that have read message_epoch
  uint32_t put_blocks;
  uint32_t wait_blocks;
  uint32_t failed;  // an ErrorCode; every later kernel returns at once
  BlockBarrier plan_barrier;
  uint64_t consumed[kCountersMax];
};

// What a call of a program brings along for whoever runs it; null where no
// program calls.
struct ProgramCall {
  const int32_t* position;  // this rank's index, as the program's mesh has it
  const float* token;       // passed on: it is data to XLA and nothing to us
  float* token_out;
};

// The argument that all kernels have.
struct Peers {
  int32_t rank;
  int32_t ranks;
  char* heap[kRanksMax];  // [rank] is this rank's own
  RankState* state;
  ErrorWord* error;
  uint64_t timeout_ns;
  uint64_t message_begin;
  uint64_t mailbox_bytes;
  ProgramCall call;
};

}  // namespace jaxfabric::cuda

#endif  // JAXFABRIC_CUDA_GROUP_STATE_H_
