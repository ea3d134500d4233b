// VerbsDomain: one port of a device as a Domain.
//
// Each pair of Domains has one connection, which carries both ways. It comes
// about by greetings (verbs_greeting.h), and anew when it breaks, unless an
// owner has removed the other: then it stays down until that one is added
// again. A memory key is looked up at its target once, so that a wrong key or
// offset is refused at its source instead of costing the connection; until the
// answer is there, posts give kAgain.

#ifndef JAXFABRIC_TRANSPORT_VERBS_DOMAIN_H_
#define JAXFABRIC_TRANSPORT_VERBS_DOMAIN_H_

#include "transport/verbs_port.h"

#ifdef JAXFABRIC_HAVE_LIBIBVERBS

#include <cstdint>
#include <deque>
#include <memory>
#include <optional>
#include <string>
#include <string_view>
#include <unordered_map>
#include <unordered_set>
#include <vector>

#include "base/deadline.h"
#include "base/status.h"
#include "transport/job_key.h"
#include "transport/ofi_bell.h"
#include "transport/region_table.h"
#include "transport/transport.h"
#include "transport/verbs_buffers.h"
#include "transport/verbs_connection.h"
#include "transport/verbs_frame.h"
#include "transport/verbs_greeter.h"
#include "transport/verbs_receives.h"

namespace jaxfabric {

// Another Domain that this one knows: added by its owner, or because it said
// hello, or both.
struct VerbsPeer {
  struct Outgoing {
    VerbsFrameKind kind;
    uint64_t argument = 0;
    std::string payload;
  };

  VerbsAddress address;
  VerbsWay way{nullptr, nullptr};
  PeerId id = kUnknownPeer;  // of the owner; unknown if it has not added it
  Status lost;               // why the owner can use it no more

  std::unique_ptr<VerbsConnection> connection;
  uint64_t added = 0;         // our attempt at which the owner added it
  uint64_t last_attempt = 0;  // of the peer, that we have seen
  // Hellos from before the owner removed it are refused.
  uint64_t refused_up_to = 0;
  Status broken;         // why the connection is to be taken down
  bool silent = false;   // its device did not answer
  int64_t hello_ns = 0;  // when to say it again
  int64_t hello_period_ns = 0;
  int64_t give_up_ns = 0;
  int64_t word_ns = 0;  // when the last word was sent

  uint32_t open = 0;  // the owner's posts that are not complete
  bool busy = false;  // among VerbsDomain::busy_
  std::deque<Outgoing> frames;
  // What is known of its memory, by key; nothing yet: asked.
  std::unordered_map<uint64_t, std::optional<VerbsRegion>> regions;
  // Keys of ours that it has asked for.
  std::unordered_set<uint64_t> told;

  bool ready() const {
    return connection != nullptr && connection->confirmed() && broken.ok();
  }
  bool wanted() const { return id != kUnknownPeer && lost.ok(); }
};

class VerbsDomain final : public Domain {
 public:
  static StatusOr<std::unique_ptr<VerbsDomain>> Open(
      const VerbsLibrary& library, const VerbsPortName& name,
      const VerbsSettings& settings, const JobKey& key, OfiBell* bell);
  ~VerbsDomain() override;

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
  std::byte* DirectPointer(PeerId, RemoteSpan, uint64_t) override {
    return nullptr;
  }

 private:
  struct Memory {
    VerbsMemory registration;
    bool in_host_memory = true;
  };

  VerbsDomain(const JobKey& key, OfiBell* bell) : key_(key), bell_(bell) {}
  Status Start(const VerbsLibrary& library, const VerbsPortName& name,
               const VerbsSettings& settings);
  void FillCaps();

