#include "transport/tcp_probe.h"

#include <netinet/in.h>
#include <poll.h>
#include <sys/socket.h>

#include <algorithm>
#include <cerrno>
#include <climits>
#include <cstring>

namespace jaxfabric {
namespace {

TcpProbe::Result FromErrno(int error) {
  switch (error) {
    case 0:
      return TcpProbe::Result::kListens;
    case EINPROGRESS:
    case EAGAIN:
    case EINTR:
      return TcpProbe::Result::kPending;
    case ECONNREFUSED:
      return TcpProbe::Result::kRefused;
    default:
      return TcpProbe::Result::kUnreachable;
  }
}

}  // namespace

TcpProbe::TcpProbe(std::span<const std::byte> address) {
  sockaddr_storage storage = {};
  std::memcpy(&storage, address.data(),
              std::min(address.size(), sizeof(storage)));
  socket_ = UniqueFd(
      socket(storage.ss_family, SOCK_STREAM | SOCK_CLOEXEC | SOCK_NONBLOCK, 0));
  if (!socket_.valid()) {
    result_ = Result::kUnreachable;
    return;
  }
  // Closed with a reset, so that no end of a probe stays in TIME_WAIT.
  const linger at_once = {.l_onoff = 1, .l_linger = 0};
  setsockopt(socket_.get(), SOL_SOCKET, SO_LINGER, &at_once, sizeof(at_once));
  const int connected =
      connect(socket_.get(), reinterpret_cast<const sockaddr*>(&storage),
              static_cast<socklen_t>(address.size()));
  result_ = FromErrno(connected == 0 ? 0 : errno);
}

TcpProbe::Result TcpProbe::Wait(Deadline deadline) {
  while (result_ == Result::kPending) {
    const int64_t room_ms = deadline.RemainingNanoseconds() / 1'000'000;
    pollfd wait = {.fd = socket_.get(), .events = POLLOUT, .revents = 0};
    const int ready =
        poll(&wait, 1, static_cast<int>(std::min<int64_t>(room_ms, INT_MAX)));
    if (ready == 0 && room_ms == 0) break;
    if (ready <= 0) continue;
    int error = 0;
    socklen_t bytes = sizeof(error);
    getsockopt(socket_.get(), SOL_SOCKET, SO_ERROR, &error, &bytes);
    result_ = FromErrno(error);
  }
  return result_;
}

}  // namespace jaxfabric
