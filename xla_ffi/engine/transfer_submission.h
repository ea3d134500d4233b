// Submission: an operation of a TransferEngine that is under way.

#ifndef JAXFABRIC_ENGINE_TRANSFER_SUBMISSION_H_
#define JAXFABRIC_ENGINE_TRANSFER_SUBMISSION_H_

#include <cstdint>
#include <map>
#include <memory>
#include <optional>
#include <span>
#include <unordered_map>
#include <unordered_set>
#include <utility>
#include <vector>

#include "base/deadline.h"
#include "base/status.h"
#include "engine/domain_group.h"
#include "engine/imm_counter.h"
#include "engine/memory_registry.h"
#include "engine/random_id.h"
#include "engine/region_address.h"
#include "engine/transfer_future.h"

namespace jaxfabric {

// One transfer that is about to be posted.
struct PendingWrite {
  const RegionAddress* target;
  std::span<const Piece> pieces;
  uint32_t peer = 0;
  std::byte* mapped = nullptr;  // the target region, where it is mapped here
};

enum class SubmissionKind {
  kWrites,
  kSend,
  kBarrier,
  kExpect,
  kConnect,
  kUnregister,
  kFence,
};

struct Submission {
  // kWrites: a transfer. kSend: a message, or a part of it.
  struct Part {
    uint32_t peer = 0;
    uint64_t bytes = 0;
    TransferHandle handle = 0;
    bool open = false;
    uint64_t target = 0;    // kWrites: the receiver's region
    RandomId receiver;      // kWrites
    bool unmapped = false;  // kWrites: nobody reads the source yet
  };
  // kBarrier: done once the peer has come `count` times.
  struct Arrival {
    uint32_t peer = 0;
    uint64_t count = 0;
  };

  SubmissionKind kind = SubmissionKind::kWrites;
  uint64_t span = 0;  // in the trace
  TransferFuturePtr future;
  Deadline deadline;
  double timeout_s = 0;
  bool over = false;
  // It was asked to end early, at this time, and waits for its open parts.
  std::optional<int64_t> stopped_ns;
  Status failure;                // the first
  std::optional<uint32_t> lost;  // the peer whose loss is the failure

  std::vector<Part> parts;
  size_t open_parts = 0;
  bool part_failed = false;
  std::optional<uint32_t> id;  // kWrites, kBarrier, kExpect
  RegionId region = 0;         // kWrites, kUnregister
  uint32_t peer = 0;           // kConnect

  std::vector<Arrival> arrivals;

  uint64_t transfers = 0;                   // kExpect
  ImmCounterTable::Handle expectation = 0;  // kExpect
  std::vector<uint32_t> sources;            // kExpect

  bool told = false;                 // kUnregister: peers may know of it
  std::vector<uint32_t> unanswered;  // kUnregister: peers that were asked

  uint64_t losses = 0;  // kFence: it covers so many
};

using SubmissionPtr = std::shared_ptr<Submission>;

// A part that waits until its peer has said where its region is.
struct UnmappedWrite {
  SubmissionPtr submission;
  size_t part = 0;
  const std::byte* source = nullptr;  // the region
  RegionAddress target;
  std::vector<Piece> pieces;
};

// What is copied into the memory of peers.
struct MappedWrites {
  // Copies under way, by peer: it must stay mapped meanwhile.
  std::unordered_map<uint32_t, uint32_t> copies;
  std::unordered_set<uint32_t>
      to_remove;  // peers, once their copies have ended
  // Writes into regions that are not mapped yet, by peer and key.
  std::map<std::pair<uint32_t, uint64_t>, std::vector<UnmappedWrite>> waiting;
  uint32_t tasks = 0;  // that ask for them
};

// Peers that were lost, and may have writes under way here until a fence.
struct LostPeers {
  struct Fence {
    uint64_t losses = 0;  // that it covers
    uint64_t strays = 0;  // of the registry's
  };
  uint64_t losses = 0;                 // so far
  uint64_t fenced = 0;                 // of them
  std::optional<Fence> fence;          // under way
  std::vector<SubmissionPtr> waiting;  // kFence
};

// Regions that are to be unregistered.
struct EndingRegions {
  std::unordered_map<RegionId, SubmissionPtr> regions;
  std::vector<RegionId> unused;  // perhaps: to be looked at
  // Unused, but lost peers may write into them until they are cut off.
  std::vector<RegionId> exposed;
  LostPeers lost;
};

}  // namespace jaxfabric

#endif  // JAXFABRIC_ENGINE_TRANSFER_SUBMISSION_H_
