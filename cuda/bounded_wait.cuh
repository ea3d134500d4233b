// BoundedWait: every spin of ours, with an end and a culprit.

#ifndef JAXFABRIC_CUDA_BOUNDED_WAIT_CUH_
#define JAXFABRIC_CUDA_BOUNDED_WAIT_CUH_

#include <cstdint>

#include "device_memory.cuh"
#include "group_state.h"

namespace jaxfabric::cuda {

// What the packets of a call carry: its epoch, and above it which call of the
// program it is. So ranks that run their calls in different orders wait in vain
// for each other, instead of taking one call's message for another's.
__device__ inline uint64_t EpochOf(uint64_t flag) {
  return flag & ((uint64_t{1} << kEpochBits) - 1);
}

// Both halves have the first one's.
__device__ inline uint64_t PacketFlag(const Peers& peers, uint64_t epoch) {
  uint64_t tag = peers.tag;
  if (peers.phase == Phase::kDone) {
    const volatile uint32_t* const words = peers.pending;
    tag = words[2];
  }
  return tag << kEpochBits | epoch;
}

// Writes the error word, unless one is written already.
__device__ inline void Fail(const Peers& peers, ErrorCode code,
                            Operation operation, int peer, int detail,
                            uint64_t flag, uint64_t elapsed_ns) {
  const auto value = static_cast<uint32_t>(code);
  if (atomicCAS(&peers.state->failed, 0u, value) != 0u) return;
  ErrorWord* const word = peers.error;
  word->operation = static_cast<uint32_t>(operation);
  const bool known = peer >= 0 && peer < peers.ranks;
  word->peer = static_cast<uint32_t>(known ? peers.mesh_rank[peer] : peer);
  word->detail = detail;
  word->epoch = EpochOf(flag);
  word->elapsed_ns = elapsed_ns;
  __threadfence_system();  // the host reads the code first
  *const_cast<volatile uint32_t*>(&word->code) = value;
}

__device__ inline bool HasFailed(const Peers& peers) {
  return LoadRelaxedGpu(&peers.state->failed) != 0;
}

// Use: BoundedWait wait(...); while (!there) { if (wait.Expired()) ...; }
class BoundedWait {
 public:
  // Who waits for threads that wait themselves is `patience` times as patient,
  // so that the error names the one that they wait for.
  __device__ BoundedWait(const Peers& peers, Operation operation, int peer,
                         uint64_t epoch, int patience = 1)
      : peers_(peers),
        operation_(operation),
        peer_(peer),
        epoch_(epoch),
        patience_(patience) {}

  // For the error's text.
  __device__ void SetDetail(int detail) { detail_ = detail; }

  // After a miss. True if the wait is over because it took too long, or because
  // another thread of this rank failed.
  __device__ bool Expired() {
    if (++misses_ % kMissesPerLook != 0) return false;
    if (HasFailed(peers_)) return true;
    const uint64_t now = GlobalNanoseconds();
    if (began_ns_ == 0) began_ns_ = now;
    if (now - began_ns_ <= peers_.timeout_ns * patience_) return false;
    Fail(peers_, ErrorCode::kTimeout, operation_, peer_, detail_, epoch_,
         now - began_ns_);
    return true;
  }

 private:
  // Looking at the clock costs more than looking at the flag.
  static constexpr uint32_t kMissesPerLook = 512;

