// DomainGroup: the 1 to 8 Domains of one rank, used as one.
//
// A link joins one of our Domains with one of a peer's; the numbers of Domains
// need not be equal. Transfers are cut into chunks that wait here; each link
// takes the next one when it has room in a small window, so that a slow link
// slows only itself, and a peer whose queue is full blocks nobody else.
//
// A link that fails leaves outcomes unknown. Where the transport can fence
// (caps().removal_fences, and immediates that name their peer), both ends fence
// the link, tell each other what they hold, and send what is missing over the
// other links: each transfer is counted once. Where it cannot, transfers of
// unknown outcome end with kUnknown, and their ids are quarantined.
//
// Not thread-safe: its owner serialises the calls.

#ifndef JAXFABRIC_ENGINE_DOMAIN_GROUP_H_
#define JAXFABRIC_ENGINE_DOMAIN_GROUP_H_

#include <cstdint>
#include <deque>
#include <functional>
#include <memory>
#include <optional>
#include <span>
#include <string>
#include <unordered_map>
#include <utility>
#include <vector>

#include "base/deadline.h"
#include "base/status.h"
#include "engine/domain_stats.h"
#include "engine/group_peer.h"
#include "engine/link.h"
#include "engine/link_frame.h"
#include "engine/trace.h"
#include "engine/transfer.h"
#include "transport/transport.h"

namespace jaxfabric {

class DomainGroup {
 public:
  using Done = std::function<void(Status)>;

  // What Poll found, in terms of this group's peers. `peer` of a stranger's
  // message, and of an immediate where the NIC does not say whose it is, is
  // kUnknownPeer.
  struct Event {
    enum class Kind {
      kImmediate,
      kMessage,
      kPeerLost,
      kStranger,  // `message` came from a Domain that nobody has added
    };
    Kind kind;
    uint32_t peer;
    uint32_t immediate = 0;
    std::string message;
    Status status;
  };

  static constexpr size_t kDomainsMax = 8;
  // What one link has posted and not completed: at least two writes, so that
  // one is under way while the other's completion is handled; and as much as it
  // completes in the time by which a busy machine may poll late, but no more
  // than a slow link, or one that dies, may hold.
  static constexpr uint32_t kWindowWritesMin = 2;
  static constexpr uint32_t kWindowWritesMax = LinkFrame::kCountsMax;
  static constexpr double kWindowNs = 8e6;
  static constexpr uint64_t kWindowBytesMin = uint64_t{1} << 19;
  static constexpr uint64_t kWindowBytesMax = uint64_t{1} << 21;

  explicit DomainGroup(std::vector<std::unique_ptr<Domain>> domains,
                       int64_t (*clock_ns)() = MonotonicNanoseconds);

  size_t size() const { return domains_.size(); }
  const DomainCaps& caps() const { return domains_[0]->caps(); }
  std::vector<NetAddr> addresses() const;
  size_t message_bytes_max() const;  // that SubmitSend takes

  StatusOr<std::vector<uint64_t>> RegisterMemory(const MemoryRegion& region);
  // Refused while a transfer that is under way reads this memory.
  Status UnregisterMemory(const std::vector<uint64_t>& keys);

  // `peer` is the caller's name for it. Link k joins our Domain k mod (our
  // number) and theirs k mod (their number); there are as many links as the
  // larger number.
  Status AddPeer(uint32_t peer, const std::vector<NetAddr>& addresses,
                 Deadline deadline);
  // Forgets a peer: what is under way to it ends with kCancelled. The name may
  // be given again, to a peer that has nothing to do with this one.
  void RemovePeer(uint32_t peer);

  // Keeps out what the peers that were removed have posted, see Domain.
  void FenceRemoved();
  bool RemovedAreFenced() const;

  // One transfer: all pieces, and, where there is an `id`, one count under it
  // at the peer. `done` runs in Poll or here, once no NIC reads the source any
  // more.
  StatusOr<TransferHandle> SubmitWrite(uint32_t peer, const LocalRegion& local,
                                       const MrDesc& remote,
                                       std::span<const Piece> pieces,
                                       std::optional<uint32_t> id, Done done);

  // Posts no more of a transfer; `done` runs with kCancelled once what is
  // posted has ended, perhaps here. False if the transfer is over.
  bool Cancel(TransferHandle transfer);

  // Ids of transfers that ended badly when they were partly sent are refused,
  // until the caller knows that the peer has dropped what it holds of them.
  void ReleaseId(uint32_t peer, uint32_t id);
  // Told each such id, also when the peer is gone. It must not call this group.
  using SpoiltId = std::function<void(uint32_t peer, uint32_t id)>;
  void set_on_spoilt(SpoiltId told) { on_spoilt_ = std::move(told); }

  // Control messages; they wait for room but not behind writes. `done` runs
  // once the message is delivered, or with the reason why it will never be.
  void SubmitSend(uint32_t peer, std::string message, Done done = {});

  RemoteMemory Locate(uint32_t peer, const MrDesc& remote);
  std::byte* DirectPointer(uint32_t peer, const MrDesc& remote, uint64_t offset,
                           uint64_t length);

  bool Idle() const;  // no control message waits or is on its way

  std::vector<DomainStats> stats() const;  // by Domain

  // Of transfers to peers, and of the writes that they take on each Domain.
  Trace& trace() { return trace_; }

  // Moves everything forward; true if anything happened.
  bool Poll(std::vector<Event>* events);

