// VerbsAddress: what the NetAddr of a verbs Domain says.
//
// A queue pair serves one peer and does not exist before its peer is known. So
// an address names what exists before: the datagram queue pair at which a
// Domain is greeted (verbs_greeting.h).

#ifndef JAXFABRIC_TRANSPORT_VERBS_ADDRESS_H_
#define JAXFABRIC_TRANSPORT_VERBS_ADDRESS_H_

#include <cstddef>
#include <cstdint>
#include <string>

#include "base/status.h"
#include "transport/transport.h"
#include "transport/verbs_gid.h"

namespace jaxfabric {

inline constexpr uint64_t kVerbsMagic = 0x3142'5645'4652'584a;  // "JXRFEVB1"
inline constexpr uint32_t kVerbsVersion = 1;

enum class VerbsLinkLayer : uint16_t { kInfiniBand = 1, kEthernet = 2 };

// Little-endian, as it lies in memory:
//   offset  0  magic       u64      kVerbsMagic
//   offset  8  version     u32      kVerbsVersion
//   offset 12  queue_pair  u32      number of the datagram queue pair, 24 bits
//   offset 16  nonce       u64      random, so that no two Domains are equal
//   offset 24  job         u64      JobKey::JobId
//   offset 32  gid         u8[16]   of the port
//   offset 48  queue_key   u32      random; datagrams without it are dropped
//   offset 52  lid         u16      of the port; 0 on Ethernet
//   offset 54  link_layer  u16      VerbsLinkLayer
struct VerbsAddress {
  uint64_t magic = kVerbsMagic;
  uint32_t version = kVerbsVersion;
  uint32_t queue_pair = 0;
  uint64_t nonce = 0;
  uint64_t job = 0;
  VerbsGid gid = {};
  uint32_t queue_key = 0;
  uint16_t lid = 0;
  VerbsLinkLayer link_layer = VerbsLinkLayer::kEthernet;

  bool operator==(const VerbsAddress&) const = default;
};
static_assert(sizeof(VerbsAddress) == 56);
static_assert(offsetof(VerbsAddress, queue_key) == 48);

NetAddr ToNetAddr(const VerbsAddress& address);

// Refuses, each with its own sentence: an address of another transport, one of
// the wrong size or with nonsense in it, of another protocol version, of
// another link layer, or of another job.
StatusOr<VerbsAddress> ParseVerbsAddress(const NetAddr& net_addr,
                                         VerbsLinkLayer link_layer,
                                         uint64_t job);

// For messages: "10.0.0.2 (queue pair 17)".
std::string Describe(const VerbsAddress& address);

}  // namespace jaxfabric

#endif  // JAXFABRIC_TRANSPORT_VERBS_ADDRESS_H_
