// OfiDomain: one libfabric endpoint as a Domain.
//
// Peers are joined by frames (ofi_frame.h): a hello makes the target take in
// the initiator's address, which EFA demands before a write; an ask gets what
// lies behind a memory key, so that a wrong key or offset is refused at its
// source instead of costing the connection. Until the answer is there, posts
// give kAgain. Peers that are idle are pinged, so that a death is noticed by
// those who only wait.
//
// Only closing its endpoint takes back what is posted to a peer, and keeps out
// what a peer has posted. So a Domain renews its endpoint when it has to: the
// other peers pause, it opens another one, and says hello anew.

#ifndef JAXFABRIC_TRANSPORT_OFI_DOMAIN_H_
#define JAXFABRIC_TRANSPORT_OFI_DOMAIN_H_

#include "transport/ofi_endpoint.h"

#ifdef JAXFABRIC_HAVE_LIBFABRIC

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
#include "base/doorbell.h"
#include "base/status.h"
#include "transport/job_key.h"
#include "transport/ofi_address.h"
#include "transport/ofi_bell.h"
#include "transport/ofi_frame.h"
#include "transport/ofi_nic.h"
#include "transport/ofi_operations.h"
#include "transport/ofi_peer.h"
#include "transport/region_table.h"
#include "transport/transport.h"

namespace jaxfabric {

class OfiDomain final : public Domain {
 public:
  // `bell` may be null: then the owner polls.
  static StatusOr<std::unique_ptr<OfiDomain>> Open(
      const OfiLibrary& library, OfiProvider provider, const fi_info& info,
      const JobKey& key, OfiBell* bell, Doorbell* doorbell);
  ~OfiDomain() override;

  const DomainCaps& caps() const override { return caps_; }
  const NetAddr& address() const override { return net_addr_; }

  StatusOr<uint64_t> RegisterMemory(const MemoryRegion& region) override;
  Status UnregisterMemory(uint64_t key) override;
  StatusOr<PeerId> AddPeer(const NetAddr& net_addr, Deadline deadline) override;
  void RemovePeer(PeerId peer) override;
  void FencePeer(PeerId peer) override;
  bool IsFenced(PeerId peer) const override { return !fencing_.contains(peer); }
  void FenceRemoved() override;
  bool RemovedAreFenced() const override { return !fencing_removed_; }
  StatusOr<Posted> PostWriteImm(PeerId peer, LocalSpan local, RemoteSpan remote,
                                uint64_t length,
                                std::optional<uint32_t> immediate,
                                uint64_t cookie) override;
  StatusOr<Posted> PostPieces(PeerId peer, LocalSpan local, RemoteSpan remote,
                              std::span<const Piece> pieces,
                              std::optional<uint32_t> immediate,
                              uint64_t cookie) override;
  StatusOr<Posted> PostSend(PeerId peer, std::string_view message,
                            uint64_t cookie) override;
  size_t Poll(std::span<Completion> completions) override;
  uint64_t refused_frames() const override { return refused_frames_; }
  std::byte* DirectPointer(PeerId, RemoteSpan, uint64_t) override {
    return nullptr;
  }

 private:
  OfiDomain(const JobKey& key, OfiBell* bell, Doorbell* doorbell)
      : key_(key), bell_(bell), doorbell_(doorbell) {}
  Status Start(const OfiLibrary& library, OfiProvider provider,
               const fi_info& info);
  void FillCaps();
  void TakeName();  // of the endpoint, into our address
  Status Listen();  // by bell_
  void PostReceive(OfiOperation* operation);

  // ofi_domain.cc: posts and completions.
  StatusOr<OfiPeer*> FindPeer(PeerId id);
  // The peer's memory behind `remote`, or nothing until the peer has told.
  StatusOr<std::optional<OfiRegion>> RegionOf(OfiPeer& peer,
                                              const RemoteSpan& remote,
                                              uint64_t length);
  bool HasRoom(const OfiPeer& peer) const;
  // Whether `error`, from a post, is back-pressure; else gives it a Status.
  StatusOr<Posted> Refused(OfiPeer& peer, OfiOperation* operation,
                           int64_t error);
  void Handle(const OfiEvent& event);
  void OnDone(OfiOperation* operation);
  void OnFailed(OfiOperation* operation, const std::string& error);
  void Rest(bool empty);

