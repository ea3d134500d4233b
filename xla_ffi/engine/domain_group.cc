#include "engine/domain_group.h"

#include <algorithm>
#include <array>
#include <utility>

#include "engine/immediate.h"

namespace jaxfabric {
namespace {

constexpr size_t kPollBatch = 64;
constexpr uint64_t kMessageCookie = 0;

// Cuts pieces at `chunk_bytes`. There is at least one chunk, so that a transfer
// of no bytes is counted too.
std::vector<Piece> CutIntoChunks(const std::vector<Piece>& pieces,
                                 uint64_t chunk_bytes) {
  std::vector<Piece> chunks;
  for (const Piece& piece : pieces) {
    for (uint64_t begin = 0; begin < piece.length; begin += chunk_bytes) {
      chunks.push_back({piece.local_offset + begin, piece.remote_offset + begin,
                        std::min(chunk_bytes, piece.length - begin)});
    }
  }
  if (chunks.empty()) {
    const uint64_t remote = pieces.empty() ? 0 : pieces[0].remote_offset;
    chunks.push_back({0, remote, 0});
  }
  return chunks;
}

}  // namespace

DomainGroup::DomainGroup(std::vector<std::unique_ptr<Domain>> domains)
    : domains_(std::move(domains)),
      open_chunks_(domains_.size(), 0),
      names_(domains_.size()) {
  JF_CHECK(!domains_.empty() && domains_.size() <= kDomainsMax);
}

std::vector<NetAddr> DomainGroup::addresses() const {
  std::vector<NetAddr> addresses;
  for (const auto& domain : domains_) addresses.push_back(domain->address());
  return addresses;
}

StatusOr<std::vector<uint64_t>> DomainGroup::RegisterMemory(
    const MemoryRegion& region) {
  std::vector<uint64_t> keys;
  for (const auto& domain : domains_) {
    JF_ASSIGN_OR_RETURN(const uint64_t key, domain->RegisterMemory(region));
    keys.push_back(key);
  }
  return keys;
}

Status DomainGroup::AddPeer(uint32_t name,
                            const std::vector<NetAddr>& addresses,
                            Deadline deadline) {
  if (addresses.empty() || addresses.size() > kDomainsMax) {
    return Status(
        StatusCode::kInvalidArgument,
        "a peer has 1 to 8 addresses, not " + std::to_string(addresses.size()));
  }
  Peer peer;
  for (size_t i = 0; i < domains_.size(); ++i) {
    const uint32_t remote = static_cast<uint32_t>(i % addresses.size());
    JF_ASSIGN_OR_RETURN(const PeerId id,
                        domains_[i]->AddPeer(addresses[remote], deadline));
    peer.links.push_back({id, remote});
    names_[i][id] = name;
  }
  // Domains of theirs that we do not write to still write to us.
  for (size_t j = domains_.size(); j < addresses.size(); ++j) {
    const size_t i = j % domains_.size();
    JF_ASSIGN_OR_RETURN(const PeerId id,
                        domains_[i]->AddPeer(addresses[j], deadline));
    names_[i][id] = name;
  }
  if (peers_.emplace(name, std::move(peer)).second) turn_.push_back(name);
  return OkStatus();
}

Status DomainGroup::SubmitWrite(uint32_t name, const LocalRegion& local,
                                const MrDesc& remote,
                                const std::vector<Piece>& pieces, uint32_t id,
                                Done done) {
  const auto found = peers_.find(name);
  if (found == peers_.end() || found->second.lost) {
    return Status(StatusCode::kUnavailable,
                  "rank " + std::to_string(name) + " is not connected");
  }
  uint64_t chunk_bytes = caps().write_bytes_max;
  if (domains_.size() > 1) chunk_bytes = std::min(chunk_bytes, kChunkBytes);
  auto transfer = std::make_shared<Transfer>(
      Transfer{.peer = name,
               .local = local,
               .remote = remote,
               .chunks = CutIntoChunks(pieces, chunk_bytes),
               .id = id,
               .done = std::move(done),
               .status = OkStatus()});
  if (transfer->chunks.size() > kWritesPerTransferMax) {
    return Status(StatusCode::kInvalidArgument,
                  "a transfer of " + std::to_string(transfer->chunks.size()) +
                      " writes; at most 2^20 can be counted as one");
  }
  found->second.queue.push_back(std::move(transfer));
  Pump();
  return OkStatus();
}

void DomainGroup::SubmitSend(uint32_t name, std::string message) {
  const auto found = peers_.find(name);
  if (found == peers_.end() || found->second.lost) return;
  found->second.messages.push_back(std::move(message));
  PumpMessages(name, found->second);
}

std::byte* DomainGroup::DirectPointer(uint32_t name, const MrDesc& remote,
                                      uint64_t offset, uint64_t length) {
  const auto found = peers_.find(name);
  if (found == peers_.end() || found->second.lost) return nullptr;
  const Link& link = found->second.links[0];
  return domains_[0]->DirectPointer(
      link.id, {remote.keys[link.remote_domain], remote.base, offset}, length);
}

bool DomainGroup::PumpMessages(uint32_t, Peer& peer) {
  bool moved = false;
  while (!peer.messages.empty()) {
    auto posted = domains_[0]->PostSend(peer.links[0].id, peer.messages.front(),
                                        kMessageCookie);
    if (posted.ok() && *posted == Posted::kAgain) break;
    if (posted.ok()) ++open_messages_;
    peer.messages.pop_front();  // a failed one is noticed as a lost peer
    moved = true;
  }
  return moved;
}

bool DomainGroup::PostChunk(Peer& peer, size_t domain) {
  const std::shared_ptr<Transfer> transfer = peer.queue.front();
  const uint32_t index = transfer->next;
  const Piece& chunk = transfer->chunks[index];
  const Link& link = peer.links[domain];
  const Immediate immediate = {
      transfer->id,
      ShareOfWrite(index, static_cast<uint32_t>(transfer->chunks.size()))};
  LocalSpan source;
  if (chunk.length > 0) {
    source = {transfer->local.base + chunk.local_offset,
              transfer->local.keys[domain]};
  }
  const uint64_t cookie = next_cookie_;
  auto posted = domains_[domain]->PostWriteImm(
      link.id, source,
      {transfer->remote.keys[link.remote_domain], transfer->remote.base,
       chunk.remote_offset},
      chunk.length, immediate.Encode(), cookie);
  if (!posted.ok()) {
    peer.queue.pop_front();
    transfer->next = static_cast<uint32_t>(transfer->chunks.size());
    Retire(transfer, posted.status());
    return true;
  }
  if (*posted == Posted::kAgain) return false;
  ++next_cookie_;
  open_[cookie] = transfer;
  ++open_chunks_[domain];
  ++transfer->open;
  if (++transfer->next == transfer->chunks.size()) peer.queue.pop_front();
  return true;
}

bool DomainGroup::Pump() {
  bool moved = false;
  for (size_t domain = 0; domain < domains_.size(); ++domain) {
    size_t refusals = 0;  // peers in a row that had nothing or no room
    while (open_chunks_[domain] < kWindowChunks && refusals < turn_.size()) {
      Peer& peer = peers_[turn_[turn_next_++ % turn_.size()]];
      if (peer.queue.empty() || !PostChunk(peer, domain)) {
        ++refusals;
      } else {
        refusals = 0;
        moved = true;
      }
    }
  }
  return moved;
}

void DomainGroup::Retire(const std::shared_ptr<Transfer>& transfer,
                         Status status) {
  if (transfer->status.ok()) transfer->status = std::move(status);
  // The source may be reused only once the last open write is over, also when
  // the first has failed.
  if (transfer->open == 0 && transfer->next == transfer->chunks.size() &&
      transfer->done) {
    Done done = std::exchange(transfer->done, nullptr);
    done(transfer->status);
  }
}

void DomainGroup::LosePeer(uint32_t name, const Status& status,
                           std::vector<Event>* events) {
  Peer& peer = peers_[name];
  if (std::exchange(peer.lost, true)) return;
  peer.messages.clear();
  for (const auto& transfer : std::exchange(peer.queue, {})) {
    transfer->next = static_cast<uint32_t>(transfer->chunks.size());
    Retire(transfer, status);
  }
  events->push_back({Event::Kind::kPeerLost, name, 0, "", status});
}

void DomainGroup::Handle(size_t domain, Completion& completion,
                         std::vector<Event>* events) {
  using Kind = Completion::Kind;
  if (completion.kind == Kind::kWriteDone || completion.kind == Kind::kError ||
      completion.kind == Kind::kSendDone) {
    if (completion.cookie == kMessageCookie) --open_messages_;
    const auto found = open_.find(completion.cookie);
    if (found == open_.end()) return;  // a message's, or not ours
    const std::shared_ptr<Transfer> transfer = std::move(found->second);
    open_.erase(found);
    --open_chunks_[domain];
    --transfer->open;
    // Only an error sets it: else it is what an earlier completion left there.
    Retire(transfer,
           completion.kind == Kind::kError ? completion.status : OkStatus());
    return;
  }
  const auto name = names_[domain].find(completion.peer);
  if (name == names_[domain].end()) return;  // nobody that we added
  if (completion.kind == Kind::kImmediate) {
    events->push_back({Event::Kind::kImmediate, name->second,
                       completion.immediate, "", OkStatus()});
  } else if (completion.kind == Kind::kMessage) {
    events->push_back({Event::Kind::kMessage, name->second, 0,
                       std::move(completion.message), OkStatus()});
  } else if (completion.kind == Kind::kPeerLost) {
    LosePeer(name->second, completion.status, events);
  }
}

bool DomainGroup::Idle() const {
  return open_messages_ == 0 &&
         std::all_of(peers_.begin(), peers_.end(), [](const auto& item) {
           return item.second.messages.empty();
         });
}

bool DomainGroup::Poll(std::vector<Event>* events) {
  bool moved = false;
  std::array<Completion, kPollBatch> completions;
  for (size_t domain = 0; domain < domains_.size(); ++domain) {
    const size_t count = domains_[domain]->Poll(completions);
    for (size_t i = 0; i < count; ++i) {
      Handle(domain, completions[i], events);
    }
    moved |= count > 0;
  }
  for (auto& [name, peer] : peers_) {
    if (!peer.messages.empty()) moved |= PumpMessages(name, peer);
  }
  if (!turn_.empty()) moved |= Pump();
  return moved;
}

}  // namespace jaxfabric
