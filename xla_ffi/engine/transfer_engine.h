// TransferEngine: one-sided writes and messages between jobs that were started
// apart and find each other by address.
//
// One transfer is one count at its receiver, under the id that the sender gave
// it, however many pages, writes and NICs it took. An id is one question: at
// most the n transfers that one wait(n) waits for may be under way under it.
//
// Every operation gives a TransferFuture and ends by its deadline, or shortly
// after it: once no NIC touches its buffers. Thread-safe; callbacks run on the
// CallbackQueue and may call the engine, but must not destroy it.

#ifndef JAXFABRIC_ENGINE_TRANSFER_ENGINE_H_
#define JAXFABRIC_ENGINE_TRANSFER_ENGINE_H_

#include <atomic>
#include <cstdint>
#include <functional>
#include <map>
#include <memory>
#include <mutex>
#include <optional>
#include <span>
#include <string>
#include <string_view>
#include <thread>
#include <unordered_map>
#include <vector>

#include "base/deadline.h"
#include "base/status.h"
#include "engine/domain_group.h"
#include "engine/engine_address.h"
#include "engine/handshake.h"
#include "engine/imm_counter.h"
#include "engine/immediate.h"
#include "engine/memory_registry.h"
#include "engine/message_inbox.h"
#include "engine/spoilt_ids.h"
#include "engine/transfer_frame.h"
#include "engine/transfer_future.h"
#include "engine/transfer_peer.h"
#include "engine/transfer_request.h"
#include "engine/transfer_stats.h"
#include "engine/transfer_submission.h"
#include "engine/watcher.h"
#include "transport/transport.h"

namespace jaxfabric {
using PeerGroupId = uint32_t;

class TransferEngine {
 public:
  using MaybeDeadline = std::optional<Deadline>;
  using Submitted = StatusOr<TransferFuturePtr>;

  static StatusOr<std::unique_ptr<TransferEngine>> Open(
      TransferEngineOptions options, std::unique_ptr<Transport> transport);
  ~TransferEngine();  // BeginClose, and takes leave of the peers
  // Ends what is under way, and any call that waits, with "closed".
  void BeginClose();

  const TransferEngineOptions& options() const { return options_; }
  const DomainCaps& caps() const { return caps_; }
  std::string address() const;

  // --- Peers: small numbers, never used again ---
  // The future's peer() is the peer. Either side may connect, or both at once;
  // the other learns of it by what the peer sends.
  Submitted Connect(std::string_view address, MaybeDeadline deadline = {});
  // What is under way to the peer fails; it hears that we left.
  Status Disconnect(uint32_t peer);
  // Done once nothing that peers lost so far have posted lands here any more.
  Submitted SubmitFence(MaybeDeadline deadline = {});
  // Pre-checked: all are connected now, each is there once.
  StatusOr<PeerGroupId> AddPeerGroup(std::vector<uint32_t> peers);
  Status RemovePeerGroup(PeerGroupId group);

  // --- Memory, see MemoryRegistry ---
  StatusOr<RegionId> RegisterMemory(
      std::byte* base, uint64_t length,
      const std::shared_ptr<const void>& owner = nullptr);
  StatusOr<RegionId> AllocateMemory(uint64_t length);
  // Done once nobody uses the region, here or at a peer; none may begin to. If
  // that takes too long it stays, but peers who were asked leave it alone.
  Submitted UnregisterMemory(RegionId region, MaybeDeadline deadline = {});
  // What peers need to write into it.
  StatusOr<RegionAddress> Describe(RegionId region);
  // Null for memory that was not allocated here.
  std::shared_ptr<SharedMemory> Memory(RegionId region);

  // --- Messages: whole, and in the order in which the peer sent them. ---
  Submitted SubmitSend(uint32_t peer, const std::string& message,
                       MaybeDeadline deadline = {});
  void SubmitRecvs(MessageInbox::Callback callback);
  MessageInbox& inbox() { return *inbox_; }

