// ChooseGid: under which of its addresses a port is to be used.
//
// A RoCE port has one entry for each IP address of its interface and each
// version of the protocol, in an order that differs between machines and
// changes as addresses come and go; so it is chosen by what it is.

#ifndef JAXFABRIC_TRANSPORT_VERBS_GID_H_
#define JAXFABRIC_TRANSPORT_VERBS_GID_H_

#include <array>
#include <cstdint>
#include <optional>
#include <span>
#include <string>

namespace jaxfabric {

using VerbsGid = std::array<uint8_t, 16>;

enum class VerbsGidType { kInfiniBand, kRoceV1, kRoceV2 };

struct VerbsGidEntry {
  uint32_t index = 0;
  VerbsGidType type = VerbsGidType::kInfiniBand;
  VerbsGid gid = {};
};

// The entry with index `wanted`, or, if that is negative, the best: InfiniBand,
// then RoCE v2 with IPv4, with a global IPv6, with a link-local IPv6 address.
// RoCE v1 cannot be routed and needs its own switch settings: only on request.
// Null if there is none.
const VerbsGidEntry* ChooseGid(std::span<const VerbsGidEntry> entries,
                               int wanted);

// "10.0.0.1" where the GID stands for an IPv4 address, else as IPv6.
std::string DescribeGid(const VerbsGid& gid);

}  // namespace jaxfabric

#endif  // JAXFABRIC_TRANSPORT_VERBS_GID_H_
