// TransferEngineStats: what a TransferEngine has done, counted since the start.

#ifndef JAXFABRIC_ENGINE_TRANSFER_STATS_H_
#define JAXFABRIC_ENGINE_TRANSFER_STATS_H_

#include <cstdint>
#include <map>
#include <string>
#include <vector>

#include "engine/domain_group.h"

namespace jaxfabric {

struct TransferPeerStats {
  std::string name;
  bool connected = false;
  uint64_t transfers_sent = 0;  // that ended well
  uint64_t transfer_bytes_sent = 0;
  uint64_t transfers_failed = 0;
  uint64_t transfers_received = 0;  // counted ones, where the NIC names peers
  // Under more ids that nobody waits for than it may hold; there.
  uint64_t counts_dropped = 0;
  uint64_t messages_sent = 0;
  uint64_t messages_received = 0;
};

struct TransferEngineStats {
  uint64_t operations = 0;
  uint64_t operations_failed = 0;
  uint64_t handshakes = 0;  // that ended well
  // Hellos and messages that were not what they should be, by reason.
  uint64_t refused_seal = 0;     // truncated, altered, or another token
  uint64_t refused_version = 0;  // of another version
  uint64_t refused_replay = 0;
  uint64_t refused_other = 0;  // malformed, another job, another engine
  std::string last_refusal;
  uint64_t strangers_dropped = 0;  // messages of engines that are no peers
  uint64_t counts_dropped = 0;     // too many ids, or no share that can be
  uint64_t messages_arrived = 0;   // in the inbox; see MessageInbox
  uint64_t messages_handled = 0;
  uint64_t messages_dropped = 0;  // the inbox was full
  uint64_t peers_lost = 0;
  std::vector<DomainStats> nics;
  std::map<uint32_t, TransferPeerStats> peers;
};

}  // namespace jaxfabric

#endif  // JAXFABRIC_ENGINE_TRANSFER_STATS_H_
