// TcpProbe: whether anybody listens at an address.
//
// libfabric's tcp provider tries for ever to reach a process that has ended. A
// connection of our own tells an ended process, which refuses, from a network
// that is down, which says nothing.

#ifndef JAXFABRIC_TRANSPORT_TCP_PROBE_H_
#define JAXFABRIC_TRANSPORT_TCP_PROBE_H_

#include <cstddef>
#include <span>

#include "base/deadline.h"
#include "base/unique_fd.h"

namespace jaxfabric {

class TcpProbe {
 public:
  enum class Result {
    kListens,      // somebody does
    kRefused,      // the host is there, and nobody listens
    kUnreachable,  // the network cannot say
    kPending,
  };

  // `address` is a sockaddr_in or sockaddr_in6. Does not wait.
  explicit TcpProbe(std::span<const std::byte> address);

  Result Poll() { return Wait(Deadline()); }
  // kPending if nothing was heard until the deadline.
  Result Wait(Deadline deadline);

 private:
  UniqueFd socket_;
  Result result_ = Result::kPending;
};

}  // namespace jaxfabric

#endif  // JAXFABRIC_TRANSPORT_TCP_PROBE_H_
