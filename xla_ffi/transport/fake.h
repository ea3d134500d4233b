// fake: Domains of one process, joined by a network of seeded misfortune.
// For tests: what it does to a program depends on the seed alone, as far as the
// program's own threads allow.

#ifndef JAXFABRIC_TRANSPORT_FAKE_H_
#define JAXFABRIC_TRANSPORT_FAKE_H_

#include <cstdint>
#include <memory>
#include <string>

#include "base/deadline.h"
#include "base/status.h"
#include "transport/transport.h"

namespace jaxfabric {

struct FakeOptions {
  // Domains opened under one network name reach each other.
  std::string network = "";
  std::string job_secret = "";
  uint64_t seed = 0;
  // Each write is cut into up to this many pieces, delivered in any order; its
  // immediate follows the last.
  uint32_t pieces_max = 1;
  // Each piece, immediate and message is held back for 0 to delay_max_ns.
  int64_t delay_max_ns = 0;
  // Share of posts that are refused with kAgain, 0 to 0.99.
  double again_share = 0;
  uint32_t queue_depth = 256;
  uint64_t write_bytes_max = uint64_t{1} << 30;
  bool immediate_names_peer = true;
  bool removal_fences = false;
  // The clock of the network; with one of its own a test says when things
  // happen (NextFakeEventNs). Whoever comes first chooses it.
  int64_t (*clock_ns)() = MonotonicNanoseconds;
};

StatusOr<std::unique_ptr<Transport>> OpenFakeTransport(FakeOptions options);

// The Domain at `address` dies: its peers get kPeerLost, its own posts fail.
// Returns false if there is none.
bool KillFakeDomain(const std::string& network, const NetAddr& address);

}  // namespace jaxfabric

#endif  // JAXFABRIC_TRANSPORT_FAKE_H_
