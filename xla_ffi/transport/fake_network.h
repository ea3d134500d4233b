// FakeNetwork: what fake Domains share. It delivers whole or in pieces, in any
// order, late, and decides by one seeded generator.

#ifndef JAXFABRIC_TRANSPORT_FAKE_NETWORK_H_
#define JAXFABRIC_TRANSPORT_FAKE_NETWORK_H_

#include <condition_variable>
#include <cstdint>
#include <deque>
#include <map>
#include <memory>
#include <mutex>
#include <optional>
#include <random>
#include <span>
#include <string>
#include <thread>
#include <unordered_map>
#include <vector>

#include "base/doorbell.h"
#include "base/status.h"
#include "transport/fake.h"
#include "transport/fake_link.h"
#include "transport/region_table.h"
#include "transport/transport.h"

namespace jaxfabric {

// What the NetAddr of a fake Domain says.
struct FakeAddress {
  uint64_t magic = 0;
  uint64_t network = 0;
  uint64_t port = 0;

  bool operator==(const FakeAddress&) const = default;
};

// A write or message on its way.
struct FakePost {
  ~FakePost() {
    if (open != nullptr) --*open;
  }

  uint64_t from = 0;  // ports
  uint64_t to = 0;
  PeerId peer = kUnknownPeer;  // `to`, as `from` knows it
  LocalSpan local;
  RemoteSpan remote;
  uint64_t length = 0;
  std::optional<uint32_t> immediate;
  std::optional<std::string> message;
  uint64_t cookie = 0;

  uint32_t pieces_left = 0;
  bool answered = false;  // its cookie has come back
  bool noticed = false;   // its immediate or message has been delivered
  bool failed = false;    // what is left of it is not delivered
  bool late = false;      // was answered with kError, and lands all the same
  std::vector<std::byte> late_bytes;
  // Counts the posts of one initiator to one target; null until this one is
  // accepted. A post is open until it is answered and its notice is polled.
  std::shared_ptr<uint32_t> open;
};

// One Domain, as the network sees it. Guarded by the network's mutex.
struct FakePort {
  struct Peer {
    uint64_t port = 0;
    bool removed = false;
    Status lost;
    bool told_lost = false;  // by kPeerLost
    std::shared_ptr<uint32_t> open = std::make_shared<uint32_t>(0);
  };
  struct Arrival {
    Completion completion;
    std::shared_ptr<FakePost> notice_of;  // null for answers and losses
  };

  uint64_t id = 0;
  const FakeOptions* options = nullptr;
  Doorbell* doorbell = nullptr;
  RegionTable regions;
  std::vector<Peer> peers;  // by PeerId
  std::deque<Arrival> inbox;
  bool dead = false;
  double bytes_per_s = 0;  // 0: no limit
  int64_t free_ns = 0;     // when all that it writes has left
};

class FakeNetwork {
 public:
  // The network of this name; it lives as long as somebody holds it. Seed and
  // clock count for whoever comes first.
  static std::shared_ptr<FakeNetwork> Join(const FakeOptions& options);
  // Null if nobody has joined it.
  static std::shared_ptr<FakeNetwork> Find(const std::string& name);

  FakeNetwork(uint64_t id, const FakeOptions& options);
  ~FakeNetwork();

  void Enter(FakePort* port);
  void Leave(FakePort* port);
  bool Kill(const NetAddr& address);
  NetAddr AddressOf(const FakePort& port) const;

  StatusOr<uint64_t> AddRegion(FakePort& port, const MemoryRegion& region);
  Status RemoveRegion(FakePort& port, uint64_t key);
  StatusOr<PeerId> AddPeer(FakePort& port, const NetAddr& address);
  void RemovePeer(FakePort& port, PeerId peer);
  // `from`, `to` and `open` of `draft` are filled in here.
  StatusOr<Posted> Post(FakePort& port, std::shared_ptr<FakePost> draft);
  size_t Poll(FakePort& port, std::span<Completion> completions);

  // See fake_link.h.
  bool Pace(const NetAddr& domain, double bytes_per_s);
  bool Stall(const NetAddr& a, const NetAddr& b);
  bool Cut(const NetAddr& a, const NetAddr& b, const FakeCut& cut);
  bool Heal(const NetAddr& a, const NetAddr& b);
  std::optional<int64_t> NextEventNs();

 private:
  enum class LinkState { kUp, kStalled, kCut };
  using PortPair = std::pair<uint64_t, uint64_t>;  // the smaller first
  struct Event {
    enum class Kind { kPiece, kAnswer, kNotice };
    Kind kind = Kind::kPiece;
    std::shared_ptr<FakePost> post;
    uint64_t offset = 0;  // of a piece
    uint64_t length = 0;
  };

  // Functions named ...Locked need mutex_.
  StatusOr<FakeAddress> ParseLocked(const NetAddr& address) const;
  FakePort* FindLocked(uint64_t port);
  FakePort* FindLocked(const NetAddr& address);
  static PortPair PairOf(uint64_t a, uint64_t b);
  LinkState LinkLocked(uint64_t a, uint64_t b) const;
  int64_t NowNs() const { return clock_ns_(); }
  void CutLocked(const std::shared_ptr<FakePost>& post, uint32_t pieces_max);
  void ScheduleLocked(Event event);
  void DeliverDueLocked();
  void DeliverLocked(const Event& event);
  void DeliverPieceLocked(const Event& event);
  void DeliverNoticeLocked(const std::shared_ptr<FakePost>& post);
  void FinishLocked(const std::shared_ptr<FakePost>& post);
  void PushLocked(FakePort& port, Completion completion,
                  std::shared_ptr<FakePost> notice_of);
  void AnswerLocked(FakePost& post, const Status& why);
  void FailLocked(FakePost& post, const Status& why);
  void StorePieceLocked(const Event& event);
  void RescheduleLocked(PortPair pair, int64_t due_ns);
  void CutPostLocked(const std::shared_ptr<FakePost>& post, const FakeCut& cut);
  void LandLocked(const std::shared_ptr<FakePost>& post, bool all);
  // Tells `port` that `other` is lost to it.
  void ReportLostLocked(uint64_t port, uint64_t other, const std::string& why);
  // `port` has removed `other`: nothing of it lands there any more.
  void FenceLocked(FakePort& port, uint64_t other);
  void LosePortLocked(uint64_t port, const Status& why);
  void RingLocked();
  void RunTimer();

  const uint64_t id_;
  int64_t (*const clock_ns_)();

  std::mutex mutex_;
  std::mt19937_64 random_;                // guarded by mutex_
  uint64_t next_port_ = 1;                // guarded by mutex_
  uint64_t next_key_ = 1;                 // guarded by mutex_
  std::map<uint64_t, FakePort*> ports_;   // guarded by mutex_
  std::map<PortPair, LinkState> links_;   // those that are not up; by mutex_
  std::multimap<int64_t, Event> events_;  // by due time; by mutex_
  int64_t rung_until_ns_ = 0;             // guarded by mutex_
  bool stopping_ = false;                 // guarded by mutex_
  std::condition_variable timer_wakes_;
  std::thread timer_;
};

}  // namespace jaxfabric

#endif  // JAXFABRIC_TRANSPORT_FAKE_NETWORK_H_
