// OfiPeer: another Domain that an ofi Domain knows: added by its owner, or
// because it said hello, or both.

#ifndef JAXFABRIC_TRANSPORT_OFI_PEER_H_
#define JAXFABRIC_TRANSPORT_OFI_PEER_H_

#include "transport/ofi_endpoint.h"

#ifdef JAXFABRIC_HAVE_LIBFABRIC

#include <cstdint>
#include <deque>
#include <optional>
#include <string>
#include <unordered_map>
#include <unordered_set>
#include <vector>

#include "base/deadline.h"
#include "base/status.h"
#include "transport/ofi_address.h"
#include "transport/ofi_frame.h"
#include "transport/tcp_probe.h"
#include "transport/transport.h"

namespace jaxfabric {

struct OfiPeer {
  struct Outgoing {
    OfiFrameKind kind;
    uint64_t argument = 0;
    std::string payload;
  };
  enum class State { kGreeting, kReady, kLost };

  OfiAddress address;
  fi_addr_t fi_address = FI_ADDR_NOTAVAIL;
  std::vector<fi_addr_t> former;  // of its endpoints before this one
  PeerId id = kUnknownPeer;  // of the owner; unknown if it has not added it
  State state = State::kGreeting;
  Status lost;            // why it is kLost
  int64_t lost_ns = 0;    // when
  bool loss_due = false;  // the owner was not told yet
  uint32_t open = 0;      // operations posted and not completed
  uint32_t posts = 0;     // of them, the owner's
  uint32_t failures = 0;  // frames that failed in a row
  std::deque<Outgoing> frames;
  // What is known of its memory, by key; nothing yet: asked.
  std::unordered_map<uint64_t, std::optional<OfiRegion>> regions;
  // Keys of ours that it has asked for.
  std::unordered_set<uint64_t> told;
  int64_t heard_ns = 0;   // when something came from it
  int64_t spoke_ns = 0;   // when something was posted to it
  int64_t stuck_ns = 0;   // since when libfabric takes nothing; 0: it does
  int64_t repeat_ns = 0;  // when to ask again for what we wait for
  int64_t next_probe_ns = 0;
  std::optional<TcpProbe> probe;
  // Until when somebody must be found at its address before it is greeted.
  std::optional<Deadline> must_listen;

  // See ofi_domain_renewal.cc.
  bool greeted = false;     // it may know our present endpoint
  bool condemned = false;   // cut off as soon as our endpoint is renewed
  bool has_paused = false;  // it posts nothing more to our endpoint
  bool pauses_us = false;   // it is about to renew its endpoint
  bool pause_due = false;   // it was not told yet that we post nothing more
  int64_t pauses_us_ns = 0;
  int64_t moved_ns = 0;    // when it came to its present endpoint
  int64_t removed_ns = 0;  // by the owner; 0: it has not removed it

  bool MayPost() const { return state == State::kReady && !pauses_us; }
};

}  // namespace jaxfabric

#endif  // JAXFABRIC_HAVE_LIBFABRIC
#endif  // JAXFABRIC_TRANSPORT_OFI_PEER_H_