  // verbs_domain.cc: posts and completions.
  StatusOr<VerbsPeer*> FindPeer(PeerId id);
  // The peer's memory behind `remote`, or nothing until the peer has told.
  StatusOr<std::optional<VerbsRegion>> RegionOf(VerbsPeer& peer,
                                                const RemoteSpan& remote,
                                                uint64_t length);
  bool HasRoom(const VerbsPeer& peer) const;
  // After a post, whose end will come even if it failed.
  Posted Opened(VerbsPeer& peer, const Status& posted);
  bool PollQueue();  // false if that was all
  void Handle(const ibv_wc& work);
  void OnSent(const ibv_wc& work);
  void OnReceived(const ibv_wc& work);
  void OnFrame(VerbsPeer& peer, const VerbsFrame& frame);
  void OnAsk(VerbsPeer& peer, uint64_t key);
  void EndOperation(VerbsPeer& peer, const VerbsOperation& operation,
                    const Status& status);
  void Tell(VerbsPeer& peer, VerbsFrameKind kind, uint64_t argument = 0,
            std::string payload = "");
  void MarkBusy(VerbsPeer& peer);
  void PumpFrames(VerbsPeer& peer);
  void Pump();
  void Rest(bool empty);

  // verbs_domain_peers.cc: who is there, and joined.
  StatusOr<VerbsPeer*> TakeIn(const VerbsAddress& address);
  Status OpenConnection(VerbsPeer& peer);
  Status JoinSelf(VerbsPeer& peer);
  int64_t PatienceNs() const;
  void StartGreeting(VerbsPeer& peer, int64_t patience_ns);
  void Greet(VerbsPeer& peer, VerbsGreetingKind kind, uint64_t echo);
  void HandleGreetings();
  void OnHello(VerbsPeer& peer, const VerbsGreeting& greeting);
  void OnWelcome(VerbsPeer& peer, const VerbsGreeting& greeting);
  // The connection is of no use any more. It ends in the next Mend, since this
  // may be called from within the handling of its completions. `silent`: the
  // peer's device did not answer.
  void Break(VerbsPeer& peer, const Status& why, bool silent = false);
  void Mend();
  // Ends the connection and all posts on it. Afterwards nothing that the peer
  // has posted lands any more, and all that landed before is in ready_.
  void TakeDown(VerbsPeer& peer, const Status& why);
  void Lose(VerbsPeer& peer, const Status& why);
  void TendPeers();
  void TendPeer(VerbsPeer& peer, int64_t now_ns);
  void SayBye();

  const JobKey key_;
  OfiBell* const bell_;
  VerbsAddress address_;
  NetAddr net_addr_;
  DomainCaps caps_;
  RegionTable regions_;

  // Closed from the last to the first.
  std::unique_ptr<VerbsPort> port_;
  std::unique_ptr<VerbsBuffers> buffers_;
  std::unique_ptr<VerbsReceives> receives_;
  std::unique_ptr<VerbsGreeter> greeter_;
  std::unordered_map<uint64_t, Memory> memory_;  // by exported key
  bool watched_ = false;                         // by bell_
  bool asked_ = false;        // for a notice, and nothing came since
  uint32_t empty_polls_ = 0;  // since then

  std::unordered_map<uint64_t, std::unique_ptr<VerbsPeer>> peers_;  // by nonce
  std::vector<VerbsPeer*> ids_;  // by PeerId; null once removed
  std::unordered_map<uint32_t, VerbsPeer*> numbers_;  // by our queue pair's
  uint64_t attempts_ = 0;  // queue pairs opened so far
  uint32_t posted_ = 0;    // writes and messages of the owner
  std::deque<Completion> ready_;
  std::vector<VerbsGreeting> greetings_;  // that came
  std::vector<VerbsPeer*> busy_;          // with frames, words or chains
  std::vector<VerbsPeer*> pumped_;        // empty but in Pump
  std::vector<VerbsPeer*> broken_;
  Status failed_;  // of the device
  int64_t tended_ns_ = 0;
};

}  // namespace jaxfabric

#endif  // JAXFABRIC_HAVE_LIBIBVERBS
#endif  // JAXFABRIC_TRANSPORT_VERBS_DOMAIN_H_