  // --- Transfers. Without an id they are not counted at the receiver. ---
  Submitted SubmitSingleWrite(RegionId source, uint64_t source_offset,
                              const RegionAddress& target,
                              uint64_t target_offset, uint64_t length,
                              std::optional<uint32_t> id,
                              MaybeDeadline deadline = {});
  // Page source.indices[i] goes to page target.indices[i]: one transfer.
  Submitted SubmitPagedWrites(RegionId source, const PageList& source_pages,
                              const RegionAddress& target,
                              const PageList& target_pages, uint64_t page_bytes,
                              std::optional<uint32_t> id,
                              MaybeDeadline deadline = {});
  // One transfer for each target.
  Submitted SubmitScatter(RegionId source,
                          const std::vector<ScatterTarget>& targets,
                          std::optional<uint32_t> id,
                          MaybeDeadline deadline = {});
  // Done once each member has submitted its barrier of this id as often as this
  // engine has. It says nothing about writes: theirs have counts.
  Submitted SubmitBarrier(PeerGroupId group, uint32_t id,
                          MaybeDeadline deadline = {});

  // Done once `transfers` more have come under `id`; it consumes them. Fails
  // early if one of `peers`, from whom they are to come, is lost.
  Submitted ExpectImmCount(uint32_t id, uint64_t transfers,
                           std::vector<uint32_t> peers = {},
                           MaybeDeadline deadline = {});
  // Transfers that have come and were not consumed.
  uint64_t ImmCount(uint32_t id) const { return counters_.Transfers(id); }
  StatusOr<std::shared_ptr<Watcher>> AllocWatcher(Watcher::Callback callback);
  void FreeWatcher(const std::shared_ptr<Watcher>& watcher);

  // Asks an operation to end early. False if it is done already; else its
  // future fails with kCancelled, unless it still succeeds.
  bool Cancel(const TransferFuture& future);
  // Does the worker's work until the operation is done, but only for a short
  // while: being woken takes longer than most operations.
  void Help(const TransferFuture& future, Deadline deadline);
  // Waits until all writes and messages submitted so far have ended.
  Status Drain(Deadline deadline);
  TransferEngineStats stats() const;
  Trace& trace() { return group_->trace(); }

 private:
  TransferEngine(TransferEngineOptions options,
                 std::unique_ptr<Transport> transport);

  void Work();  // the worker
  // Whether anything happened; nothing if another thread is at it.
  std::optional<bool> ProgressUnlessBusy();
  int64_t SleepNs();
  // And, for who waits. Functions named ...Locked need mutex_.
  bool Progress();
  bool ProgressLocked();
  // transfer_engine.cc
  StatusOr<SubmissionPtr> BeginLocked(SubmissionKind kind, OperationLabel label,
                                      MaybeDeadline deadline);
  void FinishLocked(const SubmissionPtr& submission, const Status& status,
                    uint32_t peer = kUnknownPeer);
  void StopLocked(const SubmissionPtr& submission, const Status& why);
  void HousekeepLocked(int64_t now_ns);
  void EndExpiredLocked(int64_t now_ns);
  std::string DescribeLocked(const Submission& submission) const;
  void HandleLocked(DomainGroup::Event& event);

  // transfer_engine_submit.cc
  Submitted SubmitWrites(OperationLabel label, RegionId source,
                         std::span<PendingWrite> writes,
                         std::optional<uint32_t> id, MaybeDeadline deadline);
  Status PrepareLocked(const LocalRegion& source, std::optional<uint32_t> id,
                       std::span<PendingWrite> writes);
  void PostLocked(const SubmissionPtr& submission, size_t part,
                  const LocalRegion& local, const PendingWrite& write);
  void EndPartLocked(const SubmissionPtr& submission, size_t part,
                     const Status& status);
  void CheckBarriersLocked();

