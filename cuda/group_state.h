// What the kernels of one rank share with the host and with their peers.
//
// Every rank of a group has one heap of the same layout, mapped by all of them:
//
//   offset            bytes                          written by
//   0                 kAxisSetsMax x kFlagsBytes     see below
//   kArrivals         kCountersMax x 8               all peers, by addition
//   kWindowsBegin     window_bytes                   all peers
//   after them        4 x (N - 1) x mailbox_bytes    each peer, its own parts
//                     for each set of axes
//
// Flags and messages are there once for each set of the mesh's axes that calls
// may be over: a rank's peers differ between these sets, and so do the epochs
// that they have come to. N is the number of ranks of such a set. The flags are
//
//   kBarrierFlags     kRanksMax x 128                each peer, its own line
//   kHelloFlags       kRanksMax x 128                each peer, its own line
//   kReleaseFlags     2 x kRanksMax x 128            each peer, its own lines
//
// Messages are LL128 packets and nothing else: the last 8 bytes of each
// 128-byte line there have never held anything but an epoch, so a stale line
// cannot look like a live one. Two parts per peer, by the epoch's parity: who
// has seen everyone's epoch e + 1 knows that everyone has finished e, and may
// write e + 2 where e was.
//
// That does not hold for calls in two halves: a peer may have begun e + 1 and
// not have read e. They have epochs and two parts of their own, and whoever has
// read a part says so to its writers (kReleaseFlags).

#ifndef JAXFABRIC_CUDA_GROUP_STATE_H_
#define JAXFABRIC_CUDA_GROUP_STATE_H_

#include <cstddef>
#include <cstdint>

namespace jaxfabric::cuda {

// Peers of one NVLink domain; their addresses travel as kernel arguments.
inline constexpr int kRanksMax = 16;
// A window's counters, one for each of the user's ids; see WINDOWS_MAX and
// USER_IDS_MAX in jaxfabric/_window.py.
inline constexpr int kWindowsMax = 128;
inline constexpr int kIdsMax = 256;
inline constexpr int kCountersMax = kWindowsMax * kIdsMax;
// Flags stand in lines of their own, so that peers do not share one.
inline constexpr size_t kLineBytes = 128;

// Of a set of axes.
inline constexpr size_t kBarrierFlags = 0;
inline constexpr size_t kHelloFlags = kBarrierFlags + kRanksMax * kLineBytes;
inline constexpr size_t kReleaseFlags = kHelloFlags + kRanksMax * kLineBytes;
inline constexpr size_t kFlagsBytes =
    kReleaseFlags + size_t{2} * kRanksMax * kLineBytes;
// 16 ranks have at most four axes of more than one rank.
inline constexpr int kAxisSetsMax = 15;
inline constexpr size_t kArrivals = kAxisSetsMax * kFlagsBytes;
inline constexpr size_t kWindowsBegin = size_t{512} << 10;
static_assert(kArrivals + kCountersMax * sizeof(uint64_t) <= kWindowsBegin);

enum class ErrorCode : uint32_t {
  kNone = 0,
  kTimeout = 1,        // `peer` did not send in time
  kBadExpert = 2,      // ids[detail] names no expert, or one twice in a token
  kBadTarget = 3,      // put: rank, offset or length outside of the window
  kWrongPosition = 4,  // the program's mesh orders its devices otherwise
  kBadPlan = 5,        // recv_count or slot_row outside of their ranges
  kBadPage = 6,        // put_pages: entry `detail` is outside of its array
  kPageTwice = 7,      // put_pages: the page of entry `detail`, more than once
  kNotPending = 8,     // the second half of a call that is not under way
};

// What was going on: for the error's text.
enum class Operation : uint32_t {
  kBarrier = 1,
  kPut = 2,
  kWait = 3,
  kDispatch = 4,
  kCombine = 5,
  kReplay = 6,
  kScatter = 7,
  kPutPages = 8,
  kExchange = 9,
};

// In pinned host memory, written by the first thread that fails.
struct ErrorWord {
  uint32_t code;
  uint32_t operation;
  uint32_t peer;  // of the mesh
  int32_t detail;
  uint64_t epoch;
  uint64_t elapsed_ns;
};

// A barrier among the blocks of one kernel.
struct BlockBarrier {
  uint32_t arrived;
  uint32_t generation;
};

// A numbered sequence of kernels with messages.
struct EpochCounter {
  uint64_t epoch;
  uint32_t blocks;   // of the kernel under way that have read it
  uint32_t readers;  // of a second half, that have read all they were sent
};

// How far the calls over one set of axes have come.
struct CallSequence {
  EpochCounter messages;
  EpochCounter halves;
  uint64_t barrier_epoch;
};

// Counters of one rank, in its own device memory. Kernels advance them, because
// a replayed command buffer never asks the host. Zero at first.
struct RankState {
  CallSequence sequences[kAxisSetsMax];
  uint32_t put_blocks[kRanksMax];  // by the slice that they copy
  uint32_t wait_blocks;
  uint32_t pages_blocks;
  uint32_t pages_stamp;  // of the last put_pages
  uint32_t failed;       // an ErrorCode; every later kernel returns at once
  BlockBarrier plan_barrier;
  uint64_t planned;  // PlanNumber of the last plan that blocks made together
  uint64_t consumed[kCountersMax];
};

// A call that is done by one kernel, or half of one that is done by two.
enum class Phase : int32_t { kWhole = 0, kStart = 1, kDone = 2 };

// What a call of a program brings along for whoever runs it; null where no
// program calls.
struct ProgramCall {
  const int32_t* position;  // this rank's index, as the program's mesh has it
  const float* token;       // passed on: it is data to XLA and nothing to us
  float* token_out;
};

// Of the number that packets carry; a call's tag takes those above.
inline constexpr int kEpochBits = 40;

// The argument that all kernels have. Ranks are counted along the axes of the
// call, in their order.
struct Peers {
  int32_t rank;
  int32_t ranks;
  char* heap[kRanksMax];         // [rank] is this rank's own
  int32_t mesh_rank[kRanksMax];  // what they are in the mesh
  RankState* state;
  CallSequence* sequence;
  uint64_t flags_begin;
  ErrorWord* error;
  uint64_t timeout_ns;
  uint64_t message_begin;  // of the parts that this kernel uses
  uint64_t mailbox_bytes;
  EpochCounter* counter;
  Phase phase;
  uint32_t* pending;  // u32[6]: a half's epoch and tag, written by kStart
  uint32_t tag;       // which call of the program: see PacketFlag
  ProgramCall call;
};

}  // namespace jaxfabric::cuda

#endif  // JAXFABRIC_CUDA_GROUP_STATE_H_
