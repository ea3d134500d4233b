// TransferPeer: what a TransferEngine knows of one other.

#ifndef JAXFABRIC_ENGINE_TRANSFER_PEER_H_
#define JAXFABRIC_ENGINE_TRANSFER_PEER_H_

#include <cstdint>
#include <optional>
#include <unordered_map>

#include "engine/engine_address.h"
#include "engine/message_parts.h"
#include "engine/random_id.h"
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

  // Barriers that one connection remembers.
  static constexpr size_t kBarriersMax = 1u << 16;

  uint32_t name = 0;
  EngineAddress address;
  bool connected = false;

  // Of our Hellos; the same one each time.
  RandomId nonce = RandomId::Make();
  // Of theirs: a Hello with another one is a new connection.
  std::optional<RandomId> their_nonce;
  int64_t next_hello_ns = 0;
  int64_t hello_pause_ns = 0;

  int64_t last_heard_ns = 0;
  int64_t last_ping_ns = 0;
  std::optional<Farewell> farewell;

  uint64_t next_message = 0;
  MessageAssembler assembler;
  std::unordered_map<uint32_t, Barrier> barriers;
  uint64_t units_received = 0;
  uint64_t counted_transfers_sent = 0;
  TransferPeerStats stats;
};

}  // namespace jaxfabric

#endif  // JAXFABRIC_ENGINE_TRANSFER_PEER_H_
