#include "transport/shm_address.h"

#include <sys/random.h>
#include <unistd.h>

#include <cstdio>
#include <cstring>
#include <fstream>

#include "base/check.h"

namespace jaxfabric {

NetAddr ToNetAddr(const ShmAddress& address) {
  NetAddr net_addr;
  net_addr.bytes.resize(sizeof(address));
  std::memcpy(net_addr.bytes.data(), &address, sizeof(address));
  return net_addr;
}

StatusOr<ShmAddress> ParseShmAddress(const NetAddr& net_addr) {
  const std::string& bytes = net_addr.bytes;
  ShmAddress address;
  if (bytes.size() < sizeof(address.magic) ||
      std::memcmp(bytes.data(), &kShmMagic, sizeof(kShmMagic)) != 0) {
    return Status(StatusCode::kInvalidArgument,
                  "not an address of the shm transport; a peer is reached only "
                  "by the transport whose address it published");
  }
  if (bytes.size() != sizeof(address)) {
    return Status(StatusCode::kInvalidArgument,
                  "malformed shm address: it has " +
                      std::to_string(bytes.size()) + " bytes where " +
                      std::to_string(sizeof(address)) + " are due");
  }
  std::memcpy(&address, bytes.data(), sizeof(address));
  if (address.version != kShmVersion) {
    return Status(StatusCode::kFailedPrecondition,
                  "the shm address is of protocol version " +
                      std::to_string(address.version) +
                      ", this process speaks version " +
                      std::to_string(kShmVersion) +
                      "; run the same jaxfabric in all processes");
  }
  if (address.host != ShmHost()) {
    return Status(StatusCode::kFailedPrecondition,
                  "the shm address was published on another host (or before a "
                  "reboot); shm joins only ranks of one host");
  }
  return address;
}

std::string ShmSocketName(const std::array<uint64_t, 2>& process) {
  char name[64];
  std::snprintf(name, sizeof(name), "jaxfabric-%016llx%016llx",
                static_cast<unsigned long long>(process[0]),
                static_cast<unsigned long long>(process[1]));
  return name;
}

uint64_t ShmHost() {
  static const uint64_t host = [] {
    std::string id;
    std::ifstream("/proc/sys/kernel/random/boot_id") >> id;
    if (id.empty()) {  // no /proc in this container
      char name[256] = {};
      gethostname(name, sizeof(name) - 1);
      id = name;
    }
    uint64_t hash = 0xcbf2'9ce4'8422'2325;  // FNV-1a
    for (const char c : id) {
      hash = (hash ^ static_cast<uint8_t>(c)) * 0x0000'0100'0000'01b3;
    }
    return hash;
  }();
  return host;
}

uint64_t RandomU64() {
  uint64_t value = 0;
  // Up to 256 bytes come whole and are never interrupted.
  JF_CHECK(getrandom(&value, sizeof(value), 0) == sizeof(value));
  return value;
}

}  // namespace jaxfabric
