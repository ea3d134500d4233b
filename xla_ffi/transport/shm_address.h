// ShmAddress: what the NetAddr of a shm Domain says.

#ifndef JAXFABRIC_TRANSPORT_SHM_ADDRESS_H_
#define JAXFABRIC_TRANSPORT_SHM_ADDRESS_H_

#include <array>
#include <cstdint>
#include <string>

#include "base/status.h"
#include "transport/transport.h"

namespace jaxfabric {

inline constexpr uint64_t kShmMagic = 0x314d'4853'4652'584a;  // "JXRFSHM1"
inline constexpr uint32_t kShmVersion = 1;

// Travels as it lies in memory; it never leaves the host.
//   offset  0  magic    u64     kShmMagic
//   offset  8  version  u32     kShmVersion
//   offset 12  domain   u32     index among the Domains of its Transport
//   offset 16  nonce    u64     random, so that no two Domains are ever equal
//   offset 24  host     u64     this boot of this machine
//   offset 32  process  u64[2]  random; names the Transport's socket
struct ShmAddress {
  uint64_t magic = kShmMagic;
  uint32_t version = kShmVersion;
  uint32_t domain = 0;
  uint64_t nonce = 0;
  uint64_t host = 0;
  std::array<uint64_t, 2> process = {};

  bool operator==(const ShmAddress&) const = default;
};
static_assert(sizeof(ShmAddress) == 48);

NetAddr ToNetAddr(const ShmAddress& address);

// Refuses, each with its own sentence: an address of another transport, one of
// the wrong size, of another protocol version, or of another host.
StatusOr<ShmAddress> ParseShmAddress(const NetAddr& net_addr);

// The name of the abstract socket on which `process` listens.
std::string ShmSocketName(const std::array<uint64_t, 2>& process);

// Identifies this boot of this machine.
uint64_t ShmHost();

// From the kernel's generator.
uint64_t RandomU64();

}  // namespace jaxfabric

#endif  // JAXFABRIC_TRANSPORT_SHM_ADDRESS_H_