  const Peers& peers_;
  Operation operation_;
  int peer_;
  uint64_t epoch_;
  int patience_;
  int detail_ = 0;
  uint64_t began_ns_ = 0;
  uint32_t misses_ = 0;
};

// One lane waits for a flag of a peer to become at least `value`.
__device__ inline bool WaitForFlag(const Peers& peers, Operation operation,
                                   int peer, const uint64_t* flag,
                                   uint64_t value, bool acquire) {
  BoundedWait wait(peers, operation, peer, value);
  while ((acquire ? LoadAcquireSystem(flag) : LoadRelaxedSystem(flag)) <
         value) {
    if (wait.Expired()) return false;
  }
  return true;
}

// The line that `writer` has in the heap of `owner`. By their ranks in the
// mesh: the order of a call's axes may differ from that of the call before.
__device__ inline uint64_t* FlagLine(const Peers& peers, size_t flags,
                                     int owner, int writer) {
  return reinterpret_cast<uint64_t*>(peers.heap[owner] + peers.flags_begin +
                                     flags +
                                     peers.mesh_rank[writer] * kLineBytes);
}

// By one thread of a kernel: checks the program's mesh and passes its token on.
__device__ inline void EnterProgramCall(const Peers& peers, Operation operation,
                                        uint64_t epoch) {
  const ProgramCall& call = peers.call;
  if (call.token_out != nullptr) *call.token_out = *call.token;
  if (call.position == nullptr || *call.position == peers.rank) return;
  Fail(peers, ErrorCode::kWrongPosition, operation, peers.rank, *call.position,
       epoch, 0);
}

// The epoch of a kernel with messages, 0 if the group has failed. Each warp
// reads it for itself, beside its first loads of data.
__device__ inline uint64_t ReadEpoch(const Peers& peers, Operation operation) {
  const bool failed = HasFailed(peers);
  const uint64_t last = LoadRelaxedSystem(&peers.counter->epoch);
  uint64_t epoch = last + 1;
  if (peers.phase == Phase::kDone) {
    const volatile uint32_t* const words = peers.pending;
    epoch = words[0] | static_cast<uint64_t>(words[1]) << 32;
    // Its part of the mailboxes belongs to another epoch before and after.
    if (!failed && (epoch == 0 || epoch > last || epoch + 2 <= last)) {
      Fail(peers, ErrorCode::kNotPending, operation, peers.rank, 0, epoch, 0);
      epoch = 0;
    }
  }
  // All lanes take the same way, whatever another block writes meanwhile.
  return __shfl_sync(kAllLanes, failed ? 0 : epoch, 0);
}

// By one thread of each block, after a barrier that all its threads passed with
// the epoch read: the last block advances it for the next kernel.
__device__ inline void AdvanceEpoch(const Peers& peers, uint64_t epoch) {
  if (peers.phase == Phase::kDone) return;
  if (AddRelaxedGpu(&peers.counter->blocks, 1) != gridDim.x - 1) return;
  peers.counter->blocks = 0;
  StoreRelaxedSystem(&peers.counter->epoch, epoch);
  if (peers.phase == Phase::kStart) {
    peers.pending[0] = static_cast<uint32_t>(epoch);
    peers.pending[1] = static_cast<uint32_t>(epoch >> 32);
    peers.pending[2] = peers.tag;
    for (int i = 3; i < 6; ++i) peers.pending[i] = 0;
  }
}

__device__ inline uint64_t* ReleaseFlag(const Peers& peers, int owner,
                                        int writer, uint64_t epoch) {
  const size_t half = (epoch & 1) * kRanksMax * kLineBytes;
  return FlagLine(peers, kReleaseFlags + half, owner, writer);
}

// Before the first half sends: all peers have read what lay there before. By
// all threads of a block; false if one did not in time.
__device__ inline bool AwaitReleases(const Peers& peers, Operation operation,
                                     uint64_t epoch) {
  const int peer = threadIdx.x;
  bool good = true;
  if (epoch > 2 && peer < peers.ranks && peer != peers.rank) {
    good = WaitForFlag(peers, operation, peer,
                       ReleaseFlag(peers, peers.rank, peer, epoch), epoch - 2,
                       /*acquire=*/true);
  }
  return __syncthreads_and(good) != 0;
}

// After a second half has read everything: by all threads of each block.
__device__ inline void Release(const Peers& peers, uint64_t epoch) {
  __syncthreads();
  if (threadIdx.x != 0) return;
  if (AddAcquireReleaseGpu(&peers.counter->readers, 1) != gridDim.x - 1) return;
  peers.counter->readers = 0;
  for (int peer = 0; peer < peers.ranks; ++peer) {
    if (peer == peers.rank) continue;
    StoreReleaseSystem(ReleaseFlag(peers, peer, peers.rank, epoch), epoch);
  }
}

// Where `source`'s messages of this epoch lie in the heap of `rank`.
__device__ inline char* Mailbox(const Peers& peers, int rank, int source,
                                uint64_t epoch) {
  const uint64_t slot = source - (source > rank ? 1 : 0);
  const uint64_t part = (epoch & 1) * (peers.ranks - 1) + slot;
  return peers.heap[rank] + peers.message_begin + part * peers.mailbox_bytes;
}

}  // namespace jaxfabric::cuda

#endif  // JAXFABRIC_CUDA_BOUNDED_WAIT_CUH_