 private:
  struct PeerLink {  // what a PeerId of a Domain stands for
    GroupPeerPtr peer;
    uint8_t link = 0;
  };
  // How a Domain's queue is shared: half of it evenly, so that whoever never
  // finishes anything takes nobody's place; the rest as it comes.
  struct Queue {
    uint32_t posts = 0;     // writes and messages that are open
    uint32_t links = 0;     // of peers that are there
    uint32_t own = 1;       // places of each link
    uint32_t borrowed = 0;  // beyond them, of all links together
  };

  // domain_group.cc
  GroupPeer* FindPeer(uint32_t name);
  void Leave(const GroupPeer& peer);
  void HandleArrival(size_t domain, Completion& completion);
  void HandleStranger(size_t domain, Completion& completion);
  void HandleMessage(const GroupPeerPtr& peer, Link& link, std::string bytes);
  void HandleEnd(size_t domain, const Completion& completion);
  void HandleWriteEnd(OpenPost& post, Link& link, const Status& status);
  void HandleMessageEnd(OpenPost& post, const Status& status);
  bool PollDomain(size_t domain);  // true if it may have more
  void RunEnded();

  // domain_group_post.cc
  bool Pump();
  bool PostNext(const GroupPeerPtr& peer);
  enum class Outcome { kPosted, kRefused, kFailed };
  Outcome PostChunk(const GroupPeerPtr& peer, Link& link,
                    const UncertainWrite& write);
  bool PumpMessages(const GroupPeerPtr& peer);
  bool HasRoom(const Link& link, uint64_t bytes) const;
  void Share(GroupPeer& peer, bool joins);
  void CountBorrowed(Link& link);  // after its open_writes have changed
  Link* ChooseLink(GroupPeer& peer, uint64_t bytes);
  Link* ChooseLinkForMessage(GroupPeer& peer, const Link* avoid);
  void PostFrame(const GroupPeerPtr& peer, Link& link, const LinkFrame& frame);
  void NoteMessage(Link& link);
  // Over any link but `avoid`. May be lost: who needs it says it again.
  void SendFrame(const GroupPeerPtr& peer, const LinkFrame& frame,
                 const Link* avoid = nullptr);
  void Retire(const std::shared_ptr<Transfer>& transfer);
  // Posts no more of it; it is over once what is open has ended.
  void FailTransfer(GroupPeer* peer, const std::shared_ptr<Transfer>& transfer,
                    const Status& status);
  void CloseWrite(GroupPeer& peer, const UncertainWrite& write,
                  const Status& status);
  void EndPeer(GroupPeer& peer, const Status& status);
  void LosePeer(GroupPeer& peer, const Status& status);

  // domain_group_fence.cc
  void FailLink(const GroupPeerPtr& peer, Link& link, const Status& status);
  void HandleFrame(const GroupPeerPtr& peer, const Link& from,
                   const LinkFrame& frame);
  void HandleFence(const GroupPeerPtr& peer, Link& link,
                   const LinkFrame& frame);
  void AnswerFences();
  void Resolve(const GroupPeerPtr& peer, Link& link, const LinkFrame& frame);
  void ResolveKey(const GroupPeerPtr& peer, Link& link, uint32_t key,
                  std::optional<uint32_t> held,
                  const std::vector<UncertainWrite>& writes);
  void PostAgain(GroupPeer& peer, const Link& link,
                 const UncertainWrite& write);
  bool SendAgain(GroupPeer& peer, Link& link, uint64_t received);
  void Settle(Link& link);
  void GiveUp(const GroupPeerPtr& peer, Link& link);
  bool Revives(const Link& link) const;
  bool StartProbing(const GroupPeerPtr& peer, Link& link);
  void HandleProbing(const GroupPeerPtr& peer, Link& link, const Link& from,
                     const LinkFrame& frame);
  void Attend();  // to what time brings
  void AttendLink(const GroupPeerPtr& peer, Link& link);

  // domain_group_repair.cc
  void StartRepair(const GroupPeerPtr& peer, LinkCount stands_for,
                   const std::vector<UncertainWrite>& writes);
  void EndRepair(GroupPeer& peer, uint32_t number, const Status& status);
  void HandleRepair(const GroupPeerPtr& peer, const LinkFrame& frame);
  void CountRepairWrites(const GroupPeerPtr& peer, uint32_t number,
                         uint64_t writes);

  std::vector<std::unique_ptr<Domain>> domains_;
  int64_t (*const clock_ns_)();
  int64_t now_ns_ = 0;
  int64_t attend_ns_ = 0;
  std::vector<Completion> completions_;                      // of one Poll
  std::vector<DomainStats> stats_;                           // by Domain
  std::vector<Queue> queues_;                                // by Domain
  std::vector<std::unordered_map<PeerId, PeerLink>> names_;  // by Domain
  std::unordered_map<uint32_t, GroupPeerPtr> peers_;
  std::vector<GroupPeerPtr> turn_;  // in the order in which they take turns
  size_t turn_next_ = 0;
  uint64_t round_ = 0;
  bool fences_ = false;   // some peer has links that are fenced
  bool polled_ = false;   // Poll found something
  bool polling_ = false;  // completions_ is in use
  std::unordered_map<TransferHandle, std::shared_ptr<Transfer>> transfers_;
  TransferHandle next_handle_ = 1;
  std::unordered_map<uint64_t, OpenPost> open_;  // by cookie
  uint64_t next_cookie_ = 1;
  uint64_t open_messages_ = 0;
  std::vector<FenceRequest> fence_requests_;
  Trace trace_;
  std::vector<Event> news_;
  // Callbacks run last: they may call this group.
  std::deque<std::pair<Done, Status>> ended_;
  SpoiltId on_spoilt_;
};

}  // namespace jaxfabric

#endif  // JAXFABRIC_ENGINE_DOMAIN_GROUP_H_
