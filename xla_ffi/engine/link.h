// Link: the way from one of our Domains to one Domain of a peer, and back.

#ifndef JAXFABRIC_ENGINE_LINK_H_
#define JAXFABRIC_ENGINE_LINK_H_

#include <bitset>
#include <cstdint>
#include <deque>
#include <functional>
#include <memory>
#include <string>
#include <unordered_map>
#include <vector>

#include "engine/link_frame.h"
#include "engine/transfer.h"
#include "transport/transport.h"

namespace jaxfabric {

// How fast a link completes writes, as long as it is busy.
class RateMeter {
 public:
  // Of a write on a link that was idle.
  void Begin(int64_t now_ns) { since_ns_ = now_ns; }
  // `telling`: the write was long, or the link's window full; otherwise the
  // time says how little there was to do.
  void Done(uint64_t bytes, int64_t now_ns, bool telling);
  // 0 while it is not known.
  double bytes_per_ns() const { return bytes_per_ns_; }

 private:
  double bytes_per_ns_ = 0;
  int64_t since_ns_ = 0;
  uint64_t bytes_ = 0;
  int64_t busy_ns_ = 0;
};

// Units that arrived, or were sent, over one link in its present epoch. Modulo
// 2^32: only differences count, and those are bounded by what a window holds.
class UnitLedger {
 public:
  // Ids that a peer may use over one link before what it holds cannot be told
  // any more: all slots of all kinds of one source.
  static constexpr size_t kKeysMax = 1u << 17;

  void Add(LinkCount count);
  void Take(LinkCount count) { units_[count.key] -= count.units; }
  uint32_t Units(uint32_t key) const;
  bool overflowed() const { return overflowed_; }
  void Clear();

 private:
  std::unordered_map<uint32_t, uint32_t> units_;
  bool overflowed_ = false;
};

struct GroupMessage {
  std::string bytes;
  std::function<void(Status)> done;
  uint64_t number = 0;  // 0 until it is posted
};

// A write of which this end does not know whether it arrived.
struct UncertainWrite {
  std::shared_ptr<Transfer> transfer;
  uint32_t chunk = 0;
};

struct Link {
  // A message that its NIC called delivered is kept for so long: what the peer
  // has not read goes with its endpoint, and cannot be more than a NIC holds.
  static constexpr size_t kDeliveredMax = 512;

  enum class State {
    kUp,
    kFencing,  // removed here; what is on it is being found out
    kDown,     // fenced by both ends; to be tried again at retry_ns
    kProbing,  // added again; not used before it has carried a message
    kDead,     // the peer did not answer in time; never tried again
  };

  uint8_t number = 0;
  uint32_t domain = 0;         // of ours
  uint32_t remote_domain = 0;  // of theirs
  NetAddr address;
  PeerId id = kUnknownPeer;
  State state = State::kUp;
  uint32_t epoch = 0;

  uint32_t open_writes = 0;
  uint64_t open_bytes = 0;
  uint32_t open_messages = 0;
  uint32_t borrowed = 0;    // of open_writes, beyond its share of the queue
  uint64_t refused_in = 0;  // the round of posting in which it had no room
  RateMeter rate;

  std::deque<GroupMessage> delivered;  // the last of them
  uint64_t messages_sent = 0;          // of them, in this epoch
  uint64_t messages_received = 0;
  UnitLedger sent;
  UnitLedger received;

  Status failure;  // why it is not up
  std::vector<UncertainWrite> uncertain;
  bool resolved = false;      // what this end did not know is known
  bool answered = false;      // what the other end did not know
  std::string last_fenced;    // the answer, should it be asked for again
  uint32_t fenced_epoch = 0;  // of last_fenced
  int64_t progress_ns = 0;    // of the last completion, or start of work
  int64_t pinged_ns = 0;
  int64_t retry_ns = 0;
  int64_t give_up_ns = 0;
  int64_t backoff_ns = 0;

  bool up() const { return state == State::kUp; }
  bool idle() const { return open_writes == 0 && open_messages == 0; }
};

// Whether a post failed for what it is, as a write out of bounds does; then its
// link is no worse for it, and it has not arrived.
bool IsOfThePost(const Status& status);

// Which of the last messages of a peer have come: one may come twice, if the
// link that it came over failed before its sender knew.
class ReplayWindow {
 public:
  // Senders keep the numbers of what is open less than this apart.
  static constexpr uint64_t kNumbers = 1024;
  // False if `number` came before.
  bool Accept(uint64_t number);

 private:
  uint64_t newest_ = 0;
  std::bitset<kNumbers> seen_;
};

}  // namespace jaxfabric

#endif  // JAXFABRIC_ENGINE_LINK_H_
