// What tests do to the fake links: pace, stall, cut, heal, and the simulated
// clock. A link is a pair of Domains of one fake network, both ways.

#ifndef JAXFABRIC_TRANSPORT_FAKE_LINK_H_
#define JAXFABRIC_TRANSPORT_FAKE_LINK_H_

#include <cstdint>
#include <optional>
#include <string>

#include "transport/transport.h"

namespace jaxfabric {

// What may become of a post that is on its way when its link is cut, beside
// being lost. Its initiator gets kError in any case, and the seed chooses.
struct FakeCut {
  bool may_land = false;  // bytes and immediate are there
  bool may_land_partly = false;
  // Lands within 1 ms after its initiator got kError, unless the target has
  // removed the initiator by then. Removing at the initiator does not help.
  bool may_land_late = false;
  // Both ends get kPeerLost for the other.
  bool report_lost = false;
};

// Each returns false where there is no such network or Domain.

// Writes leave the Domain at this rate, one after the other; 0: at once.
// Messages overtake them.
bool PaceFakeDomain(const std::string& network, const NetAddr& domain,
                    double bytes_per_s);

// What is on its way, or posted from now on, waits until the link is healed.
bool StallFakeLink(const std::string& network, const NetAddr& a,
                   const NetAddr& b);
// Posts fail, those on their way too, and AddPeer, until the link is healed.
bool CutFakeLink(const std::string& network, const NetAddr& a, const NetAddr& b,
                 const FakeCut& cut);
bool HealFakeLink(const std::string& network, const NetAddr& a,
                  const NetAddr& b);

// When the next event of the network falls due, for tests with a clock of their
// own (FakeOptions::clock_ns); none if nothing is under way.
std::optional<int64_t> NextFakeEventNs(const std::string& network);

}  // namespace jaxfabric

#endif  // JAXFABRIC_TRANSPORT_FAKE_LINK_H_
