#include "engine/domain_group.h"

#include <algorithm>
#include <iterator>
#include <string_view>
#include <utility>

#include "base/check.h"

namespace jaxfabric {
namespace {

constexpr size_t kPollBatch = 64;

Status NotConnected(uint32_t name) {
  return Status(StatusCode::kUnavailable,
                "rank " + std::to_string(name) + " is not connected");
}

}  // namespace

DomainGroup::DomainGroup(std::vector<std::unique_ptr<Domain>> domains,
                         int64_t (*clock_ns)())
    : domains_(std::move(domains)),
      clock_ns_(clock_ns),
      completions_(kPollBatch),
      stats_(domains_.size()),
      queues_(domains_.size()),
      names_(domains_.size()) {
  JF_CHECK(!domains_.empty() && domains_.size() <= kDomainsMax);
}

std::vector<NetAddr> DomainGroup::addresses() const {
  std::vector<NetAddr> addresses;
  for (const auto& domain : domains_) addresses.push_back(domain->address());
  return addresses;
}

std::vector<DomainStats> DomainGroup::stats() const {
  std::vector<DomainStats> stats = stats_;
  for (size_t i = 0; i < stats.size(); ++i) {
    stats[i].refused_frames = domains_[i]->refused_frames();
  }
  return stats;
}

size_t DomainGroup::message_bytes_max() const {
  size_t bytes = caps().message_bytes_max;
  for (const auto& domain : domains_) {
    bytes = std::min<size_t>(bytes, domain->caps().message_bytes_max);
  }
  return bytes - std::min(bytes, LinkFrame::kHeaderBytes);
}

StatusOr<std::vector<uint64_t>> DomainGroup::RegisterMemory(
    const MemoryRegion& region) {
  std::vector<uint64_t> keys;
  for (const auto& domain : domains_) {
    const StatusOr<uint64_t> key = domain->RegisterMemory(region);
    if (!key.ok()) {
      for (size_t i = 0; i < keys.size(); ++i) {
        (void)domains_[i]->UnregisterMemory(keys[i]);
      }
      return key.status();
    }
    keys.push_back(*key);
  }
  return keys;
}

Status DomainGroup::UnregisterMemory(const std::vector<uint64_t>& keys) {
  if (keys.size() != domains_.size()) {
    return Status(StatusCode::kInvalidArgument,
                  std::to_string(keys.size()) + " keys for " +
                      std::to_string(domains_.size()) + " Domains");
  }
  for (const auto& [handle, transfer] : transfers_) {
    if (transfer->local.keys == keys) {
      return Status(StatusCode::kFailedPrecondition,
                    "a transfer to peer " + std::to_string(transfer->peer) +
                        " still reads this memory; wait for it, or cancel it");
    }
  }
  Status status;
  for (size_t i = 0; i < keys.size(); ++i) {
    const Status one = domains_[i]->UnregisterMemory(keys[i]);
    if (status.ok()) status = one;
  }
  return status;
}

GroupPeer* DomainGroup::FindPeer(uint32_t name) {
  const auto found = peers_.find(name);
  if (found == peers_.end() || found->second->over) return nullptr;
  return found->second.get();
}

Status DomainGroup::AddPeer(uint32_t name,
                            const std::vector<NetAddr>& addresses,
                            Deadline deadline) {
  if (addresses.empty() || addresses.size() > kDomainsMax) {
    return Status(
        StatusCode::kInvalidArgument,
        "a peer has 1 to 8 addresses, not " + std::to_string(addresses.size()));
  }
  if (peers_.contains(name)) return OkStatus();
  auto peer = std::make_shared<GroupPeer>();
  peer->name = name;
  const size_t links = std::max(domains_.size(), addresses.size());
  for (size_t k = 0; k < links; ++k) {
    Link link;
    link.number = static_cast<uint8_t>(k);
    link.domain = static_cast<uint32_t>(k % domains_.size());
    link.remote_domain = static_cast<uint32_t>(k % addresses.size());
    link.address = addresses[link.remote_domain];
    const auto id = domains_[link.domain]->AddPeer(link.address, deadline);
    if (!id.ok()) {
      Leave(*peer);
      return id.status();
    }
    const auto taken = names_[link.domain].find(*id);
    if (taken != names_[link.domain].end() && !taken->second.peer->over) {
      Leave(*peer);
      // Where memory is mapped, one that was lost stays until the copies into
      // its memory have ended: what comes back has to wait for them.
      return Status(caps().direct_store ? StatusCode::kDeadlineExceeded
                                        : StatusCode::kPermissionDenied,
                    "one of its addresses is that of another peer, " +
                        std::to_string(taken->second.peer->name));
    }
    link.id = *id;
    peer->links.push_back(std::move(link));
  }
  peer->fences = links > 1;
  for (const Link& link : peer->links) {
    names_[link.domain][link.id] = {peer, link.number};
    const DomainCaps& caps = domains_[link.domain]->caps();
    peer->fences &= caps.removal_fences && caps.immediate_names_peer;
  }
  fences_ |= peer->fences;
  Share(*peer, /*joins=*/true);
  peers_[name] = peer;
  turn_.push_back(peer);
  return OkStatus();
}

// Removes it from the Domains, where it has not come back under another name.
void DomainGroup::Leave(const GroupPeer& peer) {
  for (const Link& link : peer.links) {
    auto& names = names_[link.domain];
    const auto found = names.find(link.id);
    if (found != names.end() && found->second.peer.get() != &peer) continue;
    domains_[link.domain]->RemovePeer(link.id);
    if (found != names.end()) names.erase(found);
  }
}

void DomainGroup::RemovePeer(uint32_t name) {
  const auto found = peers_.find(name);
  if (found == peers_.end()) return;
  const GroupPeerPtr peer = found->second;
  peers_.erase(found);
  std::erase(turn_, peer);
  Leave(*peer);
  // What is open ends by itself, and with it the rest of its transfers.
  EndPeer(*peer, Status(StatusCode::kCancelled,
                        "peer " + std::to_string(name) + " was removed"));
  RunEnded();
}

void DomainGroup::FenceRemoved() {
  for (const auto& domain : domains_) domain->FenceRemoved();
}

bool DomainGroup::RemovedAreFenced() const {
  return std::all_of(domains_.begin(), domains_.end(), [](const auto& domain) {
    return domain->RemovedAreFenced();
  });
}

StatusOr<TransferHandle> DomainGroup::SubmitWrite(
    uint32_t name, const LocalRegion& local, const MrDesc& remote,
    std::span<const Piece> pieces, std::optional<uint32_t> id, Done done) {
  GroupPeer* const peer = FindPeer(name);
  if (peer == nullptr) return NotConnected(name);
  if (id && peer->quarantined.contains(*id)) {
    return Status(StatusCode::kFailedPrecondition,
                  "an earlier transfer under this id ended badly when it was "
                  "partly sent; take another id");
  }
  uint64_t write_bytes_max = caps().write_bytes_max;
  uint32_t pieces_max = caps().write_pieces_max;
  for (const auto& domain : domains_) {
    write_bytes_max = std::min(write_bytes_max, domain->caps().write_bytes_max);
    pieces_max = std::min(pieces_max, domain->caps().write_pieces_max);
  }
  auto transfer = std::make_shared<Transfer>();
  transfer->id = id;
  JF_RETURN_IF_ERROR(CutIntoChunks(pieces, peer->links.size(), write_bytes_max,
                                   pieces_max, transfer.get()));
  uint64_t bytes = 0;
  for (const Piece& piece : pieces) bytes += piece.length;
  transfer->peer = name;
  transfer->local = local;
  transfer->remote = remote;
  transfer->done = std::move(done);
  transfer->handle = next_handle_++;
  transfer->small = bytes <= kSplitBytes;
  transfer->span = trace_.Begin([&] {
    return TraceEvent{
        .name = "transfer", .peer = name, .id = id, .bytes = bytes};
  });
  const TransferHandle handle = transfer->handle;
  transfers_[handle] = transfer;
  peer->waiting_bytes += bytes;
  peer->QueueOf(*transfer).push_back(std::move(transfer));
  Pump();
  RunEnded();
  return handle;
}

bool DomainGroup::Cancel(TransferHandle handle) {
  const auto found = transfers_.find(handle);
  if (found == transfers_.end()) return false;
  const std::shared_ptr<Transfer> transfer = found->second;
  FailTransfer(FindPeer(transfer->peer), transfer,
               Status(StatusCode::kCancelled,
                      "the transfer to peer " + std::to_string(transfer->peer) +
                          " was cancelled"));
  RunEnded();
  return true;
}

void DomainGroup::ReleaseId(uint32_t name, uint32_t id) {
  if (GroupPeer* const peer = FindPeer(name)) peer->quarantined.erase(id);
}

void DomainGroup::SubmitSend(uint32_t name, std::string message, Done done) {
  if (FindPeer(name) == nullptr) {
    ended_.emplace_back(std::move(done), NotConnected(name));
  } else {
    const GroupPeerPtr peer = peers_.at(name);
    peer->messages.push_back({std::move(message), std::move(done)});
    PumpMessages(peer);
  }
  RunEnded();
}

RemoteMemory DomainGroup::Locate(uint32_t name, const MrDesc& remote) {
  const GroupPeer* const peer = FindPeer(name);
  if (peer == nullptr) return {};
  const Link& link = peer->links[0];
  return {domains_[0].get(), link.id, remote.keys[link.remote_domain]};
}

std::byte* DomainGroup::DirectPointer(uint32_t name, const MrDesc& remote,
                                      uint64_t offset, uint64_t length) {
  const RemoteMemory memory = Locate(name, remote);
  if (memory.domain == nullptr) return nullptr;
  return memory.domain->DirectPointer(
      memory.peer, {memory.key, remote.base, offset}, length);
}

bool DomainGroup::Idle() const {
  return open_messages_ == 0 &&
         std::all_of(turn_.begin(), turn_.end(),
                     [](const auto& peer) { return peer->messages.empty(); });
}

void DomainGroup::RunEnded() {
  while (!ended_.empty()) {
    auto [done, status] = std::move(ended_.front());
    ended_.pop_front();
    if (done) done(std::move(status));
  }
}

void DomainGroup::HandleWriteEnd(OpenPost& post, Link& link,
                                 const Status& status) {
  const Chunk& chunk = post.write.transfer->chunks[post.write.chunk];
  DomainStats& stats = stats_[link.domain];
  trace_.End(post.span, status.code());
  if (post.peer->links.size() > 1) {
    const bool full = !HasRoom(link, std::max<uint64_t>(1, chunk.bytes));
    if (status.ok()) {
      link.rate.Done(chunk.bytes, now_ns_, full || chunk.bytes >= kSplitBytes);
    }
    link.progress_ns = now_ns_;
  }
  --link.open_writes;
  if (!post.peer->over) CountBorrowed(link);
  link.open_bytes -= chunk.bytes;
  --stats.open_writes;
  if (status.ok()) {
    ++stats.writes;
    stats.write_bytes += chunk.bytes;
    link.backoff_ns = 0;
    CloseWrite(*post.peer, post.write, OkStatus());
  } else if (post.peer->over) {
    CloseWrite(*post.peer, post.write, post.peer->end);
  } else if (IsOfThePost(status)) {
    if (chunk.immediate) link.sent.Take(KeyOfImmediate(*chunk.immediate));
    CloseWrite(*post.peer, post.write, status);
  } else if (post.peer->fences && link.state != Link::State::kDead) {
    link.uncertain.push_back(post.write);
    FailLink(post.peer, link, status);
  } else if (post.peer->links.size() > 1) {
    CloseWrite(*post.peer, post.write,
               Status(StatusCode::kUnknown,
                      "it may have arrived or not, and nobody can tell: " +
                          status.message()));
  } else {
    CloseWrite(*post.peer, post.write, status);
  }
}

void DomainGroup::HandleMessageEnd(OpenPost& post, const Status& status) {
  Link& link = post.peer->links[post.link];
  GroupMessage& message = *post.message;
  if (!status.ok() && !post.peer->over && post.peer->fences &&
      !IsOfThePost(status)) {
    post.peer->messages.push_front(std::move(message));
    FailLink(post.peer, link, status);
    return;
  }
  post.peer->open_messages.erase(message.number);
  if (status.ok() && post.peer->fences) {
    ++link.messages_sent;
    link.delivered.push_back({std::move(message.bytes), {}, message.number});
    if (link.delivered.size() > Link::kDeliveredMax) link.delivered.pop_front();
  }
  ended_.emplace_back(std::move(message.done), status.ok() || !post.peer->over
                                                   ? status
                                                   : post.peer->end);
  if (status.ok() || post.peer->links.size() == 1 || IsOfThePost(status)) {
    return;
  }
  // Nobody can tell whether it came, and what follows may not make sense
  // without it.
  LosePeer(*post.peer, status.Annotate("a message may be lost with its link"));
}

void DomainGroup::HandleEnd(size_t domain, const Completion& completion) {
  auto node = open_.extract(completion.cookie);
  if (!node) return;
  OpenPost& post = node.mapped();
  Link& link = post.peer->links[post.link];
  --queues_[domain].posts;
  // Only an error sets it: else it is what an earlier completion left there.
  const bool failed = completion.kind == Completion::Kind::kError;
  const Status status = failed ? completion.status : OkStatus();
  stats_[domain].errors += failed;
  if (post.kind == OpenPost::Kind::kWrite) {
    HandleWriteEnd(post, link, status);
    return;
  }
  --link.open_messages;
  if (!failed) link.progress_ns = now_ns_;
  if (post.kind == OpenPost::Kind::kMessage) {
    --open_messages_;
    stats_[domain].messages += !failed;
    HandleMessageEnd(post, status);
  } else if (failed && post.peer->fences && !post.peer->over) {
    FailLink(post.peer, link, status);
  }
}

void DomainGroup::HandleMessage(const GroupPeerPtr& peer, Link& link,
                                std::string bytes) {
  const auto frame = LinkFrame::Decode(bytes);
  link.messages_received += frame && frame->type == LinkFrame::Type::kMessage;
  if (!frame) {
    ++stats_[link.domain].malformed_dropped;
  } else if (frame->type != LinkFrame::Type::kMessage) {
    if (peer->fences && !peer->over) HandleFrame(peer, link, *frame);
  } else if (!peer->fences || peer->arrived_messages.Accept(frame->number)) {
    bytes.erase(0, LinkFrame::kHeaderBytes);
    news_.push_back(
        {Event::Kind::kMessage, peer->name, 0, std::move(bytes), OkStatus()});
  }
}

void DomainGroup::HandleStranger(size_t domain, Completion& completion) {
  if (completion.kind == Completion::Kind::kMessage) {
    const auto frame = LinkFrame::Decode(completion.message);
    if (!frame || frame->type != LinkFrame::Type::kMessage) {
      ++stats_[domain].malformed_dropped;
      return;
    }
    completion.message.erase(0, LinkFrame::kHeaderBytes);
    news_.push_back({Event::Kind::kStranger, kUnknownPeer, 0,
                     std::move(completion.message), OkStatus()});
  } else if (completion.kind == Completion::Kind::kImmediate) {
    if (domains_[domain]->caps().immediate_names_peer) {
      ++stats_[domain].strangers_dropped;
    } else {
      news_.push_back({Event::Kind::kImmediate, kUnknownPeer,
                       completion.immediate, "", OkStatus()});
    }
  }
}

void DomainGroup::HandleArrival(size_t domain, Completion& completion) {
  const auto found = names_[domain].find(completion.peer);
  if (found == names_[domain].end()) {
    HandleStranger(domain, completion);
    return;
  }
  const GroupPeerPtr peer = found->second.peer;
  Link& link = peer->links[found->second.link];
  if (completion.kind == Completion::Kind::kMessage) {
    HandleMessage(peer, link, std::move(completion.message));
  } else if (completion.kind == Completion::Kind::kImmediate) {
    const LinkCount count = KeyOfImmediate(completion.immediate);
    if (peer->fences) link.received.Add(count);
    if (peer->fences && (count.key & kRepairKey) != 0) {
      CountRepairWrites(peer, count.key & ~kRepairKey, 1);
    } else {
      news_.push_back({Event::Kind::kImmediate, peer->name,
                       completion.immediate, "", OkStatus()});
    }
  } else if (completion.kind == Completion::Kind::kPeerLost &&
             completion.peer == link.id) {
    FailLink(peer, link, completion.status);
  }
}

bool DomainGroup::PollDomain(size_t domain) {
  using Kind = Completion::Kind;
  JF_CHECK(!std::exchange(polling_, true));  // nothing in here may call Poll
  const size_t count = domains_[domain]->Poll(completions_);
  if (count > 0) now_ns_ = clock_ns_();
  for (size_t i = 0; i < count; ++i) {
    Completion& completion = completions_[i];
    if (completion.kind == Kind::kWriteDone ||
        completion.kind == Kind::kError || completion.kind == Kind::kSendDone) {
      HandleEnd(domain, completion);
    } else {
      HandleArrival(domain, completion);
    }
  }
  polling_ = false;
  polled_ |= count > 0;
  return count == completions_.size();
}

bool DomainGroup::Poll(std::vector<Event>* events) {
  polled_ = false;
  for (size_t domain = 0; domain < domains_.size(); ++domain) {
    PollDomain(domain);
  }
  if (fences_) Attend();
  bool moved = polled_;
  for (size_t i = 0; i < turn_.size(); ++i) {
    if (!turn_[i]->messages.empty()) moved |= PumpMessages(turn_[i]);
  }
  moved |= Pump();
  moved |= !news_.empty();
  std::move(news_.begin(), news_.end(), std::back_inserter(*events));
  news_.clear();
  RunEnded();
  return moved;
}

}  // namespace jaxfabric
