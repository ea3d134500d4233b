#include "transport/shm.h"

#include <atomic>
#include <cstring>
#include <deque>
#include <mutex>
#include <string>
#include <unordered_map>
#include <utility>
#include <vector>

#include "base/check.h"
#include "transport/region_table.h"
#include "transport/shm_address.h"
#include "transport/shm_ring.h"
#include "transport/shm_switchboard.h"

namespace jaxfabric {
namespace {

// The peer's control thread answers at once unless its process is stopped.
constexpr double kMapRegionSeconds = 5;
constexpr uint64_t kWriteBytesMax = uint64_t{1} << 40;

struct Peer {
  ShmAddress address;
  ShmAttachment attachment;
  ShmRingWriter ring{nullptr};
  Doorbell doorbell{nullptr};
  Status lost;  // not OK: nothing goes there any more
  std::unordered_map<uint64_t, std::shared_ptr<ShmMapping>> mappings;
  // What DirectPointer gave out; guarded by ShmDomain::direct_mutex_.
  std::unordered_map<uint64_t, std::shared_ptr<ShmMapping>> direct;
};

// The consuming end of a ring.
struct Arrivals {
  std::shared_ptr<ShmIncomingRing> ring;
  ShmRingReader reader;
  PeerId peer = kUnknownPeer;
};

class ShmDomain final : public Domain {
 public:
  explicit ShmDomain(ShmSwitchboard* board)
      : board_(board),
        address_(board->Enter(&inbox_)),
        net_addr_(ToNetAddr(address_)) {}

  ~ShmDomain() override {
    for (PeerId id = 0; id < peers_.size(); ++id) RemovePeer(id);
    for (const auto& [key, region] : regions_) board_->RemoveRegion(key);
    board_->Leave(address_);
  }

  const DomainCaps& caps() const override { return caps_; }
  const NetAddr& address() const override { return net_addr_; }

  StatusOr<uint64_t> RegisterMemory(const MemoryRegion& region) override;
  Status UnregisterMemory(uint64_t key) override;
  StatusOr<PeerId> AddPeer(const NetAddr& net_addr, Deadline deadline) override;
  void RemovePeer(PeerId peer) override;
  StatusOr<Posted> PostWriteImm(PeerId peer, LocalSpan local, RemoteSpan remote,
                                uint64_t length,
                                std::optional<uint32_t> immediate,
                                uint64_t cookie) override;
  StatusOr<Posted> PostSend(PeerId peer, std::string_view message,
                            uint64_t cookie) override;
  size_t Poll(std::span<Completion> completions) override;
  Status MapMemory(PeerId peer, uint64_t key, Deadline deadline) override;
  std::byte* DirectPointer(PeerId peer, RemoteSpan remote,
                           uint64_t length) override;

 private:
  struct Done {
    Completion::Kind kind;
    PeerId peer;
    uint64_t cookie;
  };

  StatusOr<Peer*> FindPeer(PeerId peer);
  StatusOr<ShmMapping*> Mapping(Peer& peer, uint64_t key);
  // Whether a notice to `peer` can be posted now.
  StatusOr<Posted> Room(PeerId id, Peer& peer, bool needs_ring);
  void Finish(Completion::Kind kind, PeerId peer, uint64_t cookie);
  void Lose(PeerId peer, Status why);
  PeerId IdOf(const ShmAddress& address) const;

  void TakeNews();
  size_t PollDone(std::span<Completion> completions);
  size_t PollRings(std::span<Completion> completions);
  size_t PollLosses(std::span<Completion> completions);

