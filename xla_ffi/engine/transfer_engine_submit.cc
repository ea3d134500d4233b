// TransferEngine: what is submitted, from the call to its end.

#include <algorithm>
#include <cstring>
#include <unordered_set>
#include <utility>

#include "engine/immediate.h"
#include "engine/message_parts.h"
#include "engine/transfer_engine.h"
#include "transport/region_table.h"

namespace jaxfabric {
namespace {

constexpr uint32_t kIdsMax = 1u << kIdBits;
// So that their units can be counted in 64 bits.
constexpr uint64_t kTransfersMax = uint64_t{1} << 40;

std::string Label(const std::string& what, std::optional<uint32_t> id) {
  return id ? what + " under id " + std::to_string(*id) : what;
}

Status CheckId(std::optional<uint32_t> id) {
  if (!id || *id < kIdsMax) return OkStatus();
  return Status(StatusCode::kInvalidArgument,
                "id " + std::to_string(*id) + " is not below 2^27");
}

Status OutOfRange(const char* what, uint64_t offset, uint64_t length,
                  uint64_t size) {
  return Status(StatusCode::kOutOfRange,
                std::to_string(length) + " bytes at offset " +
                    std::to_string(offset) + " lie outside the " + what +
                    " region of " + std::to_string(size) + " bytes");
}

// Joins pages that follow each other on both sides.
StatusOr<std::vector<Piece>> PiecesOfPages(const PageList& source,
                                           const PageList& target,
                                           uint64_t page_bytes) {
  if (source.indices.size() != target.indices.size()) {
    return Status(StatusCode::kInvalidArgument,
                  std::to_string(source.indices.size()) + " source pages for " +
                      std::to_string(target.indices.size()) + " target pages");
  }
  std::vector<Piece> pieces;
  for (size_t i = 0; i < source.indices.size(); ++i) {
    Piece piece = {0, 0, page_bytes};
    if (__builtin_mul_overflow(source.indices[i], source.stride,
                               &piece.local_offset) ||
        __builtin_add_overflow(piece.local_offset, source.offset,
                               &piece.local_offset) ||
        __builtin_mul_overflow(target.indices[i], target.stride,
                               &piece.remote_offset) ||
        __builtin_add_overflow(piece.remote_offset, target.offset,
                               &piece.remote_offset)) {
      return Status(StatusCode::kOutOfRange,
                    "page " + std::to_string(i) + " lies beyond 2^64");
    }
    uint64_t local_end = 0;
    uint64_t remote_end = 0;
    uint64_t length = 0;
    Piece* const last = pieces.empty() ? nullptr : &pieces.back();
    if (last != nullptr &&
        !__builtin_add_overflow(last->local_offset, last->length, &local_end) &&
        !__builtin_add_overflow(last->remote_offset, last->length,
                                &remote_end) &&
        !__builtin_add_overflow(last->length, page_bytes, &length) &&
        local_end == piece.local_offset && remote_end == piece.remote_offset) {
      last->length = length;
    } else {
      pieces.push_back(piece);
    }
  }
  return pieces;
}

}  // namespace

TransferEngine::Submitted TransferEngine::SubmitSingleWrite(
    RegionId source, uint64_t source_offset, const RegionAddress& target,
    uint64_t target_offset, uint64_t length, std::optional<uint32_t> id,
    MaybeDeadline deadline) {
  const Piece piece = {source_offset, target_offset, length};
  PendingWrite write = {&target, {&piece, 1}};
  return SubmitWrites({length, id}, source, {&write, 1}, id, deadline);
}

TransferEngine::Submitted TransferEngine::SubmitPagedWrites(
    RegionId source, const PageList& source_pages, const RegionAddress& target,
    const PageList& target_pages, uint64_t page_bytes,
    std::optional<uint32_t> id, MaybeDeadline deadline) {
  std::string label =
      Label("paged write of " + std::to_string(source_pages.indices.size()) +
                " pages of " + std::to_string(page_bytes) + " bytes",
            id);
  auto pieces = PiecesOfPages(source_pages, target_pages, page_bytes);
  if (!pieces.ok()) return pieces.status().Annotate(label);
  PendingWrite write = {&target, *pieces};
  return SubmitWrites(std::move(label), source, {&write, 1}, id, deadline);
}

TransferEngine::Submitted TransferEngine::SubmitScatter(
    RegionId source, const std::vector<ScatterTarget>& targets,
    std::optional<uint32_t> id, MaybeDeadline deadline) {
  std::vector<Piece> pieces;
  pieces.reserve(targets.size());  // the writes point to them
  std::vector<PendingWrite> writes;
  for (const ScatterTarget& target : targets) {
    pieces.push_back(
        {target.source_offset, target.target_offset, target.length});
    writes.push_back({&target.region, {&pieces.back(), 1}});
  }
  return SubmitWrites(
      Label("scatter to " + std::to_string(targets.size()) + " targets", id),
      source, writes, id, deadline);
}

// Fills in the peers of `writes`, and where their regions are mapped. Nothing
// is begun if anything about one of them is wrong.
Status TransferEngine::PrepareLocked(const LocalRegion& source,
                                     std::optional<uint32_t> id,
                                     std::span<PendingWrite> writes) {
  JF_RETURN_IF_ERROR(CheckId(id));
  for (PendingWrite& write : writes) {
    JF_ASSIGN_OR_RETURN(TransferPeer* const peer,
                        FindOwnerLocked(*write.target));
    const MrDesc& memory = write.target->memory;
    if (memory.keys.size() != peer->address.domains.size()) {
      return Status(StatusCode::kInvalidArgument,
                    "the target region has " +
                        std::to_string(memory.keys.size()) + " keys, but " +
                        peer->address.Describe() + " has " +
                        std::to_string(peer->address.domains.size()) +
                        " NICs: its description is not one of that engine's");
    }
    for (const Piece& piece : write.pieces) {
      if (!InRange(piece.local_offset, piece.length, source.length)) {
        return OutOfRange("source", piece.local_offset, piece.length,
                          source.length);
      }
      if (!InRange(piece.remote_offset, piece.length, memory.length)) {
        return OutOfRange("target", piece.remote_offset, piece.length,
                          memory.length);
      }
    }
    if (peer->withdrawn.Find(write.target->id) != nullptr) {
      return Status(StatusCode::kFailedPrecondition,
                    peer->address.Describe() +
                        " unregisters the target region (unregister_memory); "
                        "take the description of another");
    }
    if (id) JF_RETURN_IF_ERROR(spoilt_.Check(peer->address.id, *id));
    write.peer = peer->name;
    if (caps_.direct_store) JF_RETURN_IF_ERROR(FindMappedLocked(&write));
  }
  return OkStatus();
}

TransferEngine::Submitted TransferEngine::SubmitWrites(
    OperationLabel label, RegionId source, std::span<PendingWrite> writes,
    std::optional<uint32_t> id, MaybeDeadline deadline) {
  // It polls below; a device that works in its caller's thread is done by then.
  const DoorbellMute mute(transport_->doorbell());
  std::unique_lock<std::mutex> lock(mutex_);
  auto found = registry_.Find(source);
  if (!found.ok()) return found.status().Annotate(label.ToString());
  MemoryRegistry::Region& region = **found;
  const Status prepared = PrepareLocked(region.local, id, writes);
  if (!prepared.ok()) return prepared.Annotate(label.ToString());
  if (writes.size() == 1) label.peer = peers_.at(writes[0].peer)->title;
  JF_ASSIGN_OR_RETURN(
      const SubmissionPtr submission,
      BeginLocked(SubmissionKind::kWrites, std::move(label), deadline));
  submission->id = id;
  submission->region = source;
  ++region.users;
  for (const PendingWrite& write : writes) {
    uint64_t bytes = 0;
    for (const Piece& piece : write.pieces) bytes += piece.length;
    submission->parts.push_back({.peer = write.peer,
                                 .bytes = bytes,
                                 .open = true,
                                 .target = write.target->id,
                                 .receiver = write.target->owner});
  }
  // One more, so that it does not end before the last is posted.
  submission->open_parts = writes.size() + 1;
  if (caps_.direct_store) {
    CopyAndPost(submission, region.local.base, writes, &lock);
  } else {
    for (size_t i = 0; i < writes.size(); ++i) {
      PostLocked(submission, i, region.local, writes[i]);
    }
  }
  if (--submission->open_parts == 0) {
    FinishLocked(submission,
                 submission->part_failed ? submission->failure : OkStatus());
  }
  // A write over shared memory has ended by now: no need to wait for the
  // worker.
  if (!submission->over) ProgressLocked();
  return submission->future;
}

void TransferEngine::PostLocked(const SubmissionPtr& submission, size_t part,
                                const LocalRegion& local,
                                const PendingWrite& write) {
  // It may have been stopped, or lost its peer, while it was copied.
  if (submission->stopped_ns || !peers_.contains(write.peer)) {
    EndPartLocked(submission, part,
                  Status(StatusCode::kUnavailable,
                         NameLocked(write.peer) + " was lost meanwhile"));
    return;
  }
  if (write.mapped != nullptr && !submission->id) {
    EndPartLocked(submission, part, OkStatus());  // it was all in the copy
    return;
  }
  if (submission->id && write.mapped == nullptr) {
    AnnounceLocked(*peers_.at(write.peer), *submission->id, write);
  }
  const auto posted = group_->SubmitWrite(
      write.peer, local, write.target->memory, write.pieces, submission->id,
      [this, submission, part](const Status& status) {
        EndPartLocked(submission, part, status);
      });
  if (posted.ok()) {
    submission->parts[part].handle = *posted;
  } else {
    EndPartLocked(submission, part, posted.status());
  }
}

void TransferEngine::EndPartLocked(const SubmissionPtr& submission, size_t part,
                                   const Status& status) {
  Submission::Part& ended = submission->parts[part];
  if (submission->over || !ended.open) return;
  ended.open = false;
  const auto found = peers_.find(ended.peer);
  TransferPeer* const peer =
      found == peers_.end() ? nullptr : found->second.get();
  const bool is_write = submission->kind == SubmissionKind::kWrites;
  if (!status.ok()) {
    submission->part_failed = true;
    if (submission->failure.ok()) {
      submission->failure = status.Annotate(submission->future->label() + ": " +
                                            NameLocked(ended.peer));
      if (status.code() == StatusCode::kUnavailable) {
        submission->lost = ended.peer;
      }
    }
    if (is_write && peer != nullptr) ++peer->stats.transfers_failed;
    if (submission->id && spoilt_.TakeNote(ended.peer, *submission->id)) {
      TellSpoiltLocked(ended.receiver, ended.peer, *submission->id);
    }
  } else if (peer != nullptr && is_write) {
    ++peer->stats.transfers_sent;
    peer->stats.transfer_bytes_sent += ended.bytes;
    if (submission->id) ++peer->counted_transfers_sent;
  }
  if (--submission->open_parts == 0) {
    FinishLocked(submission,
                 submission->part_failed ? submission->failure : OkStatus());
  }
  if (is_write) WriteEndedLocked(ended);
}

TransferEngine::Submitted TransferEngine::SubmitSend(uint32_t name,
                                                     const std::string& message,
                                                     MaybeDeadline deadline) {
  std::string label = "send of " + std::to_string(message.size()) + " bytes";
  if (message.size() > kTransferMessageBytesMax) {
    return Status(StatusCode::kInvalidArgument,
                  label + ": a message has up to " +
                      std::to_string(kTransferMessageBytesMax) +
                      " bytes; write what is larger into a region");
  }
  std::lock_guard<std::mutex> lock(mutex_);
  auto found = FindPeerLocked(name);
  if (!found.ok()) return found.status().Annotate(label);
  TransferPeer& peer = **found;
  JF_ASSIGN_OR_RETURN(const SubmissionPtr submission,
                      BeginLocked(SubmissionKind::kSend,
                                  label + " to " + NameLocked(name), deadline));
  std::vector<TransferFrame> frames =
      CutIntoParts(peer.next_message++, message, group_->message_bytes_max());
  ++peer.stats.messages_sent;
  for (const TransferFrame& frame : frames) {
    submission->parts.push_back(
        {.peer = name, .bytes = frame.body.size(), .open = true});
  }
  submission->open_parts = frames.size();
  for (size_t i = 0; i < frames.size(); ++i) {
    group_->SubmitSend(name, frames[i].Encode(),
                       [this, submission, i](const Status& status) {
                         EndPartLocked(submission, i, status);
                       });
  }
  return submission->future;
}

// --- Barriers ---

StatusOr<PeerGroupId> TransferEngine::AddPeerGroup(
    std::vector<uint32_t> peers) {
  std::lock_guard<std::mutex> lock(mutex_);
  std::unordered_set<uint32_t> seen;
  for (const uint32_t peer : peers) {
    JF_RETURN_IF_ERROR(
        FindPeerLocked(peer).status().Annotate("add_peer_group"));
    if (!seen.insert(peer).second) {
      return Status(StatusCode::kInvalidArgument,
                    "add_peer_group: " + NameLocked(peer) + " is there twice");
    }
  }
  const PeerGroupId group = next_group_++;
  groups_[group] = std::move(peers);
  return group;
}

Status TransferEngine::RemovePeerGroup(PeerGroupId group) {
  std::lock_guard<std::mutex> lock(mutex_);
  if (groups_.erase(group) > 0) return OkStatus();
  return Status(StatusCode::kNotFound,
                "there is no peer group " + std::to_string(group));
}

// A count under an id would not do: it has no source, so that the next barrier
// of a fast member would stand for this one of a slow member.
TransferEngine::Submitted TransferEngine::SubmitBarrier(
    PeerGroupId group, uint32_t id, MaybeDeadline deadline) {
  const std::string label = "barrier " + std::to_string(id);
  std::lock_guard<std::mutex> lock(mutex_);
  const auto members = groups_.find(group);
  if (members == groups_.end()) {
    return Status(StatusCode::kNotFound,
                  label + ": there is no peer group " + std::to_string(group));
  }
  for (const uint32_t name : members->second) {
    auto peer = FindPeerLocked(name);
    if (!peer.ok()) return peer.status().Annotate(label);
    if ((*peer)->barriers.size() >= TransferPeer::kBarriersMax &&
        !(*peer)->barriers.contains(id)) {
      return Status(StatusCode::kResourceExhausted,
                    label + ": there are 2^16 other barriers with " +
                        NameLocked(name) + " already; use their ids again");
    }
  }
  JF_ASSIGN_OR_RETURN(const SubmissionPtr submission,
                      BeginLocked(SubmissionKind::kBarrier, label, deadline));
  submission->id = id;
  for (const uint32_t name : members->second) {
    TransferPeer& peer = *peers_.at(name);
    const uint64_t count = ++peer.barriers[id].ours;
    submission->arrivals.push_back({name, count});
    group_->SubmitSend(
        name,
        TransferFrame{
            .type = TransferFrame::Type::kBarrier, .a = id, .b = count}
            .Encode());
  }
  barriers_.push_back(submission);
  CheckBarriersLocked();
  return submission->future;
}

void TransferEngine::CheckBarriersLocked() {
  const auto is_met = [this](const Submission& barrier) {
    return std::all_of(barrier.arrivals.begin(), barrier.arrivals.end(),
                       [&](const Submission::Arrival& arrival) {
                         const auto peer = peers_.find(arrival.peer);
                         return peer != peers_.end() &&
                                peer->second->barriers.at(*barrier.id).theirs >=
                                    arrival.count;
                       });
  };
  std::vector<SubmissionPtr> met;
  for (const SubmissionPtr& barrier : barriers_) {
    if (is_met(*barrier)) met.push_back(barrier);
  }
  for (const SubmissionPtr& barrier : met) FinishLocked(barrier, OkStatus());
}

// --- Counts ---

TransferEngine::Submitted TransferEngine::ExpectImmCount(
    uint32_t id, uint64_t transfers, std::vector<uint32_t> peers,
    MaybeDeadline deadline) {
  const std::string label = "wait for " + std::to_string(transfers) +
                            " transfers under id " + std::to_string(id);
  if (transfers > kTransfersMax) {
    return Status(StatusCode::kInvalidArgument,
                  label + ": at most 2^40 at a time");
  }
  const Status valid = CheckId(id);
  if (!valid.ok()) return valid.Annotate(label);
  std::lock_guard<std::mutex> lock(mutex_);
  const Status spoilt = spoilt_.Check(self_.id, id);
  if (!spoilt.ok()) return spoilt.Annotate(label);
  // One that was lost before may have sent all of it: then there is no wait.
  JF_ASSIGN_OR_RETURN(const SubmissionPtr submission,
                      BeginLocked(SubmissionKind::kExpect, label, deadline));
  submission->id = id;
  submission->transfers = transfers;
  submission->sources = std::move(peers);
  submission->expectation = counters_.Expect(id, transfers, [this, submission] {
    FinishLocked(submission, OkStatus());
  });
  if (submission->expectation == 0) {
    FinishLocked(submission, OkStatus());
    return submission->future;
  }
  for (const uint32_t peer : submission->sources) {
    if (peers_.contains(peer)) continue;
    StopLocked(submission,
               Status(StatusCode::kUnavailable,
                      label + ": " + FindPeerLocked(peer).status().message()));
    break;
  }
  return submission->future;
}

}  // namespace jaxfabric
