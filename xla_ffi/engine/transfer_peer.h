// TransferPeer: what a TransferEngine knows of one other.

#ifndef JAXFABRIC_ENGINE_TRANSFER_PEER_H_
#define JAXFABRIC_ENGINE_TRANSFER_PEER_H_

#include <cstdint>
#include <map>
#include <memory>
#include <optional>
#include <string>
#include <unordered_map>
#include <variant>

#include "engine/engine_address.h"
#include "engine/message_parts.h"
#include "engine/random_id.h"
#include "engine/recent_map.h"
#include "engine/transfer_stats.h"

namespace jaxfabric {

struct TransferPeer {
  // How often each side has come to a barrier.
  struct Barrier {
    uint64_t ours = 0;
    uint64_t theirs = 0;
  };
  // What a peer that takes leave has sent: it is gone when all of it is here.
  struct Farewell {
    uint64_t messages = 0;
    uint64_t transfers = 0;
    int64_t heard_ns = 0;
  };

  // The peer unregisters a region; it is to know when our writes have ended.
  struct Withdrawal {
    uint64_t number = 0;
    uint64_t open = 0;       // our writes into it
    bool answering = false;  // the answer is on its way
  };

  // Barriers that one connection remembers.
  static constexpr size_t kBarriersMax = 1u << 16;
  // The ids under which parts are under way, and regions that are withdrawn:
  // of those that came before the last 2^16, nothing is under way any more.
  static constexpr size_t kRecentMax = 1u << 16;

  uint32_t name = 0;
  EngineAddress address;
  std::shared_ptr<const std::string> title;  // of both, for error texts
  bool added = false;                        // to the group
  int64_t join_limit_ns = 0;                 // of the last try to
  bool connected = false;

  // Of our Hellos; the same one each time.
  RandomId nonce = RandomId::Make();
  // Of theirs: a Hello with another one is a new connection.
  std::optional<RandomId> their_nonce;
  int64_t next_hello_ns = 0;
  int64_t hello_pause_ns = 0;

  int64_t last_heard_ns = 0;
  int64_t last_ping_ns = 0;
  bool pong_waits = false;     // to be sent; another would say the same
  bool welcome_waits = false;  // the same
  std::optional<Farewell> farewell;
  bool came_back = false;  // over another connection, which replaces this one

  uint64_t next_message = 0;
  MessageAssembler assembler;
  std::unordered_map<uint32_t, Barrier> barriers;
  uint64_t units_received = 0;
  uint64_t counted_transfers_sent = 0;
  TransferPeerStats stats;

  // Units of transfers that are not whole, by id; where the NIC names peers.
  std::unordered_map<uint32_t, uint64_t> parts;
  // Ids of transfers that it gave up, and of which no part has come; there.
  RecentMap<uint32_t, std::monostate> spoilt{kRecentMax};
  // Ids under which the peer, and we, send parts; where it does not.
  RecentMap<uint32_t, std::monostate> their_ids{kRecentMax};
  RecentMap<uint32_t, std::monostate> our_ids{kRecentMax};

  RecentMap<uint64_t, std::monostate> withdrawn{kRecentMax};  // regions
  std::map<uint64_t, Withdrawal> withdrawals;  // by region: not answered
};

}  // namespace jaxfabric

#endif  // JAXFABRIC_ENGINE_TRANSFER_PEER_H_
