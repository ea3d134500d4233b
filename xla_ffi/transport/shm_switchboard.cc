#include "transport/shm_switchboard.h"

#include <fcntl.h>
#include <sys/eventfd.h>
#include <sys/socket.h>
#include <sys/stat.h>

#include <algorithm>
#include <cerrno>
#include <cstring>
#include <utility>

#include "base/check.h"
#include "transport/shm_ring.h"

namespace jaxfabric {
Status ShmSwitchboard::ClosedStatus() {
  return Status(StatusCode::kUnavailable,
                "the peer closed its Domain; nothing more comes from it");
}

StatusOr<std::unique_ptr<ShmSwitchboard>> ShmSwitchboard::Start(
    ShmOptions options) {
  if (options.job_secret.size() > kShmTextBytes) {
    return Status(
        StatusCode::kInvalidArgument,
        "the job secret has " + std::to_string(options.job_secret.size()) +
            " bytes; shm takes up to " + std::to_string(kShmTextBytes));
  }
  std::unique_ptr<ShmSwitchboard> board(new ShmSwitchboard(std::move(options)));
  JF_ASSIGN_OR_RETURN(
      board->doorbell_memory_,
      SharedMemory::Create("jaxfabric-doorbell", sizeof(DoorbellWords)));
  board->doorbell_ = Doorbell(
      reinterpret_cast<DoorbellWords*>(board->doorbell_memory_.data()));
  board->process_ = {RandomU64(), RandomU64()};
  JF_ASSIGN_OR_RETURN(board->listener_, ShmListen(board->process_));
  board->wake_ = UniqueFd(eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK));
  if (!board->wake_.valid()) {
    return Status(StatusCode::kResourceExhausted,
                  std::string("eventfd failed: ") + std::strerror(errno));
  }
  board->control_thread_ = std::thread([raw = board.get()] { raw->Run(); });
  return board;
}

ShmSwitchboard::~ShmSwitchboard() {
  if (!control_thread_.joinable()) return;  // Start failed
  {
    std::lock_guard<std::mutex> lock(mutex_);
    JF_CHECK(members_.empty());  // Domains go before their Transport
    stopping_ = true;
  }
  WakeControlThread();
  control_thread_.join();
  // Not left to close(): a forked child may hold copies of the descriptors.
  for (const auto& from : incoming_) shutdown(from->socket.get(), SHUT_RDWR);
}

ShmAddress ShmSwitchboard::Enter(ShmInbox* inbox) {
  std::lock_guard<std::mutex> lock(mutex_);
  ShmAddress address;
  address.domain = next_domain_++;
  address.nonce = RandomU64();
  address.host = ShmHost();
  address.process = process_;
  members_.push_back({address, inbox});
  return address;
}

void ShmSwitchboard::Leave(const ShmAddress& domain) {
  std::lock_guard<std::mutex> lock(mutex_);
  std::erase_if(members_,
                [&](const Member& member) { return member.address == domain; });
  std::erase_if(watches_,
                [&](const Watch& watch) { return watch.initiator == domain; });
  std::erase_if(rings_,
                [&](const OpenRing& open) { return open.target == domain; });
  ReportLossLocked(nullptr, &domain, ClosedStatus());
  ShmControlMessage farewell;
  farewell.kind = ShmControlKind::kDomainClosed;
  farewell.target = domain;
  TellInitiatorsLocked(farewell);
}

StatusOr<ShmAttachment> ShmSwitchboard::Attach(const ShmAddress& initiator,
                                               ShmInbox* inbox,
                                               const ShmAddress& target,
                                               Deadline deadline) {
  Watch watch = {nullptr, target, initiator, inbox};
  if (target.process == process_) return AttachLocal(watch);
  JF_ASSIGN_OR_RETURN(const std::shared_ptr<ShmLink> link,
                      LinkTo(watch, deadline));
  StatusOr<ShmAttachment> attachment = AttachOver(link, watch, deadline);
  if (!attachment.ok()) Detach(initiator, target, link);
  return attachment;
}

StatusOr<ShmAttachment> ShmSwitchboard::AttachLocal(const Watch& watch) {
  std::lock_guard<std::mutex> lock(mutex_);
  JF_ASSIGN_OR_RETURN(const std::shared_ptr<ShmIncomingRing> ring,
                      OpenRingLocked(nullptr, watch.target, watch.initiator));
  ring->memory.CloseFd();
  watches_.push_back(watch);
  ShmAttachment attachment;
  attachment.ring = ring->memory.data();
  attachment.ring_owner = ring;
  attachment.doorbell =
      reinterpret_cast<DoorbellWords*>(doorbell_memory_.data());
  return attachment;
}

