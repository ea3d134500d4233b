// Work requests on their way: the checks of both NICs, the payload in segments,
// then the packet with the immediate or message, then the completion.

#include <errno.h>
#include <sys/uio.h>

#include <algorithm>
#include <cstring>
#include <numeric>
#include <utility>

#include "tests/softefa/memory_region.h"
#include "tests/softefa/progress.h"

namespace jaxfabric::softefa {
namespace {

using Fate = WorkRequest::Fate;
using Kind = WorkRequest::Kind;

constexpr int kStepsPerCall = 16;
constexpr size_t kChaosDelayNs = 20'000;
// Of a packet without payload, for pacing.
constexpr uint64_t kHeaderBytes = 64;

enum class Step {
  kMoved,     // there is more to do, now
  kWaits,     // for its time, or for its target
  kWireBusy,  // and with that all that is behind it
  kFinished,  // its completion is queued
};

// Both ends of a request, found anew at each step since either may go away.
struct Route {
  QueuePair& sender;
  QueuePairFile& target;
  ProcessFile& process;
};

Step Finish(QueuePair& pair, const WorkRequest& request, CompletionCode code) {
  if (request.silent) return Step::kFinished;
  Completion completion;
  completion.request_id = request.id;
  completion.code = code;
  completion.opcode = request.kind == Kind::kSend    ? IBV_WC_SEND
                      : request.kind == Kind::kWrite ? IBV_WC_RDMA_WRITE
                                                     : IBV_WC_RDMA_READ;
  completion.queue_pair = pair.qp_base.qp_num;
  completion.bytes = request.bytes;
  completion.sender = &pair;
  pair.send_completions->Push(completion);
  return Step::kFinished;
}

Fate FateOf(NicState state) {
  switch (state) {
    case NicState::kUnacked:
      return Fate::kUnacked;
    case NicState::kLate:
      return Fate::kLate;
    case NicState::kDying:
      return std::array{Fate::kNormal, Fate::kUnacked,
                        Fate::kLost}[TheHost().chaos.Below(3)];
    default:
      return Fate::kNormal;
  }
}

void Start(QueuePair& pair, WorkRequest& request, NicState state,
           int64_t now_ns) {
  const Settings& settings = TheSettings();
  Chaos& chaos = TheHost().chaos;
  request.started = true;
  for (const ibv_sge& span : request.spans) {
    if (!IsRegistered(span, pair.nic->index)) {
      request.error = CompletionCode::kLocalBadKey;
    }
  }
  const uint64_t bytes_max = request.kind == Kind::kSend
                                 ? settings.message_bytes_max
                                 : settings.rdma_bytes_max;
  if (request.bytes > bytes_max) {
    request.error = CompletionCode::kLocalBadLength;
  }
  if (request.kind != Kind::kSend) {
    request.fate = FateOf(state);
    const uint64_t segment = settings.segment_bytes;
    request.segments.resize((request.bytes + segment - 1) / segment);
    std::iota(request.segments.rbegin(), request.segments.rend(), 0);
  }
  if (chaos.on()) {
    std::shuffle(request.segments.begin(), request.segments.end(),
                 chaos.random());
    request.not_before_ns = now_ns + chaos.Below(kChaosDelayNs);
  }
}

// Where bytes [begin, begin + bytes) of the payload are in this process.
std::vector<iovec> LocalParts(WorkRequest& request, uint64_t begin,
                              uint64_t bytes) {
  if (!request.inline_data.empty())
    return {{&request.inline_data[begin], bytes}};
  std::vector<iovec> parts;
  uint64_t at = 0;
  for (const ibv_sge& span : request.spans) {
    const uint64_t from = std::max(begin, at);
    const uint64_t to = std::min(begin + bytes, at + span.length);
    if (from < to) {
      parts.push_back(
          {reinterpret_cast<std::byte*>(span.addr) + (from - at), to - from});
    }
    at += span.length;
  }
  return parts;
}

CompletionCode CopyBytes(WorkRequest& request, int32_t pid, uint64_t begin,
                         uint64_t bytes) {
  const auto copy =
      request.kind == Kind::kWrite ? process_vm_writev : process_vm_readv;
  uint64_t done = 0;
  while (done < bytes) {
    // The kernel may stop short at a page that is not there.
    const std::vector<iovec> here =
        LocalParts(request, begin + done, bytes - done);
    const iovec there{
        reinterpret_cast<void*>(request.remote_address + begin + done),
        bytes - done};
    const ssize_t moved = copy(pid, here.data(), here.size(), &there, 1, 0);
    if (moved <= 0) {
      return errno == ESRCH ? CompletionCode::kRemoteBadQueuePair
                            : CompletionCode::kRemoteBadAddress;
    }
    done += moved;
  }
  return CompletionCode::kOk;
}

// A killed process leaves its files; only its memory is gone for certain.
bool IsAlive(QueuePairFile& target) {
  uint32_t ready;
  const iovec here{&ready, sizeof(ready)};
  const iovec there{reinterpret_cast<void*>(target.owner_address),
                    sizeof(ready)};
  return process_vm_readv(target.pid, &here, 1, &there, 1, 0) > 0 ||
         errno != ESRCH;
}

CompletionCode CheckTarget(const Route& route, const WorkRequest& request) {
  const uint32_t queue_key =
      route.target.queue_key.load(std::memory_order_relaxed);
  if (queue_key != request.destination_queue_key || !IsAlive(route.target)) {
    return CompletionCode::kRemoteBadQueuePair;
  }
  if (request.kind == Kind::kSend) return CompletionCode::kOk;
  if (TheSettings().need_address_handle &&
      !route.process.Knows(route.target.nic, route.sender.nic->gid)) {
    return CompletionCode::kLocalUnknownPeer;
  }
  return CompletionCode::kOk;
}

// When the wire has carried `bytes` more, or nothing if that is not yet over.
// A request takes its turn on the wire from when it was posted, however late
// the process is to poll: else a busy machine would make the NIC slower.
std::optional<int64_t> PassWire(Nic& nic, const WorkRequest& request,
                                uint64_t bytes, int64_t now_ns) {
  const double rate = TheHost()
                          .faults.Of(nic.gid, now_ns)
                          .gigabits_per_second.value_or(
                              TheSettings().gigabits_per_second[nic.index]);
  if (rate == 0) return now_ns;
  const int64_t passed_ns = std::max(nic.free_ns, request.posted_ns) +
                            static_cast<int64_t>(bytes * 8 / rate);
  if (passed_ns > now_ns) return std::nullopt;
  return passed_ns;
}

// Of the next segment of a write or read, or of its packet.
uint64_t BytesOnWire(const WorkRequest& request) {
  if (request.segments.empty()) {
    return kHeaderBytes + (request.kind == Kind::kSend ? request.bytes : 0);
  }
  const uint64_t segment = TheSettings().segment_bytes;
  return std::min(segment, request.bytes - request.segments.back() * segment);
}

// Moves the next segment of a write or read.
CompletionCode MoveSegment(const Route& route, WorkRequest& request) {
  const uint64_t begin = request.segments.back() * TheSettings().segment_bytes;
  const uint64_t bytes = BytesOnWire(request);
  RegionEntry& region = route.process.Region(request.remote_key);
  const UseGuard region_guard(region.users);
  const uint32_t access = request.kind == Kind::kWrite ? IBV_ACCESS_REMOTE_WRITE
                                                       : IBV_ACCESS_REMOTE_READ;
  CompletionCode code = CompletionCode::kRemoteBadAddress;
  if (region.Covers(request.remote_key, route.target.nic,
                    request.remote_address, request.bytes) &&
      (region.access & access) != 0) {
    code = CopyBytes(request, route.target.pid, begin, bytes);
  }
  request.segments.pop_back();
  return code;
}

void FillPacket(const Route& route, WorkRequest& request, bool unsolicited,
                Packet& packet) {
  packet.kind =
      request.kind == Kind::kSend ? Packet::Kind::kSend : Packet::Kind::kWrite;
  packet.bytes = request.bytes;
  packet.has_immediate = request.immediate.has_value();
  packet.immediate = request.immediate.value_or(0);
  packet.source_queue_pair = route.sender.qp_base.qp_num;
  packet.unsolicited = unsolicited;
  packet.source = route.sender.nic->gid;
  if (request.kind != Kind::kSend) return;
  uint64_t done = 0;
  for (const iovec& part : LocalParts(request, 0, request.bytes)) {
    std::memcpy(&packet.payload[done], part.iov_base, part.iov_len);
    done += part.iov_len;
  }
}

// A message, or the immediate of a write whose bytes have all moved; nothing
// while the target is not ready.
std::optional<CompletionCode> DeliverPacket(const Route& route,
                                            WorkRequest& request,
                                            int64_t now_ns) {
  QueuePair& pair = route.sender;
  const bool write = request.kind == Kind::kWrite;
  const bool unsolicited = write && route.target.unsolicited != 0;
  if (!unsolicited && !route.target.ClaimReceive()) {
    if (!request.not_ready_since_ns.has_value()) {
      request.not_ready_since_ns = now_ns;
    }
    const int64_t patience_ns =
        (pair.rnr_retry + 1) * TheSettings().rnr_wait_ns;
    if (pair.rnr_retry == kRetryForEver ||
        now_ns - *request.not_ready_since_ns < patience_ns) {
      return std::nullopt;
    }
    return CompletionCode::kRemoteNotReady;
  }
  const bool pushed = route.target.Push(
      [&](Packet& packet) { FillPacket(route, request, unsolicited, packet); });
  if (!pushed) return std::nullopt;  // claimed receives always have room
  return CompletionCode::kOk;
}

// Fails the request at once, and keeps a copy to be delivered later.
Step FinishLate(QueuePair& pair, WorkRequest& request, int64_t now_ns) {
  WorkRequest& copy = pair.late.emplace_back(request);
  copy.inline_data.clear();
  for (const iovec& part : LocalParts(request, 0, request.bytes)) {
    const auto* begin = static_cast<const std::byte*>(part.iov_base);
    copy.inline_data.insert(copy.inline_data.end(), begin,
                            begin + part.iov_len);
  }
  copy.spans.clear();
  copy.fate = Fate::kNormal;
  copy.silent = true;
  copy.not_before_ns = now_ns + TheSettings().late_ns;
  return Finish(pair, request, CompletionCode::kLocalUnresponsiveRemote);
}

Step Advance(QueuePair& pair, WorkRequest& request, int64_t now_ns) {
  Host& host = TheHost();
  const NicState state = host.faults.Of(pair.nic->gid, now_ns).state;
  const NicState target_state =
      host.faults.Of(request.destination, now_ns).state;
  if (!request.started) Start(pair, request, state, now_ns);
  if (now_ns < request.not_before_ns) return Step::kWaits;
  if (request.error != CompletionCode::kOk) {
    return Finish(pair, request, request.error);
  }
  if (state == NicState::kDown || target_state == NicState::kDown ||
      request.fate == Fate::kLost) {
    return Finish(pair, request, CompletionCode::kLocalUnresponsiveRemote);
  }
  if (target_state == NicState::kStalled) return Step::kWaits;
  if (request.fate == Fate::kLate) return FinishLate(pair, request, now_ns);

  QueuePairFile* target = pair.FindTarget(request);
  ProcessFile* process =
      target != nullptr ? pair.FindProcess(target->pid) : nullptr;
  if (process == nullptr) {
    return Finish(pair, request, CompletionCode::kRemoteBadQueuePair);
  }
  const Route route{pair, *target, *process};
  const UseGuard target_guard(target->users);
  if (target->ready.load(std::memory_order_seq_cst) == 0) return Step::kMoved;
  const CompletionCode refusal = CheckTarget(route, request);
  if (refusal != CompletionCode::kOk) return Finish(pair, request, refusal);

  const bool has_packet =
      request.kind == Kind::kSend || request.immediate.has_value();
  std::optional<CompletionCode> code = CompletionCode::kOk;
  const bool has_segments = !request.segments.empty();
  if (has_segments || has_packet) {
    const auto passed =
        PassWire(*pair.nic, request, BytesOnWire(request), now_ns);
    if (!passed.has_value()) return Step::kWireBusy;
    code = has_segments ? MoveSegment(route, request)
                        : DeliverPacket(route, request, now_ns);
    if (!code.has_value()) return Step::kWaits;
    pair.nic->free_ns = *passed;
  }
  if (*code != CompletionCode::kOk) return Finish(pair, request, *code);
  if (has_segments) return Step::kMoved;
  return Finish(pair, request,
                request.fate == Fate::kUnacked
                    ? CompletionCode::kLocalUnresponsiveRemote
                    : CompletionCode::kOk);
}

void AdvanceQueue(QueuePair& pair, std::deque<WorkRequest>& queue,
                  int64_t now_ns) {
  Chaos& chaos = TheHost().chaos;
  size_t waiting = 0;  // requests that could not move
  for (int steps = 0; steps < kStepsPerCall && waiting < queue.size();) {
    // Any of them: those at the front may wait for a target that is not ready.
    const size_t at = chaos.on() ? chaos.Below(queue.size()) : waiting;
    const Step step = Advance(pair, queue[at], now_ns);
    // What is behind must not begin its turn before the one on the wire ends.
    if (step == Step::kWireBusy) return;
    if (step == Step::kFinished) queue.erase(queue.begin() + at);
    if (step == Step::kWaits) {
      ++waiting;
    } else {
      ++steps;
    }
  }
}

}  // namespace

void Transmit(QueuePair& pair, int64_t now_ns) {
  AdvanceQueue(pair, pair.late, now_ns);
  AdvanceQueue(pair, pair.send_queue, now_ns);
}

}  // namespace jaxfabric::softefa
