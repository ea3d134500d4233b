// DomainGroup: the Domains of one rank, used as one.
//
// Transfers are cut into chunks that wait here; each Domain takes the next one
// when it has room in a small window, so that a slow link slows only itself.
// Chunks of different peers take turns: a peer whose queue is full blocks
// nobody else. Not thread-safe: its owner serialises the calls.

#ifndef JAXFABRIC_ENGINE_DOMAIN_GROUP_H_
#define JAXFABRIC_ENGINE_DOMAIN_GROUP_H_

#include <cstdint>
#include <deque>
#include <functional>
#include <memory>
#include <string>
#include <unordered_map>
#include <vector>

#include "base/deadline.h"
#include "base/status.h"
#include "transport/transport.h"

namespace jaxfabric {

// A registered region of a peer: one key per Domain of the peer.
struct MrDesc {
  uint64_t base = 0;
  uint64_t length = 0;
  std::vector<uint64_t> keys;
};

// Memory of this rank that is registered on each of its Domains.
struct LocalRegion {
  const std::byte* base = nullptr;
  uint64_t length = 0;
  std::vector<uint64_t> keys;
};

// One contiguous part of a transfer.
struct Piece {
  uint64_t local_offset = 0;
  uint64_t remote_offset = 0;
  uint64_t length = 0;
};

class DomainGroup {
 public:
  using Done = std::function<void(Status)>;

  // What Poll found, in terms of this group's peers.
  struct Event {
    enum class Kind { kImmediate, kMessage, kPeerLost };
    Kind kind;
    uint32_t peer;
    uint32_t immediate = 0;
    std::string message;
    Status status;
  };

  static constexpr size_t kDomainsMax = 8;
  // Chunks that one Domain has posted and not completed. Small, so that a slow
  // link holds few of them; large enough to hide one completion's latency.
  static constexpr uint32_t kWindowChunks = 16;
  // Chunks are not larger where there are several Domains to share a transfer.
  static constexpr uint64_t kChunkBytes = uint64_t{1} << 20;

  explicit DomainGroup(std::vector<std::unique_ptr<Domain>> domains);

  size_t size() const { return domains_.size(); }
  const DomainCaps& caps() const { return domains_[0]->caps(); }
  std::vector<NetAddr> addresses() const;

  StatusOr<std::vector<uint64_t>> RegisterMemory(const MemoryRegion& region);

  // `peer` is the caller's name for it. Our Domain i writes to Domain
  // i mod (their number), and theirs likewise.
  Status AddPeer(uint32_t peer, const std::vector<NetAddr>& addresses,
                 Deadline deadline);

  // One transfer: all pieces, and one count under `id` at the peer. `done` runs
  // in Poll or here, once no NIC reads the source any more.
  Status SubmitWrite(uint32_t peer, const LocalRegion& local,
                     const MrDesc& remote, const std::vector<Piece>& pieces,
                     uint32_t id, Done done);

  // Control messages; they wait for room but not behind writes.
  void SubmitSend(uint32_t peer, std::string message);

  // Peer memory mapped here, or nullptr.
  std::byte* DirectPointer(uint32_t peer, const MrDesc& remote, uint64_t offset,
                           uint64_t length);

  // True if no control message waits or is on its way.
  bool Idle() const;

  // Moves everything forward; true if anything happened.
  bool Poll(std::vector<Event>* events);

 private:
  struct Transfer {
    uint32_t peer;
    LocalRegion local;
    MrDesc remote;
    std::vector<Piece> chunks;
    uint32_t id;
    Done done;
    uint32_t next = 0;  // first chunk that is not posted
    uint32_t open = 0;  // posted and not completed
    Status status;
  };
  struct Link {  // one Domain's way to one peer
    PeerId id = kUnknownPeer;
    uint32_t remote_domain = 0;
  };
  struct Peer {
    std::vector<Link> links;  // by Domain
    std::deque<std::shared_ptr<Transfer>> queue;
    std::deque<std::string> messages;
    bool lost = false;
  };

  bool Pump();
  bool PumpMessages(uint32_t peer_name, Peer& peer);
  // Posts the next chunk of the peer's first transfer; false if it could not.
  bool PostChunk(Peer& peer, size_t domain);
  void Handle(size_t domain, Completion& completion,
              std::vector<Event>* events);
  void Retire(const std::shared_ptr<Transfer>& transfer, Status status);
  void LosePeer(uint32_t name, const Status& status,
                std::vector<Event>* events);

  std::vector<std::unique_ptr<Domain>> domains_;
  std::vector<uint32_t> open_chunks_;                        // by Domain
  std::vector<std::unordered_map<PeerId, uint32_t>> names_;  // by Domain
  std::unordered_map<uint32_t, Peer> peers_;
  std::vector<uint32_t> turn_;  // peers, in the order in which they take turns
  size_t turn_next_ = 0;
  std::unordered_map<uint64_t, std::shared_ptr<Transfer>> open_;  // by cookie
  uint64_t next_cookie_ = 1;
  uint64_t open_messages_ = 0;
};

}  // namespace jaxfabric

#endif  // JAXFABRIC_ENGINE_DOMAIN_GROUP_H_
