// OfiAddress: what the NetAddr of an ofi Domain says.

#ifndef JAXFABRIC_TRANSPORT_OFI_ADDRESS_H_
#define JAXFABRIC_TRANSPORT_OFI_ADDRESS_H_

#include <array>
#include <cstddef>
#include <cstdint>
#include <string>

#include "base/status.h"
#include "transport/transport.h"

namespace jaxfabric {

inline constexpr uint64_t kOfiMagic = 0x3149'464f'4652'584a;  // "JXRFOFI1"
inline constexpr uint32_t kOfiVersion = 2;
inline constexpr uint32_t kOfiEndpointBytesMax = 64;

enum class OfiProvider : uint32_t {
  kTcp = 1,
  kEfa = 2,
  kEfaDirect = 3,
  kShm = 4,
};

// "tcp", "efa", "efa-direct" or "shm"; what a user writes after "ofi/".
const char* OfiProviderName(OfiProvider provider);
StatusOr<OfiProvider> ParseOfiProvider(const std::string& name);

// Little-endian, as it lies in memory:
//   offset  0  magic           u64     kOfiMagic
//   offset  8  version         u32     kOfiVersion
//   offset 12  provider        u32     OfiProvider
//   offset 16  nonce           u64     random, so that no two Domains are equal
//   offset 24  job             u64     JobKey::JobId
//   offset 32  endpoint_bytes  u32     how much of `endpoint` is used
//   offset 36  generation      u32     how often `endpoint` has changed
//   offset 40  endpoint        u8[64]  as fi_getname gave it; then zeros
struct OfiAddress {
  uint64_t magic = kOfiMagic;
  uint32_t version = kOfiVersion;
  OfiProvider provider = OfiProvider::kTcp;
  uint64_t nonce = 0;
  uint64_t job = 0;
  uint32_t endpoint_bytes = 0;
  uint32_t generation = 0;
  std::array<std::byte, kOfiEndpointBytesMax> endpoint = {};

  bool operator==(const OfiAddress&) const = default;
};
static_assert(sizeof(OfiAddress) == 104);
static_assert(offsetof(OfiAddress, endpoint) == 40);

NetAddr ToNetAddr(const OfiAddress& address);

// Refuses, each with its own sentence: an address of another transport, one of
// the wrong size or with nonsense in it, of another protocol version, of
// another provider, or of another job.
StatusOr<OfiAddress> ParseOfiAddress(const NetAddr& net_addr,
                                     OfiProvider provider, uint64_t job);

// For messages: "10.0.0.2:4711", or the bytes in hexadecimal.
std::string DescribeEndpoint(const OfiAddress& address);

}  // namespace jaxfabric

#endif  // JAXFABRIC_TRANSPORT_OFI_ADDRESS_H_
