// shm: ranks of one host. Peers' memory is mapped; bytes move by plain copies,
// notices through rings in shared memory, wake-ups by futex.

#ifndef JAXFABRIC_TRANSPORT_SHM_H_
#define JAXFABRIC_TRANSPORT_SHM_H_

#include <cstdint>
#include <memory>
#include <string>

#include "base/status.h"
#include "transport/transport.h"

namespace jaxfabric {

struct ShmOptions {
  // Peers show that they know it before they get any memory.
  std::string job_secret;
  // Peers that may connect to one Domain.
  uint32_t peers_max = 64;
};

StatusOr<std::unique_ptr<Transport>> OpenShmTransport(ShmOptions options);

}  // namespace jaxfabric

#endif  // JAXFABRIC_TRANSPORT_SHM_H_
