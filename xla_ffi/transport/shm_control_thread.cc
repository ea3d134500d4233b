// The control thread of ShmSwitchboard: all it does in answer to other
// processes.

#include <poll.h>
#include <pthread.h>
#include <sys/socket.h>

#include <algorithm>
#include <cerrno>
#include <string>
#include <string_view>
#include <utility>

#include "transport/shm_ring.h"
#include "transport/shm_switchboard.h"

namespace jaxfabric {
namespace {

// Connections to one Transport: 512 ranks from processes of their own.
constexpr size_t kIncomingMax = 512;
// How long a process without free descriptors waits before it accepts again.
constexpr int kAcceptPauseMs = 100;

pollfd Readable(int fd) { return {.fd = fd, .events = POLLIN, .revents = 0}; }

// Takes as long for a near miss as for a wild guess.
bool SameSecret(std::string_view ours, std::string_view theirs) {
  size_t difference = ours.size() ^ theirs.size();
  for (size_t i = 0; i < theirs.size(); ++i) {
    const char expected = ours.empty() ? '\0' : ours[i % ours.size()];
    difference |= static_cast<size_t>(
        static_cast<unsigned char>(static_cast<unsigned char>(expected) ^
                                   static_cast<unsigned char>(theirs[i])));
  }
  return difference == 0;
}

}  // namespace

void ShmSwitchboard::Run() {
  pthread_setname_np(pthread_self(), "jaxfabric-shm");
  bool accepting = true;
  for (;;) {
    std::vector<std::shared_ptr<Incoming>> incoming;
    std::vector<std::shared_ptr<ShmLink>> links;
    {
      std::lock_guard<std::mutex> lock(mutex_);
      if (stopping_) return;
      incoming = incoming_;
      links = links_;
    }
    std::vector<pollfd> fds;
    fds.push_back(Readable(wake_.get()));
    fds.push_back(Readable(accepting ? listener_.get() : -1));
    for (const auto& from : incoming) {
      fds.push_back(Readable(from->socket.get()));
    }
    for (const auto& link : links) fds.push_back(Readable(link->fd()));

    poll(fds.data(), fds.size(), accepting ? -1 : kAcceptPauseMs);

    uint64_t wakes = 0;
    [[maybe_unused]] const ssize_t drained =
        read(wake_.get(), &wakes, sizeof(wakes));
    accepting = fds[1].revents == 0 || Accept();
    const pollfd* ready = &fds[2];
    for (const auto& from : incoming) {
      if ((ready++)->revents != 0) Serve(from);
    }
    for (const auto& link : links) {
      if ((ready++)->revents != 0) Hear(link);
    }
  }
}

bool ShmSwitchboard::Accept() {
  UniqueFd socket(accept4(listener_.get(), nullptr, nullptr, SOCK_CLOEXEC));
  if (!socket.valid()) {
    return errno == EAGAIN || errno == EINTR || errno == ECONNABORTED;
  }
  if (!ShmPeerIsSameUser(socket.get())) return true;
  std::lock_guard<std::mutex> lock(mutex_);
  if (incoming_.size() >= kIncomingMax) return true;
  incoming_.push_back(std::make_shared<Incoming>());
  incoming_.back()->socket = std::move(socket);
  return true;
}

void ShmSwitchboard::Serve(const std::shared_ptr<Incoming>& from) {
  const ShmReceived received = ShmReceive(from->socket.get());
  if (received.kind == ShmReceived::Kind::kNothing) return;
  if (received.kind != ShmReceived::Kind::kMessage ||
      !Answer(*from, received.message)) {
    Drop(from);
  }
}

bool ShmSwitchboard::Answer(Incoming& from, const ShmControlMessage& request) {
  Status status;
  switch (request.kind) {
    case ShmControlKind::kAttach:
      status = AnswerAttach(from, request);
      break;
    case ShmControlKind::kMapRegion:
      status = AnswerMapRegion(from, request);
      break;
    case ShmControlKind::kDetach: {
      std::lock_guard<std::mutex> lock(mutex_);
      CloseRingsLocked(&from, &request.sender, &request.target);
      return true;
    }
    default:
      return false;
  }
  if (status.ok()) return true;
  ShmControlMessage reply;
  reply.serial = request.serial;
  reply.code = static_cast<uint32_t>(status.code());
  reply.SetText(status.message());
  return ShmSend(from.socket.get(), reply, {}, Deadline()).ok();
}

Status ShmSwitchboard::AnswerAttach(Incoming& from,
                                    const ShmControlMessage& request) {
  if (!SameSecret(options_.job_secret, request.Text())) {
    return Status(StatusCode::kUnauthenticated,
                  "the peer belongs to another job: the job secrets differ");
  }
  std::lock_guard<std::mutex> lock(mutex_);
  JF_ASSIGN_OR_RETURN(const std::shared_ptr<ShmIncomingRing> ring,
                      OpenRingLocked(&from, request.target, request.sender));
  from.trusted = true;
  ShmControlMessage reply;
  reply.serial = request.serial;
  const int fds[] = {ring->memory.fd(), doorbell_memory_.fd()};
  const Status sent = ShmSend(from.socket.get(), reply, fds, Deadline());
  ring->memory.CloseFd();
  return sent;
}

Status ShmSwitchboard::AnswerMapRegion(Incoming& from,
                                       const ShmControlMessage& request) {
  if (!from.trusted) {
    return Status(StatusCode::kUnauthenticated,
                  "a region was asked for before the job secret was shown");
  }
  std::lock_guard<std::mutex> lock(mutex_);
  JF_ASSIGN_OR_RETURN(const Region* const region,
                      FindRegionLocked(request.target, request.key));
  ShmControlMessage reply;
  reply.serial = request.serial;
  reply.key = request.key;
  reply.length = region->length;
  reply.target = request.target;
  const int fds[] = {region->fd.get()};
  return ShmSend(from.socket.get(), reply, fds, Deadline());
}

void ShmSwitchboard::Drop(const std::shared_ptr<Incoming>& from) {
  std::lock_guard<std::mutex> lock(mutex_);
  CloseRingsLocked(from.get(), nullptr, nullptr);
  std::erase(incoming_, from);
  shutdown(from->socket.get(), SHUT_RDWR);
}

void ShmSwitchboard::Hear(const std::shared_ptr<ShmLink>& link) {
  ShmReceived received = ShmReceive(link->fd());
  Status lost;
  switch (received.kind) {
    case ShmReceived::Kind::kNothing:
      return;
    case ShmReceived::Kind::kEnded:
      lost = Status(StatusCode::kUnavailable,
                    "the peer's process ended without a word (killed, crashed, "
                    "or closed its transport)");
      break;
    case ShmReceived::Kind::kNonsense:
      lost = Status(StatusCode::kDataLoss,
                    "the peer's process sent nonsense on its control socket");
      break;
    case ShmReceived::Kind::kMessage:
      if (received.message.kind == ShmControlKind::kReply) {
        link->Deliver(std::move(received));
        return;
      }
      if (received.message.kind == ShmControlKind::kRegionGone) {
        link->Forget(received.message.key);
        return;
      }
      if (received.message.kind == ShmControlKind::kDomainClosed) {
        std::lock_guard<std::mutex> lock(mutex_);
        ReportLossLocked(link.get(), &received.message.target, ClosedStatus());
        return;
      }
      lost = Status(StatusCode::kDataLoss,
                    "the peer's process sent an unknown control message");
      break;
  }
  link->Fail(lost);
  std::lock_guard<std::mutex> lock(mutex_);
  ReportLossLocked(link.get(), nullptr, lost);
  std::erase(links_, link);
  link->Shutdown();
}

}  // namespace jaxfabric
