// Submission: an operation of a TransferEngine that is under way.

#ifndef JAXFABRIC_ENGINE_TRANSFER_SUBMISSION_H_
#define JAXFABRIC_ENGINE_TRANSFER_SUBMISSION_H_

#include <cstdint>
#include <memory>
#include <optional>
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
  std::vector<Piece> pieces;
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
};

struct Submission {
  // kWrites: a transfer. kSend: a message, or a part of it.
  struct Part {
    uint32_t peer = 0;
    uint64_t bytes = 0;
    TransferHandle handle = 0;
    bool open = false;
    uint64_t target = 0;  // kWrites: the receiver's region
    RandomId receiver;    // kWrites
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
};

using SubmissionPtr = std::shared_ptr<Submission>;

}  // namespace jaxfabric

#endif  // JAXFABRIC_ENGINE_TRANSFER_SUBMISSION_H_