  ShmSwitchboard* const board_;
  ShmInbox inbox_;
  const ShmAddress address_;
  const NetAddr net_addr_;
  const DomainCaps caps_ = {.transport = "shm",
                            .write_bytes_max = kWriteBytesMax,
                            .message_bytes_max = kShmMessageBytes,
                            .queue_depth = kShmRingEntries,
                            .address_mode = AddressMode::kOffset,
                            .direct_store = true};
  RegionTable regions_;
  // Indexed by PeerId; null once removed. Changed by the owner, under
  // direct_mutex_, which DirectPointer takes to read it from any thread.
  std::vector<std::unique_ptr<Peer>> peers_;
  std::mutex direct_mutex_;
  std::vector<Arrivals> arrivals_;
  size_t next_arrivals_ = 0;  // where PollRings goes on, for fairness
  std::deque<Done> done_;
  std::vector<PeerId> losses_;  // not yet reported
};

StatusOr<uint64_t> ShmDomain::RegisterMemory(const MemoryRegion& region) {
  JF_ASSIGN_OR_RETURN(const uint64_t key, board_->AddRegion(address_, region));
  regions_.Add(key, region);
  return key;
}

Status ShmDomain::UnregisterMemory(uint64_t key) {
  if (!regions_.Remove(key)) {
    return Status(StatusCode::kNotFound,
                  "the key to unregister is not registered with this Domain");
  }
  board_->RemoveRegion(key);
  return OkStatus();
}

StatusOr<PeerId> ShmDomain::AddPeer(const NetAddr& net_addr,
                                    Deadline deadline) {
  JF_ASSIGN_OR_RETURN(const ShmAddress address, ParseShmAddress(net_addr));
  const PeerId known = IdOf(address);
  if (known != kUnknownPeer) {
    JF_RETURN_IF_ERROR(peers_[known]->lost);
    return known;
  }
  auto peer = std::make_unique<Peer>();
  JF_ASSIGN_OR_RETURN(peer->attachment,
                      board_->Attach(address_, &inbox_, address, deadline));
  peer->address = address;
  peer->ring = ShmRingWriter(peer->attachment.ring);
  peer->doorbell = Doorbell(peer->attachment.doorbell);
  const PeerId id = static_cast<PeerId>(peers_.size());
  {
    std::lock_guard<std::mutex> lock(direct_mutex_);
    peers_.push_back(std::move(peer));
  }
  for (Arrivals& from : arrivals_) {
    if (from.ring->initiator == address) from.peer = id;
  }
  return id;
}

void ShmDomain::RemovePeer(PeerId id) {
  if (id >= peers_.size() || peers_[id] == nullptr) return;
  board_->Detach(address_, peers_[id]->address, peers_[id]->attachment.link);
  std::erase(losses_, id);
  for (Arrivals& from : arrivals_) {
    if (from.peer == id) from.peer = kUnknownPeer;
  }
  std::lock_guard<std::mutex> lock(direct_mutex_);
  peers_[id] = nullptr;
}

StatusOr<Peer*> ShmDomain::FindPeer(PeerId id) {
  if (id >= peers_.size() || peers_[id] == nullptr) {
    return Status(
        StatusCode::kInvalidArgument,
        "no peer " + std::to_string(id) + " (removed, or never added)");
  }
  JF_RETURN_IF_ERROR(peers_[id]->lost);
  return peers_[id].get();
}

StatusOr<ShmMapping*> ShmDomain::Mapping(Peer& peer, uint64_t key) {
  const auto found = peer.mappings.find(key);
  if (found != peer.mappings.end() &&
      !found->second->gone.load(std::memory_order_acquire)) {
    return found->second.get();
  }
  std::erase_if(peer.mappings, [](const auto& entry) {
    return entry.second->gone.load(std::memory_order_acquire);
  });
  JF_ASSIGN_OR_RETURN(
      std::shared_ptr<ShmMapping> mapping,
      board_->MapRegion(peer.attachment.link, peer.address, key,
                        Deadline::AfterSeconds(kMapRegionSeconds)));
  return (peer.mappings[key] = std::move(mapping)).get();
}

StatusOr<Posted> ShmDomain::Room(PeerId id, Peer& peer, bool needs_ring) {
  if (done_.size() >= caps_.queue_depth) return Posted::kAgain;
  if (!needs_ring) return Posted::kPosted;
  switch (peer.ring.HasRoom()) {
    case ShmRingResult::kDone:
      return Posted::kPosted;
    case ShmRingResult::kNotNow:
      return Posted::kAgain;
    case ShmRingResult::kNonsense:
      break;
  }
  Lose(id, Status(StatusCode::kDataLoss,
                  "the peer wrote nonsense into its event ring"));
  return peer.lost;
}

StatusOr<Posted> ShmDomain::PostWriteImm(PeerId id, LocalSpan local,
                                         RemoteSpan remote, uint64_t length,
                                         std::optional<uint32_t> immediate,
                                         uint64_t cookie) {
  JF_ASSIGN_OR_RETURN(Peer* const peer, FindPeer(id));
  std::byte* target = nullptr;
  if (length > 0) {
    JF_RETURN_IF_ERROR(regions_.CheckSource(local, length));
    JF_ASSIGN_OR_RETURN(ShmMapping* const mapping, Mapping(*peer, remote.key));
    if (!InRange(remote.offset, length, mapping->memory.size())) {
      return Status(StatusCode::kOutOfRange,
                    "the target of a write of " + std::to_string(length) +
                        " bytes at offset " + std::to_string(remote.offset) +
                        " lies outside the peer's region of " +
                        std::to_string(mapping->memory.size()) + " bytes");
    }
    target = mapping->memory.data() + remote.offset;
  }
  JF_ASSIGN_OR_RETURN(const Posted room,
                      Room(id, *peer, immediate.has_value()));
  if (room == Posted::kAgain) return room;
  if (length > 0) std::memcpy(target, local.data, length);
  if (immediate.has_value()) {
    peer->ring.PushImmediate(*immediate);
    peer->doorbell.Ring();
  }
  Finish(Completion::Kind::kWriteDone, id, cookie);
  return Posted::kPosted;
}

StatusOr<Posted> ShmDomain::PostSend(PeerId id, std::string_view message,
                                     uint64_t cookie) {
  JF_ASSIGN_OR_RETURN(Peer* const peer, FindPeer(id));
  if (message.size() > kShmMessageBytes) {
    return Status(StatusCode::kInvalidArgument,
                  "a message of " + std::to_string(message.size()) +
                      " bytes exceeds shm's " +
                      std::to_string(kShmMessageBytes));
  }
  JF_ASSIGN_OR_RETURN(const Posted room, Room(id, *peer, true));
  if (room == Posted::kAgain) return room;
  peer->ring.PushMessage(message);
  peer->doorbell.Ring();
  Finish(Completion::Kind::kSendDone, id, cookie);
  return Posted::kPosted;
}

// The copy is done, but the completion is still polled like any other; the
// thread that polls may sleep.
void ShmDomain::Finish(Completion::Kind kind, PeerId peer, uint64_t cookie) {
  done_.push_back({kind, peer, cookie});
  board_->doorbell().Ring();
}

void ShmDomain::Lose(PeerId id, Status why) {
  Peer& peer = *peers_[id];
  if (!peer.lost.ok()) return;
  peer.lost = std::move(why);
  losses_.push_back(id);
  board_->doorbell().Ring();
}

PeerId ShmDomain::IdOf(const ShmAddress& address) const {
  for (PeerId id = 0; id < peers_.size(); ++id) {
    if (peers_[id] != nullptr && peers_[id]->address == address) return id;
  }
  return kUnknownPeer;
}

size_t ShmDomain::Poll(std::span<Completion> completions) {
  if (inbox_.has_news.load(std::memory_order_acquire)) TakeNews();
  size_t count = PollDone(completions);
  count += PollRings(completions.subspan(count));
  if (!losses_.empty()) count += PollLosses(completions.subspan(count));
  return count;
}

void ShmDomain::TakeNews() {
  std::vector<std::shared_ptr<ShmIncomingRing>> rings;
  std::vector<ShmInbox::Loss> losses;
  {
    std::lock_guard<std::mutex> lock(inbox_.mutex);
    inbox_.has_news.store(false, std::memory_order_relaxed);
    rings.swap(inbox_.rings);
    losses.swap(inbox_.losses);
  }
  for (std::shared_ptr<ShmIncomingRing>& ring : rings) {
    const PeerId peer = IdOf(ring->initiator);
    if (peer != kUnknownPeer && !peers_[peer]->lost.ok()) {
      inbox_.open_rings.fetch_sub(1, std::memory_order_relaxed);
      continue;  // its loss was the last word about it
    }
    ShmRingReader reader(ring->memory.data());
    arrivals_.push_back({std::move(ring), reader, peer});
  }
  for (ShmInbox::Loss& loss : losses) {
    const PeerId peer = IdOf(loss.peer);
    if (peer != kUnknownPeer) Lose(peer, std::move(loss.status));
  }
}

size_t ShmDomain::PollDone(std::span<Completion> completions) {
  size_t count = 0;
  for (; count < completions.size() && !done_.empty(); ++count) {
    Completion& out = completions[count];
    out.kind = done_.front().kind;
    out.peer = done_.front().peer;
    out.cookie = done_.front().cookie;
    out.status = OkStatus();
    done_.pop_front();
  }
  return count;
}

size_t ShmDomain::PollRings(std::span<Completion> completions) {
  size_t count = 0;
  size_t empty = 0;  // rings found empty in a row
  while (count < completions.size() && empty < arrivals_.size()) {
    if (next_arrivals_ >= arrivals_.size()) next_arrivals_ = 0;
    Arrivals& from = arrivals_[next_arrivals_];
    // Read before the ring: what it promises is about all earlier entries.
    const bool closed = from.ring->closed.load(std::memory_order_acquire);
    Completion& out = completions[count];
    const ShmRingResult result = from.reader.Pop(out);
    if (result == ShmRingResult::kDone) {
      out.peer = from.peer;
      out.cookie = 0;
      out.status = OkStatus();
      ++count;
      ++next_arrivals_;
      empty = 0;
      continue;
    }
    if (result == ShmRingResult::kNonsense && from.peer != kUnknownPeer) {
      Lose(from.peer, Status(StatusCode::kDataLoss,
                             "the peer wrote nonsense into its event ring"));
    }
    if (closed || result == ShmRingResult::kNonsense) {
      arrivals_.erase(arrivals_.begin() +
                      static_cast<ptrdiff_t>(next_arrivals_));
      inbox_.open_rings.fetch_sub(1, std::memory_order_relaxed);
      continue;
    }
    ++empty;
    ++next_arrivals_;
  }
  return count;
}

// A loss is the last word about a peer: reported once its ring is empty and
// its completions are taken.
size_t ShmDomain::PollLosses(std::span<Completion> completions) {
  size_t count = 0;
  while (count < completions.size() && !losses_.empty()) {
    const PeerId id = losses_.front();
    losses_.erase(losses_.begin());
    std::erase_if(arrivals_, [&](const Arrivals& from) {
      if (from.peer != id) return false;
      inbox_.open_rings.fetch_sub(1, std::memory_order_relaxed);
      return true;
    });
    Completion& out = completions[count++];
    out.kind = Completion::Kind::kPeerLost;
    out.peer = id;
    out.cookie = 0;
    out.status = peers_[id]->lost;
  }
  return count;
}

Status ShmDomain::MapMemory(PeerId id, uint64_t key, Deadline deadline) {
  std::unique_lock<std::mutex> lock(direct_mutex_);
  const auto known = [&] {
    return id < peers_.size() && peers_[id] != nullptr;
  };
  Status removed(StatusCode::kUnavailable, "the peer was removed");
  if (!known()) return removed;
  if (peers_[id]->direct.contains(key)) return OkStatus();
  const std::shared_ptr<ShmLink> link = peers_[id]->attachment.link;
  const ShmAddress address = peers_[id]->address;
  lock.unlock();  // the peer may let us wait; the owner must not
  if (link != nullptr && deadline.Expired()) {
    return Status(StatusCode::kDeadlineExceeded, "it is not mapped yet");
  }
  JF_ASSIGN_OR_RETURN(std::shared_ptr<ShmMapping> mapping,
                      board_->MapRegion(link, address, key, deadline));
  lock.lock();
  if (!known()) return removed;
  // If another thread was faster, somebody may use its mapping already.
  peers_[id]->direct.try_emplace(key, std::move(mapping));
  return OkStatus();
}

std::byte* ShmDomain::DirectPointer(PeerId id, RemoteSpan remote,
                                    uint64_t length) {
  const Status mapped =
      MapMemory(id, remote.key, Deadline::AfterSeconds(kMapRegionSeconds));
  if (!mapped.ok()) return nullptr;
  std::lock_guard<std::mutex> lock(direct_mutex_);
  if (peers_[id] == nullptr) return nullptr;
  const ShmMapping& mapping = *peers_[id]->direct.at(remote.key);
  if (mapping.gone.load(std::memory_order_acquire) ||
      !InRange(remote.offset, length, mapping.memory.size())) {
    return nullptr;
  }
  return mapping.memory.data() + remote.offset;
}

class ShmTransport final : public Transport {
 public:
  explicit ShmTransport(std::unique_ptr<ShmSwitchboard> board)
      : board_(std::move(board)) {}

  StatusOr<std::unique_ptr<Domain>> OpenDomain() override {
    return std::unique_ptr<Domain>(std::make_unique<ShmDomain>(board_.get()));
  }
  Doorbell& doorbell() override { return board_->doorbell(); }

 private:
  std::unique_ptr<ShmSwitchboard> board_;
};

}  // namespace

StatusOr<std::unique_ptr<Transport>> OpenShmTransport(ShmOptions options) {
  JF_ASSIGN_OR_RETURN(std::unique_ptr<ShmSwitchboard> board,
                      ShmSwitchboard::Start(std::move(options)));
  return std::unique_ptr<Transport>(
      std::make_unique<ShmTransport>(std::move(board)));
}

}  // namespace jaxfabric
