// Endpoint: one local rank's end of the fabric: its Domains, its heap, its
// mailboxes and windows. Thread-safe.

#ifndef JAXFABRIC_ENGINE_ENDPOINT_H_
#define JAXFABRIC_ENGINE_ENDPOINT_H_

#include <cstdint>
#include <deque>
#include <functional>
#include <memory>
#include <mutex>
#include <optional>
#include <string>
#include <unordered_map>
#include <unordered_set>
#include <vector>

#include "base/shared_memory.h"
#include "base/status.h"
#include "engine/control_message.h"
#include "engine/domain_group.h"
#include "engine/imm_counter.h"
#include "engine/immediate.h"
#include "engine/inbox.h"
#include "engine/mailbox.h"
#include "engine/match_table.h"
#include "engine/operation.h"
#include "engine/outbox.h"
#include "engine/rank_address.h"
#include "engine/span_allocator.h"
#include "engine/trace.h"

namespace jaxfabric {

// What went to and came from one peer since the start.
struct PeerStats {
  uint64_t messages_sent = 0;
  uint64_t message_bytes_sent = 0;  // headers and rows, as on the wire
  uint64_t messages_received = 0;
  uint64_t message_bytes_received = 0;
  uint64_t puts = 0;  // into the peer's windows
  uint64_t put_bytes = 0;
  uint64_t control_messages = 0;
  uint64_t stale_dropped = 0;  // messages of another generation
};

// One contiguous part of a put.
struct WindowPart {
  const std::byte* source = nullptr;
  uint64_t window_offset = 0;  // into all windows of the target
  uint64_t bytes = 0;
};

struct EndpointOptions {
  uint32_t rank = 0;
  uint32_t generation = 0;
  HeapLayout heap;
};

class Endpoint {
 public:
  // Why the generation ends.
  struct Loss {
    std::optional<uint32_t> rank;  // that is lost, if one is
    bool told = false;             // by a peer that gave up
    Status status;
  };
  // Called without locks held.
  using Lost = std::function<void(Loss)>;

  static StatusOr<std::unique_ptr<Endpoint>> Open(
      EndpointOptions options, std::vector<std::unique_ptr<Domain>> domains,
      Lost lost);

  uint32_t rank() const { return options_.rank; }
  const HeapLayout& heap_layout() const { return options_.heap; }
  std::byte* heap() const { return heap_.data(); }
  RankAddress address() const;
  Status Connect(uint32_t peer, const RankAddress& address, Deadline deadline);

  // How often `channel` was executed here before.
  uint64_t NextSequence(uint64_t channel);
  // False if an execution of `channel` is under way: two that nothing orders
  // cannot be told apart.
  bool EnterChannel(uint64_t channel);
  void LeaveChannel(uint64_t channel);

  // Sends at once, or when the destination gives credit.
  void Send(Outgoing outgoing);

  // Like MatchTable::Expect; `ready` runs on the ElasticPool.
  bool Expect(MatchKey key, std::vector<uint32_t> sources,
              const OperationPtr& operation, MatchTable::Ready ready,
              std::vector<Arrival>* arrivals);
  // The message was read; its slot goes back to its source.
  void Release(const Arrival& arrival);
  std::string DescribeMissing(MatchKey key) const;

  // Writes `parts` into `peer`'s window memory and counts one transfer under
  // `slot` there. Their sources are read before this returns, or while
  // `operation` lives.
  void Put(uint32_t peer, std::vector<WindowPart> parts, uint32_t slot,
           OperationPtr operation);

  ImmCounterTable& window_counters() { return window_counters_; }
  Trace& trace() { return group_.trace(); }

  // Moves everything forward; true if anything happened.
  bool Progress();

  // Tells all peers that the generation is over, why, and which rank is lost.
  void BroadcastAbort(const Status& status, std::optional<uint32_t> lost_rank);
  // Tells all peers that nothing more comes from here, after all else that was
  // sent; who still needs this rank fails.
  void SayGoodbye();
  // Drops all that waits here. Whoever waits must have been failed before.
  void DropWaiting();
  // True once nothing posted here is on its way, control messages included.
  bool Drained() const;

  std::unordered_map<uint32_t, PeerStats> stats() const;

 private:
  struct PendingPut {
    uint32_t peer;
    std::vector<WindowPart> parts;
    uint64_t bytes;  // of all parts
    uint32_t slot;
    OperationPtr operation;
  };
  struct Peer {
    explicit Peer(uint64_t mailbox_bytes)
        : outbox(mailbox_bytes), inbox(mailbox_bytes) {}
    RankAddress address;
    std::byte* direct = nullptr;  // the peer's heap, if mapped here
    bool lost = false;
    // It said goodbye, after so many messages; not a failure unless needed.
    bool departed = false;
    uint64_t messages_until_goodbye = 0;
    PeerStats stats;
    Outbox outbox;
    Inbox inbox;
  };
  using Tasks = std::vector<std::function<void()>>;

  Endpoint(EndpointOptions options,
           std::vector<std::unique_ptr<Domain>> domains, Lost lost);
  static Loss Departed(uint32_t rank);
  // Whether no message comes from `peer` any more.
  static bool Gone(const Peer& peer);
  Status OpenHeap();
  StatusOr<std::vector<uint64_t>> Register(const SharedMemory& memory);
  void Unposted(const OperationPtr& operation, const Status& why);
  Status Write(uint32_t peer, const std::vector<Piece>& pieces, TransferId id,
               std::function<void()> done);
  void PackAndPost(const Outgoing& outgoing, Outbox::Place place);
  void SendControl(uint32_t peer, ControlMessage::Type type, uint64_t argument,
                   const std::string& text);
  void FlushCredits(uint32_t name, Peer& peer);
  void TakeCredits(uint32_t name, Peer& peer, uint64_t mask, Tasks* tasks);
  // Sends what waits, as far as there is room now.
  void SendWaiting(Peer& peer, Tasks* tasks);
  Status OnImmediate(uint32_t name, Peer& peer, uint32_t word, Tasks* tasks);
  Status OnMailbox(uint32_t name, Peer& peer, uint32_t slot, Tasks* tasks);
  Status OnControl(uint32_t name, Peer& peer, const std::string& bytes,
                   Tasks* tasks, std::vector<Loss>* losses);
  Loss OnAbort(uint32_t name, const ControlMessage& message) const;
  void HandleEvents(std::vector<DomainGroup::Event>& events, Tasks* tasks,
                    std::vector<Loss>* losses);
  void CopyInto(std::byte* heap, const std::vector<WindowPart>& parts) const;
  void PumpPuts();
  void CountLocally(uint32_t slot);

  const EndpointOptions options_;
  const Lost lost_;
  SharedMemory heap_;
  SharedMemory staging_;  // only where peers' memory is not mapped
  LocalRegion staging_region_;
  std::vector<uint64_t> heap_keys_;
  ImmCounterTable window_counters_;

  mutable std::mutex mutex_;  // guards what follows
  DomainGroup group_;
  std::unordered_map<uint32_t, std::unique_ptr<Peer>> peers_;
  MatchTable matches_;
  std::unordered_map<uint64_t, uint64_t> sequences_;
  std::unordered_set<uint64_t> channels_under_way_;
  SpanAllocator put_spans_;
  std::deque<PendingPut> puts_;
  uint64_t writes_open_ = 0;
  std::vector<Loss> failed_writes_;  // to be reported without locks held
};

}  // namespace jaxfabric

#endif  // JAXFABRIC_ENGINE_ENDPOINT_H_
