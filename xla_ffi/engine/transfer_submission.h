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
#include "engine/transfer_future.h"

namespace jaxfabric {

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
  };
  // kBarrier: done once the peer has come `count` times.
  struct Arrival {
    uint32_t peer = 0;
    uint64_t count = 0;
  };

  SubmissionKind kind = SubmissionKind::kWrites;
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
};

using SubmissionPtr = std::shared_ptr<Submission>;

}  // namespace jaxfabric

#endif  // JAXFABRIC_ENGINE_TRANSFER_SUBMISSION_H_
