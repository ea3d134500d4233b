#include "transport/verbs_address.h"

#include <algorithm>
#include <cstring>

namespace jaxfabric {
namespace {

constexpr uint32_t kQueuePairMax = (1u << 24) - 1;
// Keys with the highest bit set are for the kernel's own use.
constexpr uint32_t kQueueKeyMax = 0x7fff'ffff;

const char* LinkLayerName(VerbsLinkLayer layer) {
  return layer == VerbsLinkLayer::kInfiniBand ? "InfiniBand" : "Ethernet";
}

bool IsWellFormed(const VerbsAddress& address) {
  const bool infiniband = address.link_layer == VerbsLinkLayer::kInfiniBand;
  if (!infiniband && address.link_layer != VerbsLinkLayer::kEthernet) {
    return false;
  }
  // Queue pairs 0 and 1 are those of the subnet's management.
  if (address.queue_pair < 2 || address.queue_pair > kQueuePairMax ||
      address.queue_key == 0 || address.queue_key > kQueueKeyMax) {
    return false;
  }
  const bool has_gid = std::any_of(address.gid.begin(), address.gid.end(),
                                   [](uint8_t byte) { return byte != 0; });
  const bool is_multicast = address.gid[0] == 0xff;
  return has_gid && !is_multicast && (infiniband || address.lid == 0);
}

}  // namespace

NetAddr ToNetAddr(const VerbsAddress& address) {
  return {
      std::string(reinterpret_cast<const char*>(&address), sizeof(address))};
}

StatusOr<VerbsAddress> ParseVerbsAddress(const NetAddr& net_addr,
                                         VerbsLinkLayer link_layer,
                                         uint64_t job) {
  const std::string& bytes = net_addr.bytes;
  VerbsAddress address;
  if (bytes.size() < sizeof(kVerbsMagic) ||
      std::memcmp(bytes.data(), &kVerbsMagic, sizeof(kVerbsMagic)) != 0) {
    return Status(StatusCode::kInvalidArgument,
                  "not an address of the verbs transport; a peer is reached "
                  "only by the transport whose address it published");
  }
  if (bytes.size() != sizeof(address)) {
    return Status(StatusCode::kInvalidArgument,
                  "malformed verbs address: it has " +
                      std::to_string(bytes.size()) + " bytes where " +
                      std::to_string(sizeof(address)) + " are due");
  }
  std::memcpy(&address, bytes.data(), sizeof(address));
  if (address.version != kVerbsVersion) {
    return Status(StatusCode::kFailedPrecondition,
                  "the verbs address is of protocol version " +
                      std::to_string(address.version) +
                      ", this process speaks version " +
                      std::to_string(kVerbsVersion) +
                      "; run the same jaxfabric in all processes");
  }
  if (!IsWellFormed(address)) {
    return Status(StatusCode::kInvalidArgument,
                  "malformed verbs address: its fields contradict each other");
  }
  if (address.link_layer != link_layer) {
    return Status(StatusCode::kFailedPrecondition,
                  std::string("the address is of a port on ") +
                      LinkLayerName(address.link_layer) + ", ours is on " +
                      LinkLayerName(link_layer) +
                      "; choose ports of one network with JAXFABRIC_NICS");
  }
  if (address.job != job) {
    return Status(
        StatusCode::kUnauthenticated,
        "the verbs address is of another job: its secret is not ours");
  }
  return address;
}

std::string Describe(const VerbsAddress& address) {
  return DescribeGid(address.gid) + " (queue pair " +
         std::to_string(address.queue_pair) + ")";
}

}  // namespace jaxfabric