  // ofi_domain_peers.cc: who is there.
  StatusOr<OfiPeer*> TakeIn(const OfiAddress& address);
  Status Insert(OfiPeer& peer);
  // It has another endpoint now.
  Status Move(OfiPeer& peer, const OfiAddress& address);
  void Forget(OfiPeer* peer);
  void Tell(OfiPeer& peer, OfiFrameKind kind, uint64_t argument = 0,
            std::string payload = "");
  void DropStaleFrames(OfiPeer& peer);
  // Posts the peer's first frame; false if it cannot be posted now.
  bool PumpFrame(OfiPeer& peer);
  void OnFrame(const OfiFrame& frame);
  void OnHello(const OfiFrame& frame);
  void OnAnswer(OfiPeer& peer, const OfiFrame& frame);
  void NoteRefusal(OfiPeer& peer);
  // `tell`: it is told, if that is still possible.
  void Lose(OfiPeer& peer, Status why, bool tell = true);
  // Reports a loss, once nothing is open towards the peer.
  void ReportLoss(OfiPeer& peer, int64_t now_ns);
  void TendPeers();
  void TendPeer(OfiPeer& peer, int64_t now_ns);
  bool IsAnswered(OfiPeer& peer);
  void ProbePeer(OfiPeer& peer, int64_t now_ns);
  void SayBye();

  // ofi_domain_renewal.cc: another endpoint.
  void BeginRenewal();
  void AskToPause();
  void TendRenewal();
  bool IsQuiet(int64_t now_ns) const;
  void Renew();
  void CloseEndpoint();
  void WelcomeBack();
  void OnPause(OfiPeer& peer, uint64_t generation);
  void AnswerPause(OfiPeer& peer);

  const JobKey key_;
  OfiBell* const bell_;
  Doorbell* const doorbell_;
  OfiAddress address_;
  NetAddr net_addr_;
  DomainCaps caps_;
  RegionTable regions_;

  // Stopped first, closed last: what is posted touches the two below.
  std::unique_ptr<OfiEndpoint> endpoint_;
  std::unique_ptr<OfiOperations> operations_;
  std::unordered_map<uint64_t, OfiMemory> memory_;  // by exported key
  int watched_fd_ = -1;                             // by bell_

  std::unordered_map<uint64_t, std::unique_ptr<OfiPeer>> peers_;  // by nonce
  std::unordered_map<fi_addr_t, OfiPeer*> by_source_;
  std::vector<OfiPeer*> ids_;  // by PeerId; null once removed
  uint32_t posted_ = 0;        // writes and messages of the owner
  std::deque<Completion> ready_;
  std::vector<OfiOperation*> unposted_;  // receives that were refused
  size_t frames_waiting_ = 0;            // of all peers
  int64_t tended_ns_ = 0;
  uint64_t refused_frames_ = 0;

  bool renewing_ = false;
  bool stopped_ = false;                // there is no endpoint
  int64_t renewal_ns_ = 0;              // when it began
  int64_t looked_ns_ = 0;               // at it, when
  bool asked_again_ = false;            // since we were stopped
  int64_t calm_ns_ = 0;                 // since when nothing has come
  std::unordered_set<PeerId> fencing_;  // until the endpoint is renewed
  bool fencing_removed_ = false;        // the same
  Status broken_;                       // why there is no new endpoint
  bool holds_shm_ = false;              // the process's one Domain over shm
};

}  // namespace jaxfabric

#endif  // JAXFABRIC_HAVE_LIBFABRIC
#endif  // JAXFABRIC_TRANSPORT_OFI_DOMAIN_H_