  // transfer_engine_mapped.cc
  Status FindMappedLocked(PendingWrite* write);
  void CopyAndPost(const SubmissionPtr& submission, const std::byte* source,
                   std::span<PendingWrite> writes,
                   std::unique_lock<std::mutex>* lock);
  void MapAndWrite(uint32_t peer, RemoteMemory remote);

  // transfer_engine_spoilt.cc
  void CountLocked(TransferPeer* peer, Immediate immediate);
  void AnnounceLocked(TransferPeer& to, uint32_t id, const PendingWrite& what);
  void TellSpoiltLocked(const RandomId& receiver, uint32_t peer, uint32_t id);
  void HandleSpoiltLocked(TransferPeer& peer, uint32_t id);
  void SpoilLocked(uint32_t id, const std::string& why);
  void ForgetPartsLocked(const TransferPeer& peer);

  // transfer_engine_withdraw.cc
  Status HandleWithdrawLocked(TransferPeer& peer, const TransferFrame& frame);
  void HandleWithdrawnLocked(uint32_t peer, uint64_t number);
  void WriteEndedLocked(const Submission::Part& part);
  void AnswerWithdrawalLocked(TransferPeer& peer, uint64_t region);
  void RemoveUnusedLocked();
  void FenceLostLocked();

  // transfer_engine_peers.cc
  StatusOr<uint32_t> AddPeerLocked(const EngineAddress& address);
  Status JoinLocked(TransferPeer& peer);
  void SendHelloLocked(TransferPeer& peer, int64_t now_ns);
  void HandleFrameLocked(uint32_t peer, std::string_view bytes);
  void HandleStrangerLocked(std::string_view bytes);
  Status HandleHelloLocked(std::string_view body);
  Status HandleWelcomeLocked(TransferPeer& peer, std::string_view body);
  Status HandlePeerFrameLocked(TransferPeer& peer, TransferFrame frame);
  void ConnectedLocked(TransferPeer& peer);
  void RefuseLocked(const Status& why);
  void LosePeerLocked(uint32_t peer, const Status& why);
  void EndCopyLocked(uint32_t peer);
  void WatchPeersLocked(int64_t now_ns);
  void SayGoodbyeLocked(TransferPeer& peer, DomainGroup::Done done = {});
  StatusOr<TransferPeer*> FindPeerLocked(uint32_t peer);
  StatusOr<TransferPeer*> FindOwnerLocked(const RegionAddress& region);
  std::string NameLocked(uint32_t peer) const;

  const TransferEngineOptions options_;
  std::unique_ptr<Transport> transport_;
  EngineAddress self_;
  DomainCaps caps_;
  const std::shared_ptr<MessageInbox> inbox_;
  ImmCounterTable counters_;  // has a lock of its own

  mutable std::mutex mutex_;  // guards all that follows, up to stop_
  std::unique_ptr<DomainGroup> group_;
  MemoryRegistry registry_;
  bool closing_ = false;
  uint64_t next_number_ = 1;
  std::map<uint64_t, SubmissionPtr> live_;  // by number: the oldest first
  EndingRegions ending_;
  std::vector<SubmissionPtr> barriers_;
  uint32_t next_peer_ = 0;
  std::map<uint32_t, std::unique_ptr<TransferPeer>> peers_;
  std::unordered_map<RandomId, uint32_t> peer_by_engine_;
  std::map<uint32_t, std::string> lost_;  // why; the latest kLostMax
  MappedWrites mapped_;
  NonceMemory nonces_{kNoncesMax};
  SpoiltIds spoilt_;
  std::map<PeerGroupId, std::vector<uint32_t>> groups_;
  PeerGroupId next_group_ = 1;
  std::vector<std::shared_ptr<Watcher>> watchers_;
  WatcherWords watcher_words_;
  TransferEngineStats stats_;
  int64_t last_housekeeping_ns_ = 0;  // the worker's
  std::atomic<bool> stop_{false};
  std::thread worker_;
};

}  // namespace jaxfabric

#endif  // JAXFABRIC_ENGINE_TRANSFER_ENGINE_H_
