#include "tests/cpp/remote_message.h"

#include <arpa/inet.h>
#include <netinet/in.h>
#include <netinet/tcp.h>
#include <poll.h>
#include <sys/socket.h>

#include <cerrno>

namespace jaxfabric {
namespace {

constexpr int kPatienceMs = 60'000;
constexpr uint64_t kBytesMax = uint64_t{256} << 20;

Status Wait(int socket, short events, int patience_ms) {
  pollfd wait = {.fd = socket, .events = events, .revents = 0};
  const int ready = poll(&wait, 1, patience_ms);
  if (ready == 1 || (ready < 0 && errno == EINTR)) return OkStatus();
  return Status(StatusCode::kDeadlineExceeded,
                "the other host has not answered within a minute");
}

using SocketCall = int (*)(int, const sockaddr*, socklen_t);

StatusOr<UniqueFd> Open(SocketCall call, const std::string& address,
                        uint16_t port) {
  sockaddr_in name = {};
  name.sin_family = AF_INET;
  name.sin_port = htons(port);
  if (inet_pton(AF_INET, address.c_str(), &name.sin_addr) != 1) {
    return Status(StatusCode::kInvalidArgument, "no IPv4 address: " + address);
  }
  UniqueFd made(socket(AF_INET, SOCK_STREAM | SOCK_CLOEXEC, 0));
  const int yes = 1;
  setsockopt(made.get(), SOL_SOCKET, SO_REUSEADDR, &yes, sizeof(yes));
  // Questions are short and wait for their answers.
  setsockopt(made.get(), IPPROTO_TCP, TCP_NODELAY, &yes, sizeof(yes));
  if (call(made.get(), reinterpret_cast<sockaddr*>(&name), sizeof(name)) != 0) {
    return Status(
        StatusCode::kUnavailable,
        address + ":" + std::to_string(port) + ": " + std::strerror(errno));
  }
  return made;
}

Status Gone() {
  return Status(StatusCode::kUnavailable,
                std::string("the other host is gone: ") + std::strerror(errno));
}

Status Receive(int socket, char* data, size_t size, int patience_ms) {
  while (size > 0) {
    JF_RETURN_IF_ERROR(Wait(socket, POLLIN, patience_ms));
    const ssize_t got = recv(socket, data, size, MSG_DONTWAIT);
    if (got == 0) errno = ECONNRESET;
    if (got == 0 || (got < 0 && errno != EINTR && errno != EAGAIN)) {
      return Gone();
    }
    data += std::max<ssize_t>(got, 0);
    size -= static_cast<size_t>(std::max<ssize_t>(got, 0));
    patience_ms = kPatienceMs;
  }
  return OkStatus();
}

}  // namespace

StatusOr<UniqueFd> ConnectRemote(const std::string& address, uint16_t port) {
  return Open(connect, address, port);
}

StatusOr<UniqueFd> ListenRemote(const std::string& address, uint16_t port) {
  JF_ASSIGN_OR_RETURN(UniqueFd socket, Open(bind, address, port));
  if (listen(socket.get(), SOMAXCONN) != 0) return Gone();
  return socket;
}

Status SendRemote(int socket, const RemoteMessage& message) {
  std::string_view rest;
  RemoteMessage whole;
  whole.PutText(message.bytes());
  for (rest = whole.bytes(); !rest.empty();) {
    JF_RETURN_IF_ERROR(Wait(socket, POLLOUT, kPatienceMs));
    const ssize_t sent =
        send(socket, rest.data(), rest.size(), MSG_DONTWAIT | MSG_NOSIGNAL);
    if (sent < 0 && errno != EINTR && errno != EAGAIN) return Gone();
    rest.remove_prefix(static_cast<size_t>(std::max<ssize_t>(sent, 0)));
  }
  return OkStatus();
}

StatusOr<RemoteMessage> ReceiveRemote(int socket, bool for_ever) {
  uint64_t size = 0;
  JF_RETURN_IF_ERROR(Receive(socket, reinterpret_cast<char*>(&size),
                             sizeof(size), for_ever ? -1 : kPatienceMs));
  if (size > kBytesMax) {
    return Status(StatusCode::kDataLoss, "a message of an absurd size");
  }
  std::string bytes(size, '\0');
  JF_RETURN_IF_ERROR(Receive(socket, bytes.data(), size, kPatienceMs));
  return RemoteMessage(std::move(bytes));
}

}  // namespace jaxfabric
