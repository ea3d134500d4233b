#include "transport/ofi_address.h"

#include <arpa/inet.h>
#include <netinet/in.h>
#include <sys/socket.h>

#include <algorithm>
#include <cstdio>
#include <cstring>

namespace jaxfabric {
namespace {

constexpr OfiProvider kProviders[] = {OfiProvider::kTcp, OfiProvider::kEfa,
                                      OfiProvider::kEfaDirect,
                                      OfiProvider::kShm};

bool IsKnown(OfiProvider provider) {
  return std::find(std::begin(kProviders), std::end(kProviders), provider) !=
         std::end(kProviders);
}

// libfabric reads the family and then as many bytes as it wants.
bool IsSocketAddress(const OfiAddress& address) {
  sa_family_t family = AF_UNSPEC;
  std::memcpy(&family, address.endpoint.data(), sizeof(family));
  return (family == AF_INET && address.endpoint_bytes == sizeof(sockaddr_in)) ||
         (family == AF_INET6 && address.endpoint_bytes == sizeof(sockaddr_in6));
}

bool IsWellFormed(const OfiAddress& address) {
  if (!IsKnown(address.provider) || address.endpoint_bytes == 0 ||
      address.endpoint_bytes > kOfiEndpointBytesMax) {
    return false;
  }
  if (std::any_of(address.endpoint.begin() + address.endpoint_bytes,
                  address.endpoint.end(),
                  [](std::byte value) { return value != std::byte{0}; })) {
    return false;
  }
  return address.provider != OfiProvider::kTcp || IsSocketAddress(address);
}

}  // namespace

const char* OfiProviderName(OfiProvider provider) {
  switch (provider) {
    case OfiProvider::kTcp:
      return "tcp";
    case OfiProvider::kEfa:
      return "efa";
    case OfiProvider::kEfaDirect:
      return "efa-direct";
    case OfiProvider::kShm:
      return "shm";
  }
  return "unknown";
}

StatusOr<OfiProvider> ParseOfiProvider(const std::string& name) {
  for (const OfiProvider provider : kProviders) {
    if (name == OfiProviderName(provider)) return provider;
  }
  return Status(StatusCode::kInvalidArgument,
                "there is no transport 'ofi/" + name +
                    "'; there are ofi/efa-direct, ofi/efa, ofi/tcp and "
                    "ofi/shm");
}

NetAddr ToNetAddr(const OfiAddress& address) {
  return {
      std::string(reinterpret_cast<const char*>(&address), sizeof(address))};
}

StatusOr<OfiAddress> ParseOfiAddress(const NetAddr& net_addr,
                                     OfiProvider provider, uint64_t job) {
  const std::string& bytes = net_addr.bytes;
  OfiAddress address;
  if (bytes.size() < sizeof(kOfiMagic) ||
      std::memcmp(bytes.data(), &kOfiMagic, sizeof(kOfiMagic)) != 0) {
    return Status(StatusCode::kInvalidArgument,
                  "not an address of the ofi transport; a peer is reached only "
                  "by the transport whose address it published");
  }
  if (bytes.size() != sizeof(address)) {
    return Status(StatusCode::kInvalidArgument,
                  "malformed ofi address: it has " +
                      std::to_string(bytes.size()) + " bytes where " +
                      std::to_string(sizeof(address)) + " are due");
  }
  std::memcpy(&address, bytes.data(), sizeof(address));
  if (address.version != kOfiVersion) {
    return Status(StatusCode::kFailedPrecondition,
                  "the ofi address is of protocol version " +
                      std::to_string(address.version) +
                      ", this process speaks version " +
                      std::to_string(kOfiVersion) +
                      "; run the same jaxfabric in all processes");
  }
  if (!IsWellFormed(address)) {
    return Status(StatusCode::kInvalidArgument,
                  "malformed ofi address: its fields contradict each other");
  }
  if (address.provider != provider) {
    return Status(StatusCode::kFailedPrecondition,
                  std::string("the address is of ofi/") +
                      OfiProviderName(address.provider) +
                      ", this process uses ofi/" + OfiProviderName(provider) +
                      "; give all processes the same transport");
  }
  if (address.job != job) {
    return Status(StatusCode::kUnauthenticated,
                  "the ofi address is of another job: its secret is not ours");
  }
  return address;
}

std::string DescribeEndpoint(const OfiAddress& address) {
  char text[INET6_ADDRSTRLEN + 16] = {};
  if (address.provider == OfiProvider::kTcp && IsSocketAddress(address)) {
    if (address.endpoint_bytes == sizeof(sockaddr_in)) {
      sockaddr_in in;
      std::memcpy(&in, address.endpoint.data(), sizeof(in));
      inet_ntop(AF_INET, &in.sin_addr, text, sizeof(text));
      return std::string(text) + ":" + std::to_string(ntohs(in.sin_port));
    }
    sockaddr_in6 in;
    std::memcpy(&in, address.endpoint.data(), sizeof(in));
    inet_ntop(AF_INET6, &in.sin6_addr, text, sizeof(text));
    return std::string("[") + text + "]:" + std::to_string(ntohs(in.sin6_port));
  }
  std::string hex;
  for (uint32_t i = 0; i < address.endpoint_bytes; ++i) {
    std::snprintf(text, sizeof(text), "%02x",
                  static_cast<unsigned>(address.endpoint[i]));
    hex += text;
  }
  return hex;
}

}  // namespace jaxfabric