StatusOr<std::shared_ptr<ShmLink>> ShmSwitchboard::LinkTo(const Watch& watch,
                                                          Deadline deadline) {
  {
    std::lock_guard<std::mutex> lock(mutex_);
    if (auto link = WatchOverLinkLocked(watch)) return link;
  }
  // Not under mutex_: it may wait. Two Domains may both come here; the second
  // link is then dropped unused.
  JF_ASSIGN_OR_RETURN(UniqueFd socket,
                      ShmConnect(watch.target.process, deadline));
  std::lock_guard<std::mutex> lock(mutex_);
  if (auto link = WatchOverLinkLocked(watch)) return link;
  links_.push_back(
      std::make_shared<ShmLink>(std::move(socket), watch.target.process));
  WakeControlThread();
  return WatchOverLinkLocked(watch);
}

std::shared_ptr<ShmLink> ShmSwitchboard::WatchOverLinkLocked(
    const Watch& watch) {
  for (const std::shared_ptr<ShmLink>& link : links_) {
    if (link->process() != watch.target.process) continue;
    watches_.push_back(watch);
    watches_.back().link = link.get();
    return link;
  }
  return nullptr;
}

StatusOr<ShmAttachment> ShmSwitchboard::AttachOver(
    const std::shared_ptr<ShmLink>& link, const Watch& watch,
    Deadline deadline) {
  ShmControlMessage request;
  request.kind = ShmControlKind::kAttach;
  request.target = watch.target;
  request.sender = watch.initiator;
  request.SetText(options_.job_secret);
  JF_ASSIGN_OR_RETURN(ShmReceived reply, link->Request(request, deadline));
  auto ring = std::make_shared<SharedMemory>();
  auto doorbell = std::make_shared<SharedMemory>();
  JF_ASSIGN_OR_RETURN(*ring, SharedMemory::Attach(std::move(reply.fds[0]),
                                                  sizeof(ShmRingLayout)));
  JF_ASSIGN_OR_RETURN(*doorbell, SharedMemory::Attach(std::move(reply.fds[1]),
                                                      sizeof(DoorbellWords)));
  ShmAttachment attachment;
  attachment.link = link;
  attachment.ring = ring->data();
  attachment.ring_owner = std::move(ring);
  attachment.doorbell = reinterpret_cast<DoorbellWords*>(doorbell->data());
  attachment.doorbell_owner = std::move(doorbell);
  return attachment;
}

void ShmSwitchboard::Detach(const ShmAddress& initiator,
                            const ShmAddress& target,
                            const std::shared_ptr<ShmLink>& link) {
  std::lock_guard<std::mutex> lock(mutex_);
  std::erase_if(watches_, [&](const Watch& watch) {
    return watch.initiator == initiator && watch.target == target;
  });
  if (link == nullptr) {
    CloseRingsLocked(nullptr, &initiator, &target);
    return;
  }
  ShmControlMessage message;
  message.kind = ShmControlKind::kDetach;
  message.target = target;
  message.sender = initiator;
  link->Notify(message);
  const bool used =
      std::any_of(watches_.begin(), watches_.end(),
                  [&](const Watch& watch) { return watch.link == link.get(); });
  if (!used) {
    std::erase(links_, link);
    link->Shutdown();  // also makes the control thread let go of it
  }
}

StatusOr<std::shared_ptr<ShmMapping>> ShmSwitchboard::MapRegion(
    const std::shared_ptr<ShmLink>& link, const ShmAddress& target,
    uint64_t key, Deadline deadline) {
  if (link != nullptr) return link->Map(target, key, deadline);
  std::lock_guard<std::mutex> lock(mutex_);
  JF_ASSIGN_OR_RETURN(Region* const region, FindRegionLocked(target, key));
  return MapOwnRegionLocked(*region);
}

// A mapping of its own, like that of another process: a write that races with
// UnregisterMemory then hits live pages, whatever the owner does with its own.
StatusOr<std::shared_ptr<ShmMapping>> ShmSwitchboard::MapOwnRegionLocked(
    Region& region) {
  if (auto mapping = region.mapping.lock()) return mapping;
  auto mapping = std::make_shared<ShmMapping>();
  JF_ASSIGN_OR_RETURN(
      mapping->memory,
      SharedMemory::Attach(UniqueFd(fcntl(region.fd.get(), F_DUPFD_CLOEXEC, 0)),
                           region.length));
  mapping->domain = region.domain;
  region.mapping = mapping;
  return mapping;
}

StatusOr<uint64_t> ShmSwitchboard::AddRegion(const ShmAddress& owner,
                                             const MemoryRegion& region) {
  struct stat info = {};
  const int seals = fcntl(region.fd, F_GET_SEALS);
  if (seals < 0 || (seals & F_SEAL_SHRINK) == 0 ||
      fstat(region.fd, &info) != 0 ||
      static_cast<uint64_t>(info.st_size) < region.length) {
    return Status(StatusCode::kInvalidArgument,
                  "shm registers only memory that lies at the start of a memfd "
                  "of sealed size, since peers map it: allocate it with "
                  "SharedMemory::Create and pass its fd");
  }
  UniqueFd fd(fcntl(region.fd, F_DUPFD_CLOEXEC, 0));
  if (!fd.valid()) {
    return Status(StatusCode::kResourceExhausted,
                  std::string("dup of a region's descriptor failed: ") +
                      std::strerror(errno));
  }
  std::lock_guard<std::mutex> lock(mutex_);
  const uint64_t key = RandomU64() << 32 | next_region_++;
  Region& added = regions_[key];
  added.domain = owner.domain;
  added.fd = std::move(fd);
  added.length = region.length;
  return key;
}

