// VerbsGreeting: the datagram by which two Domains join a pair of queue pairs.
//
// Who wants a peer opens a queue pair of its own and says hello; the peer opens
// one too, joins it with the first, and says welcome; the first joins its own.
// Datagrams get lost and are repeated, come late and are told by their attempt
// numbers. Whoever does not know the job's secret cannot make one that is
// accepted.

#ifndef JAXFABRIC_TRANSPORT_VERBS_GREETING_H_
#define JAXFABRIC_TRANSPORT_VERBS_GREETING_H_

#include <cstddef>
#include <cstdint>
#include <optional>
#include <span>

#include "transport/job_key.h"
#include "transport/verbs_address.h"

namespace jaxfabric {

enum class VerbsGreetingKind : uint16_t {
  kHello = 1,    // the sender wants to be joined
  kWelcome = 2,  // it has joined the attempt `echo`
  kRefuse = 3,   // it has removed us: attempt `echo` is in vain
  kRemoved = 4,  // it has removed us, and ended the joined attempt `echo`
  kBye = 5,      // its Domain closes
};

// Little-endian, as it lies in memory:
//   offset   0  magic         u32
//   offset   4  version       u16
//   offset   6  kind          u16       VerbsGreetingKind
//   offset   8  target        u64       nonce of the Domain it is meant for
//   offset  16  attempt       u64       rises with each pair of the sender
//   offset  24  added         u64       attempt at which its owner added us
//   offset  32  echo          u64       attempt of the target, answered
//   offset  40  queue_pair    u32       the sender's, 24 bits
//   offset  44  sequence      u32       its first packet's number, 24 bits
//   offset  48  word_address  u64       where it wants its credits written
//   offset  56  word_key      u32
//   offset  60  quota         u32       receives that it keeps for us
//   offset  64  mtu           u32       of its port, as enum ibv_mtu
//   offset  68  zero          u32
//   offset  72  sender        VerbsAddress
//   offset 128  tag           u64       JobKey::Tag of all the rest
struct VerbsGreeting {
  uint32_t magic = 0;
  uint16_t version = 0;
  VerbsGreetingKind kind = VerbsGreetingKind::kHello;
  uint64_t target = 0;
  uint64_t attempt = 0;
  uint64_t added = 0;
  uint64_t echo = 0;
  uint32_t queue_pair = 0;
  uint32_t sequence = 0;
  uint64_t word_address = 0;
  uint32_t word_key = 0;
  uint32_t quota = 0;
  uint32_t mtu = 0;
  uint32_t zero = 0;
  VerbsAddress sender;
  uint64_t tag = 0;
};
static_assert(sizeof(VerbsGreeting) == 136);
static_assert(offsetof(VerbsGreeting, sender) == 72);

// Fills in what makes it one of ours, and the tag.
void SealGreeting(VerbsGreeting* greeting, const JobKey& key);

// Nothing if it is not one of ours, not of this job, not for `target`, or says
// what cannot be.
std::optional<VerbsGreeting> OpenGreeting(std::span<const std::byte> bytes,
                                          const JobKey& key, uint64_t target,
                                          VerbsLinkLayer link_layer);

}  // namespace jaxfabric

#endif  // JAXFABRIC_TRANSPORT_VERBS_GREETING_H_
