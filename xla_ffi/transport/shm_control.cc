#include "transport/shm_control.h"

#include <poll.h>
#include <sys/socket.h>
#include <sys/time.h>
#include <sys/un.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <climits>
#include <cstring>
#include <string>
#include <utility>

namespace jaxfabric {
namespace {

struct SocketAddress {
  sockaddr_un words = {};
  socklen_t length = 0;
};

// A leading zero byte: the abstract name space, which is no file.
SocketAddress AbstractAddress(const std::array<uint64_t, 2>& process) {
  const std::string name = ShmSocketName(process);
  SocketAddress address;
  address.words.sun_family = AF_UNIX;
  std::memcpy(address.words.sun_path + 1, name.data(), name.size());
  address.length =
      static_cast<socklen_t>(offsetof(sockaddr_un, sun_path) + 1 + name.size());
  return address;
}

Status SystemError(const char* call) {
  return Status(StatusCode::kUnavailable,
                std::string(call) + " failed: " + std::strerror(errno));
}

bool IsOurs(const ShmControlMessage& message, size_t bytes) {
  return bytes == sizeof(message) && message.magic == kShmMagic &&
         message.version == kShmVersion && message.text_bytes <= kShmTextBytes;
}

}  // namespace

void ShmControlMessage::SetText(std::string_view value) {
  text_bytes = static_cast<uint32_t>(std::min(value.size(), kShmTextBytes));
  std::memcpy(text, value.data(), text_bytes);
}

std::string_view ShmControlMessage::Text() const {
  return std::string_view(text, text_bytes);
}

StatusOr<UniqueFd> ShmListen(const std::array<uint64_t, 2>& process) {
  UniqueFd listener(
      socket(AF_UNIX, SOCK_SEQPACKET | SOCK_CLOEXEC | SOCK_NONBLOCK, 0));
  if (!listener.valid()) return SystemError("socket");
  const SocketAddress address = AbstractAddress(process);
  if (bind(listener.get(), reinterpret_cast<const sockaddr*>(&address.words),
           address.length) != 0) {
    return SystemError("bind");
  }
  if (listen(listener.get(), SOMAXCONN) != 0) return SystemError("listen");
  return listener;
}

StatusOr<UniqueFd> ShmConnect(const std::array<uint64_t, 2>& process,
                              Deadline deadline) {
  UniqueFd connection(socket(AF_UNIX, SOCK_SEQPACKET | SOCK_CLOEXEC, 0));
  if (!connection.valid()) return SystemError("socket");
  // Bounds connect(), which waits while the backlog is full; it is the only
  // call on this socket that blocks. Zero would mean: for ever.
  const int64_t room_us =
      std::max<int64_t>(1, deadline.RemainingNanoseconds() / 1000);
  const timeval patience = {.tv_sec = room_us / 1'000'000,
                            .tv_usec = room_us % 1'000'000};
  setsockopt(connection.get(), SOL_SOCKET, SO_SNDTIMEO, &patience,
             sizeof(patience));
  const SocketAddress address = AbstractAddress(process);
  int result = 0;
  do {
    result = connect(connection.get(),
                     reinterpret_cast<const sockaddr*>(&address.words),
                     address.length);
  } while (result != 0 && errno == EINTR && !deadline.Expired());
  if (result != 0) {
    if (errno == ECONNREFUSED) {
      return Status(StatusCode::kNotFound,
                    "stale shm address: the process that published it has "
                    "ended, closed its transport, or is in a container with "
                    "another network namespace");
    }
    if (errno == EAGAIN || errno == EINTR) {
      return Status(StatusCode::kDeadlineExceeded,
                    "the peer process did not accept the connection in time");
    }
    return SystemError("connect");
  }
  if (!ShmPeerIsSameUser(connection.get())) {
    return Status(StatusCode::kPermissionDenied,
                  "the peer process belongs to another user");
  }
  return connection;
}

bool ShmPeerIsSameUser(int socket) {
  ucred credentials = {};
  socklen_t bytes = sizeof(credentials);
  return getsockopt(socket, SOL_SOCKET, SO_PEERCRED, &credentials, &bytes) ==
             0 &&
         credentials.uid == geteuid();
}

Status ShmSend(int socket, const ShmControlMessage& message,
               std::span<const int> fds, Deadline deadline) {
  iovec bytes = {.iov_base = const_cast<ShmControlMessage*>(&message),
                 .iov_len = sizeof(message)};
  msghdr header = {};
  header.msg_iov = &bytes;
  header.msg_iovlen = 1;
  alignas(cmsghdr) char control[CMSG_SPACE(2 * sizeof(int))] = {};
  if (!fds.empty()) {
    header.msg_control = control;
    header.msg_controllen = CMSG_SPACE(fds.size_bytes());
    cmsghdr* rights = CMSG_FIRSTHDR(&header);
    rights->cmsg_level = SOL_SOCKET;
    rights->cmsg_type = SCM_RIGHTS;
    rights->cmsg_len = CMSG_LEN(fds.size_bytes());
    std::memcpy(CMSG_DATA(rights), fds.data(), fds.size_bytes());
  }
  for (;;) {
    if (sendmsg(socket, &header, MSG_DONTWAIT | MSG_NOSIGNAL) >= 0) {
      return OkStatus();
    }
    if (errno == EPIPE || errno == ECONNRESET) {
      return Status(StatusCode::kUnavailable, "the peer's process has ended");
    }
    if (errno != EAGAIN && errno != EINTR) return SystemError("sendmsg");
    const int64_t room_ms = deadline.RemainingNanoseconds() / 1'000'000;
    if (room_ms == 0) {
      return Status(StatusCode::kDeadlineExceeded,
                    "the peer process does not read its control socket");
    }
    pollfd wait = {.fd = socket, .events = POLLOUT, .revents = 0};
    poll(&wait, 1, static_cast<int>(std::min<int64_t>(room_ms, INT_MAX)));
  }
}

ShmReceived ShmReceive(int socket) {
  ShmReceived received;
  iovec bytes = {.iov_base = &received.message,
                 .iov_len = sizeof(received.message)};
  alignas(cmsghdr) char control[CMSG_SPACE(2 * sizeof(int))] = {};
  msghdr header = {};
  header.msg_iov = &bytes;
  header.msg_iovlen = 1;
  header.msg_control = control;
  header.msg_controllen = sizeof(control);
  const ssize_t size =
      recvmsg(socket, &header, MSG_DONTWAIT | MSG_CMSG_CLOEXEC);
  if (size < 0 && (errno == EAGAIN || errno == EINTR)) return received;
  for (cmsghdr* part = size > 0 ? CMSG_FIRSTHDR(&header) : nullptr;
       part != nullptr; part = CMSG_NXTHDR(&header, part)) {
    if (part->cmsg_level != SOL_SOCKET || part->cmsg_type != SCM_RIGHTS) {
      continue;
    }
    const size_t count = std::min<size_t>(
        (part->cmsg_len - CMSG_LEN(0)) / sizeof(int), received.fds.size());
    for (size_t i = 0; i < count; ++i) {
      int fd = -1;
      std::memcpy(&fd, CMSG_DATA(part) + i * sizeof(int), sizeof(fd));
      received.fds[i] = UniqueFd(fd);
    }
  }
  if (size <= 0) {
    received.kind = ShmReceived::Kind::kEnded;
  } else if ((header.msg_flags & (MSG_TRUNC | MSG_CTRUNC)) != 0 ||
             !IsOurs(received.message, static_cast<size_t>(size))) {
    received.kind = ShmReceived::Kind::kNonsense;
  } else {
    received.kind = ShmReceived::Kind::kMessage;
  }
  return received;
}

}  // namespace jaxfabric