void ShmSwitchboard::RemoveRegion(uint64_t key) {
  std::lock_guard<std::mutex> lock(mutex_);
  const auto found = regions_.find(key);
  if (found == regions_.end()) return;
  if (auto mapping = found->second.mapping.lock()) {
    mapping->gone.store(true, std::memory_order_release);
  }
  regions_.erase(found);
  ShmControlMessage message;
  message.kind = ShmControlKind::kRegionGone;
  message.key = key;
  TellInitiatorsLocked(message);
}

const ShmSwitchboard::Member* ShmSwitchboard::FindLocked(
    const ShmAddress& address) const {
  for (const Member& member : members_) {
    if (member.address == address) return &member;
  }
  return nullptr;
}

StatusOr<std::shared_ptr<ShmIncomingRing>> ShmSwitchboard::OpenRingLocked(
    const Incoming* from, const ShmAddress& target,
    const ShmAddress& initiator) {
  const Member* member = FindLocked(target);
  if (member == nullptr) {
    return Status(
        StatusCode::kNotFound,
        "stale shm address: its Domain was closed, the process lives");
  }
  for (const OpenRing& open : rings_) {
    if (open.from == from && open.target == target &&
        open.ring->initiator == initiator) {
      return Status(StatusCode::kAlreadyExists,
                    "this initiator is connected already");
    }
  }
  ShmInbox& inbox = *member->inbox;
  if (inbox.open_rings.load(std::memory_order_relaxed) >= options_.peers_max) {
    return Status(StatusCode::kResourceExhausted,
                  "the peer's Domain has its " +
                      std::to_string(options_.peers_max) +
                      " peers already; raise ShmOptions::peers_max there");
  }
  auto ring = std::make_shared<ShmIncomingRing>();
  JF_ASSIGN_OR_RETURN(
      ring->memory,
      SharedMemory::Create("jaxfabric-ring", sizeof(ShmRingLayout)));
  ring->initiator = initiator;
  inbox.open_rings.fetch_add(1, std::memory_order_relaxed);
  rings_.push_back({from, target, ring});
  std::lock_guard<std::mutex> lock(inbox.mutex);
  inbox.rings.push_back(ring);
  inbox.has_news.store(true, std::memory_order_release);
  return ring;
}

// Of `from`, and of this initiator and target where they are given.
void ShmSwitchboard::CloseRingsLocked(const Incoming* from,
                                      const ShmAddress* initiator,
                                      const ShmAddress* target) {
  const size_t closed = std::erase_if(rings_, [&](const OpenRing& open) {
    if (open.from != from) return false;
    if (initiator != nullptr && open.ring->initiator != *initiator) {
      return false;
    }
    if (target != nullptr && open.target != *target) return false;
    open.ring->closed.store(true, std::memory_order_release);
    return true;
  });
  if (closed > 0) doorbell_.Ring();
}

StatusOr<ShmSwitchboard::Region*> ShmSwitchboard::FindRegionLocked(
    const ShmAddress& target, uint64_t key) {
  const auto found = regions_.find(key);
  if (found == regions_.end()) {
    return Status(
        StatusCode::kNotFound,
        "the peer has no memory registered under this key (any more)");
  }
  if (FindLocked(target) == nullptr || found->second.domain != target.domain) {
    return Status(StatusCode::kPermissionDenied,
                  "the key belongs to another Domain of the peer");
  }
  return &found->second;
}

// To all who watch `target` (or anything, if null) over `link`.
void ShmSwitchboard::ReportLossLocked(const ShmLink* link,
                                      const ShmAddress* target,
                                      const Status& why) {
  const size_t told = std::erase_if(watches_, [&](const Watch& watch) {
    if (watch.link != link) return false;
    if (target != nullptr && watch.target != *target) return false;
    std::lock_guard<std::mutex> lock(watch.inbox->mutex);
    watch.inbox->losses.push_back({watch.target, why});
    watch.inbox->has_news.store(true, std::memory_order_release);
    return true;
  });
  if (told > 0) doorbell_.Ring();
}

void ShmSwitchboard::TellInitiatorsLocked(const ShmControlMessage& message) {
  for (const auto& from : incoming_) {
    if (!from->trusted) continue;
    // The control thread must never wait for a peer. One whose socket is full
    // hears of the end of the connection instead.
    if (!ShmSend(from->socket.get(), message, {}, Deadline()).ok()) {
      shutdown(from->socket.get(), SHUT_RDWR);
    }
  }
}

void ShmSwitchboard::WakeControlThread() {
  const uint64_t one = 1;
  // Can only fail when it is about to wake up anyway.
  [[maybe_unused]] const ssize_t written =
      write(wake_.get(), &one, sizeof(one));
}

}  // namespace jaxfabric
