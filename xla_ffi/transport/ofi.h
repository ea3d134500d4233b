// ofi: NICs by way of libfabric: AWS EFA, and TCP anywhere.
//
// libfabric is opened at run time, so that a program with this transport in it
// starts on any machine. One Domain is one libfabric endpoint on one NIC.
//
// "shm" is for comparison with our own shm transport only, between processes of
// one Domain each: libfabric 2.5's provider crashes when one of two endpoints
// of a process is closed while the other knows it, so that it cannot pass the
// conformance suite.

#ifndef JAXFABRIC_TRANSPORT_OFI_H_
#define JAXFABRIC_TRANSPORT_OFI_H_

#include <memory>
#include <string>
#include <vector>

#include "base/status.h"
#include "transport/availability.h"
#include "transport/transport.h"

namespace jaxfabric {

struct OfiOptions {
  // "efa-direct", "efa", "tcp" or "shm".
  std::string provider;
  // libfabric.so.1, as dlopen takes it; empty: where the system has it.
  std::string library;
  // Names of the interfaces to use, as in "eth0" or "rdmap0s6-rdm", or their IP
  // addresses, in this order. Empty: all that there are; for tcp, loopback.
  std::vector<std::string> nics;
  // Peers show that they know it before they learn about any memory.
  std::string job_secret;
};

// Fails with kUnimplemented where OfiState is not kUsable, and with
// kInvalidArgument for an interface that does not exist.
StatusOr<std::unique_ptr<Transport>> OpenOfiTransport(
    const OfiOptions& options);

// Those that there are, in libfabric's order; none where the state says why.
std::vector<std::string> OfiNicNames(const std::string& provider,
                                     const std::string& library);

// Looks without opening anything that stays open.
TransportState OfiState(const std::string& provider,
                        const std::string& library);

}  // namespace jaxfabric

#endif  // JAXFABRIC_TRANSPORT_OFI_H_
