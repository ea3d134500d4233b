// DomainStats: counts of one Domain of a group.

#ifndef JAXFABRIC_ENGINE_DOMAIN_STATS_H_
#define JAXFABRIC_ENGINE_DOMAIN_STATS_H_

#include <cstdint>

namespace jaxfabric {

// What one Domain has done since the start, and does now.
struct DomainStats {
  uint64_t writes = 0;  // that ended well
  uint64_t write_bytes = 0;
  uint64_t messages = 0;
  uint64_t errors = 0;             // posts that ended badly
  uint64_t strangers_dropped = 0;  // immediates of Domains that nobody added
  uint64_t malformed_dropped = 0;  // messages that no group sends
  uint64_t refused_frames = 0;     // dropped: of another version, or secret
  uint64_t writes_again = 0;       // that were on this Domain's failed links
  uint64_t links_failed = 0;
  uint64_t links_revived = 0;
  uint32_t open_writes = 0;
};

}  // namespace jaxfabric

#endif  // JAXFABRIC_ENGINE_DOMAIN_STATS_H_
