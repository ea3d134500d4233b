// GroupPeer: what a DomainGroup knows of one peer.

#ifndef JAXFABRIC_ENGINE_GROUP_PEER_H_
#define JAXFABRIC_ENGINE_GROUP_PEER_H_

#include <cstdint>
#include <deque>
#include <functional>
#include <map>
#include <memory>
#include <set>
#include <string>
#include <unordered_map>
#include <unordered_set>
#include <vector>

#include "base/status.h"
#include "engine/link.h"
#include "engine/transfer.h"

namespace jaxfabric {

struct GroupPeer {
  // Writes of unknown fate that are made again under a number of their own;
  // the peer counts what they stand for once all are there.
  struct Repair {
    LinkFrame frame;
    std::vector<std::shared_ptr<Transfer>> transfers;
    int64_t retry_ns = 0;
    int64_t give_up_ns = 0;
  };
  struct Credit {  // the same, at the peer
    uint64_t arrived = 0;
    uint64_t writes = 0;  // 0 until the peer has said
    LinkCount stands_for;
  };

  uint32_t name = 0;
  std::vector<Link> links;
  // Links that fail are fenced, and what was on them is sent again.
  bool fences = false;
  bool over = false;  // lost, or removed
  Status end;         // why it is over

  // What waits: first what was posted before, then one of each in turn, so
  // that a small transfer does not wait for a large one, nor the reverse.
  std::deque<UncertainWrite> again;
  std::deque<std::shared_ptr<Transfer>> small;
  std::deque<std::shared_ptr<Transfer>> large;
  bool large_is_next = false;
  uint64_t waiting_bytes = 0;
  size_t first_link = 0;  // among equals

  std::deque<GroupMessage> messages;
  uint64_t next_message = 1;
  std::set<uint64_t> open_messages;  // numbers
  ReplayWindow arrived_messages;

  uint32_t next_repair = 1;
  std::map<uint32_t, Repair> repairs;
  std::unordered_map<uint32_t, Credit> credits;
  std::set<uint32_t> finished_repairs;  // the last of them
  // Of transfers that ended badly after some of their units were sent.
  std::unordered_set<uint32_t> quarantined;

  std::deque<std::shared_ptr<Transfer>>& QueueOf(const Transfer& transfer) {
    return transfer.small ? small : large;
  }
};

using GroupPeerPtr = std::shared_ptr<GroupPeer>;

struct FenceRequest {
  GroupPeerPtr peer;
  LinkFrame frame;
};

// A region of a peer, as one of our Domains knows it. Null: no such peer.
struct RemoteMemory {
  Domain* domain = nullptr;
  PeerId peer = kUnknownPeer;
  uint64_t key = 0;
};

// What a cookie stands for.
struct OpenPost {
  enum class Kind { kWrite, kMessage, kFrame };
  Kind kind;
  GroupPeerPtr peer;
  uint8_t link = 0;
  UncertainWrite write;
  std::unique_ptr<GroupMessage> message;  // of kMessage
  uint64_t span = 0;                      // of a write, in the trace
};

}  // namespace jaxfabric

#endif  // JAXFABRIC_ENGINE_GROUP_PEER_H_
