// ShmSwitchboard: joins the Domains of one shm Transport with their peers.
//
// It owns what is shared by the Domains: the doorbell, the listening socket,
// the connections, the registered regions, and the control thread, which
// sleeps in poll() and never touches payload.

#ifndef JAXFABRIC_TRANSPORT_SHM_SWITCHBOARD_H_
#define JAXFABRIC_TRANSPORT_SHM_SWITCHBOARD_H_

#include <array>
#include <atomic>
#include <cstdint>
#include <memory>
#include <mutex>
#include <string>
#include <thread>
#include <unordered_map>
#include <vector>

#include "base/deadline.h"
#include "base/doorbell.h"
#include "base/shared_memory.h"
#include "base/status.h"
#include "base/unique_fd.h"
#include "transport/shm.h"
#include "transport/shm_control.h"
#include "transport/shm_link.h"
#include "transport/transport.h"

namespace jaxfabric {

// A ring that an initiator fills and a Domain of this Transport empties.
struct ShmIncomingRing {
  SharedMemory memory;
  ShmAddress initiator;
  // No entry comes after those that are visible once this is seen.
  std::atomic<bool> closed = false;
};

// What the switchboard tells a Domain; its owner looks when it polls.
struct ShmInbox {
  struct Loss {
    ShmAddress peer;
    Status status;
  };

  std::atomic<bool> has_news = false;
  std::atomic<uint32_t> open_rings = 0;
  std::mutex mutex;
  std::vector<std::shared_ptr<ShmIncomingRing>> rings;  // guarded by mutex
  std::vector<Loss> losses;                             // guarded by mutex
};

// What an initiator needs to reach a target.
struct ShmAttachment {
  std::shared_ptr<ShmLink> link;  // null: a Domain of the same Transport
  // Keeps the ring's memory: the target's own, or this process's mapping.
  std::shared_ptr<void> ring_owner;
  std::byte* ring = nullptr;
  std::shared_ptr<void> doorbell_owner;
  DoorbellWords* doorbell = nullptr;
};

class ShmSwitchboard {
 public:
  static StatusOr<std::unique_ptr<ShmSwitchboard>> Start(ShmOptions options);
  ~ShmSwitchboard();

  Doorbell& doorbell() { return doorbell_; }

  // A Domain enters with its inbox, and leaves before the inbox goes.
  ShmAddress Enter(ShmInbox* inbox);
  void Leave(const ShmAddress& domain);

  // Initiator's side. A failed Attach leaves nothing behind.
  StatusOr<ShmAttachment> Attach(const ShmAddress& initiator, ShmInbox* inbox,
                                 const ShmAddress& target, Deadline deadline);
  void Detach(const ShmAddress& initiator, const ShmAddress& target,
              const std::shared_ptr<ShmLink>& link);
  StatusOr<std::shared_ptr<ShmMapping>> MapRegion(
      const std::shared_ptr<ShmLink>& link, const ShmAddress& target,
      uint64_t key, Deadline deadline);

  // Target's side.
  StatusOr<uint64_t> AddRegion(const ShmAddress& owner,
                               const MemoryRegion& region);
  void RemoveRegion(uint64_t key);

 private:
  // A connection that somebody opened to this Transport.
  struct Incoming {
    UniqueFd socket;
    bool trusted = false;  // an Attach with the job's secret came over it
  };
  struct OpenRing {
    const Incoming* from = nullptr;  // null: the same Transport
    ShmAddress target;
    std::shared_ptr<ShmIncomingRing> ring;
  };
  // A Domain of this Transport that must hear when `target` is lost.
  struct Watch {
    const ShmLink* link = nullptr;  // null: the same Transport
    ShmAddress target;
    ShmAddress initiator;
    ShmInbox* inbox = nullptr;
  };
  struct Member {
    ShmAddress address;
    ShmInbox* inbox = nullptr;
  };
  struct Region {
    uint32_t domain = 0;
    UniqueFd fd;
    uint64_t length = 0;
    std::weak_ptr<ShmMapping> mapping;  // for Domains of the same Transport
  };

  static Status ClosedStatus();

  explicit ShmSwitchboard(ShmOptions options) : options_(std::move(options)) {}

  // Functions named ...Locked need mutex_.
  const Member* FindLocked(const ShmAddress& address) const;
  StatusOr<std::shared_ptr<ShmIncomingRing>> OpenRingLocked(
      const Incoming* from, const ShmAddress& target,
      const ShmAddress& initiator);
  StatusOr<Region*> FindRegionLocked(const ShmAddress& target, uint64_t key);
  StatusOr<std::shared_ptr<ShmMapping>> MapOwnRegionLocked(Region& region);
  void ReportLossLocked(const ShmLink* link, const ShmAddress* target,
                        const Status& why);
  void TellInitiatorsLocked(const ShmControlMessage& message);

  void CloseRingsLocked(const Incoming* from, const ShmAddress* initiator,
                        const ShmAddress* target);
  std::shared_ptr<ShmLink> WatchOverLinkLocked(const Watch& watch);

  // The link to the Transport of `watch.target`, with `watch` in force.
  StatusOr<std::shared_ptr<ShmLink>> LinkTo(const Watch& watch,
                                            Deadline deadline);
  StatusOr<ShmAttachment> AttachLocal(const Watch& watch);
  StatusOr<ShmAttachment> AttachOver(const std::shared_ptr<ShmLink>& link,
                                     const Watch& watch, Deadline deadline);
  void WakeControlThread();

  // The control thread.
  void Run();
  // False: descriptors have run out.
  bool Accept();
  void Serve(const std::shared_ptr<Incoming>& from);
  // False: `from` does not keep to the protocol.
  bool Answer(Incoming& from, const ShmControlMessage& request);
  Status AnswerAttach(Incoming& from, const ShmControlMessage& request);
  Status AnswerMapRegion(Incoming& from, const ShmControlMessage& request);
  void Drop(const std::shared_ptr<Incoming>& from);
  void Hear(const std::shared_ptr<ShmLink>& link);

  const ShmOptions options_;
  SharedMemory doorbell_memory_;
  Doorbell doorbell_{nullptr};
  std::array<uint64_t, 2> process_ = {};
  UniqueFd listener_;
  UniqueFd wake_;  // eventfd

  std::mutex mutex_;
  bool stopping_ = false;                            // guarded by mutex_
  uint32_t next_domain_ = 0;                         // guarded by mutex_
  uint32_t next_region_ = 1;                         // guarded by mutex_
  std::vector<Member> members_;                      // guarded by mutex_
  std::vector<OpenRing> rings_;                      // guarded by mutex_
  std::vector<Watch> watches_;                       // guarded by mutex_
  std::vector<std::shared_ptr<Incoming>> incoming_;  // guarded by mutex_
  std::vector<std::shared_ptr<ShmLink>> links_;      // guarded by mutex_
  std::unordered_map<uint64_t, Region> regions_;     // guarded by mutex_

  std::thread control_thread_;
};

}  // namespace jaxfabric

#endif  // JAXFABRIC_TRANSPORT_SHM_SWITCHBOARD_H_
