// A Transport on another host, as if it were here: for ranks of the conformance
// suite that must not share a machine.
//
//   ServeTransports("10.78.0.2", 7079, open);            // there, until killed
//   OpenRemoteTransport("10.78.0.2", 7079, job_secret);  // here, each a
//   process
//
// Each call is a question over TCP. Memory that is registered has a twin there,
// which is what peers write to. The twins are made equal by what has changed:
// to there by MirrorToOtherHost, to here with the completions of a poll.

#ifndef JAXFABRIC_TESTS_CPP_REMOTE_TRANSPORT_H_
#define JAXFABRIC_TESTS_CPP_REMOTE_TRANSPORT_H_

#include <cstdint>
#include <functional>
#include <memory>
#include <string>

#include "base/status.h"
#include "transport/transport.h"

namespace jaxfabric {

using OpenTransportFunction =
    std::function<StatusOr<std::unique_ptr<Transport>>(const std::string&)>;

// Prints "serves" once it can be connected to, by IPv4 address. Returns only
// why it cannot.
Status ServeTransports(const std::string& address, uint16_t port,
                       const OpenTransportFunction& open);

// The result ends the test program if the other host goes away.
StatusOr<std::unique_ptr<Transport>> OpenRemoteTransport(
    const std::string& address, uint16_t port, const std::string& job_secret);

// Makes the twins of all registered memory equal to it: to be called before a
// Domain, here or there, may read or write what a test has changed.
void MirrorToOtherHost();

}  // namespace jaxfabric

#endif  // JAXFABRIC_TESTS_CPP_REMOTE_TRANSPORT_H_
