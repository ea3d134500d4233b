// TransferEngine: writes into memory that is mapped here, by copying.
//
// The first write into a region has to ask its peer for the memory. A peer that
// is stopped does not answer, and neither who submits nor anybody else's
// operations may wait for that: a task of the pool asks, one for each region,
// and makes the writes that have gathered meanwhile.

#include <cstring>
#include <utility>

#include "base/elastic_pool.h"
#include "engine/transfer_engine.h"

namespace jaxfabric {
namespace {

// So often, a task that waits for an answer looks whether anybody still wants
// it; the engine's end waits for that.
constexpr double kAskSeconds = 0.25;

void Copy(Trace& trace, const Submission& submission, size_t part,
          const PendingWrite& write, const std::byte* source) {
  const TraceScope tracing(trace, [&] {
    return TraceEvent{.name = "copy",
                      .parent = submission.span,
                      .peer = write.peer,
                      .bytes = submission.parts[part].bytes};
  });
  for (const Piece& piece : write.pieces) {
    std::memcpy(write.mapped + piece.remote_offset, source + piece.local_offset,
                piece.length);
  }
}

}  // namespace

// Leaves `mapped` null where the peer has to be asked first.
Status TransferEngine::FindMappedLocked(PendingWrite* write) {
  const MrDesc& memory = write->target->memory;
  const RemoteMemory remote = group_->Locate(write->peer, memory);
  const bool ask =
      remote.domain != nullptr &&
      remote.domain->MapMemory(remote.peer, remote.key, Deadline()).code() ==
          StatusCode::kDeadlineExceeded;
  if (ask) return OkStatus();
  write->mapped = group_->DirectPointer(write->peer, memory, 0, memory.length);
  if (write->mapped != nullptr) return OkStatus();
  return Status(StatusCode::kNotFound,
                NameLocked(write->peer) +
                    " has no such region (any more); was it unregistered?");
}

// What is stored through a mapping only needs its count. Copies run side by
// side, without the lock, and hold up nobody.
void TransferEngine::CopyAndPost(const SubmissionPtr& submission,
                                 const std::byte* source,
                                 std::span<PendingWrite> writes,
                                 std::unique_lock<std::mutex>* lock) {
  for (size_t i = 0; i < writes.size(); ++i) {
    const PendingWrite& write = writes[i];
    if (write.mapped != nullptr) {
      ++mapped_.copies[write.peer];
      continue;
    }
    const RemoteMemory remote =
        group_->Locate(write.peer, write.target->memory);
    const auto [waiting, is_new] =
        mapped_.waiting.try_emplace({write.peer, remote.key});
    submission->parts[i].unmapped = true;
    waiting->second.push_back({submission,
                               i,
                               source,
                               *write.target,
                               {write.pieces.begin(), write.pieces.end()}});
    if (!is_new) continue;
    ++mapped_.copies[write.peer];  // it stays in its Domain meanwhile
    ++mapped_.tasks;
    ElasticPool::Get().Post(
        [this, peer = write.peer, remote] { MapAndWrite(peer, remote); });
  }
  lock->unlock();
  for (size_t i = 0; i < writes.size(); ++i) {
    PendingWrite& write = writes[i];
    if (write.mapped == nullptr) continue;
    Copy(group_->trace(), *submission, i, write, source);
    write.pieces = {};
  }
  lock->lock();
  for (size_t i = 0; i < writes.size(); ++i) {
    const PendingWrite& write = writes[i];
    if (write.mapped == nullptr) continue;
    PostLocked(submission, i, {}, write);
    EndCopyLocked(write.peer);
  }
}

void TransferEngine::MapAndWrite(uint32_t peer, RemoteMemory remote) {
  std::unique_lock<std::mutex> lock(mutex_, std::defer_lock);
  std::vector<UnmappedWrite> waiting;
  Status mapped;
  for (;;) {
    mapped = remote.domain->MapMemory(remote.peer, remote.key,
                                      Deadline::AfterSeconds(kAskSeconds));
    lock.lock();
    const auto found = mapped_.waiting.find({peer, remote.key});
    std::erase_if(found->second, [](const UnmappedWrite& write) {
      return !write.submission->parts[write.part].unmapped;
    });
    const bool wanted = !found->second.empty();
    if (!wanted || mapped.code() != StatusCode::kDeadlineExceeded) {
      waiting = std::move(found->second);
      mapped_.waiting.erase(found);
      break;
    }
    lock.unlock();
  }
  std::vector<PendingWrite> writes;
  for (const UnmappedWrite& one : waiting) {
    PendingWrite write = {
        .target = &one.target, .pieces = one.pieces, .peer = peer};
    Status found = mapped.ok() ? FindMappedLocked(&write) : mapped;
    if (found.ok() && write.mapped == nullptr) {
      found = Status(StatusCode::kNotFound,
                     NameLocked(peer) + " has just unregistered the region");
    }
    one.submission->parts[one.part].unmapped = false;
    if (!found.ok()) EndPartLocked(one.submission, one.part, found);
    writes.push_back(write);
  }
  lock.unlock();
  for (size_t i = 0; i < writes.size(); ++i) {
    if (writes[i].mapped != nullptr) {
      const UnmappedWrite& one = waiting[i];
      Copy(group_->trace(), *one.submission, one.part, writes[i], one.source);
    }
    writes[i].pieces = {};
  }
  lock.lock();
  for (size_t i = 0; i < writes.size(); ++i) {
    if (writes[i].mapped == nullptr) continue;
    PostLocked(waiting[i].submission, waiting[i].part, {}, writes[i]);
  }
  EndCopyLocked(peer);
  ProgressLocked();
  --mapped_.tasks;
}

}  // namespace jaxfabric
