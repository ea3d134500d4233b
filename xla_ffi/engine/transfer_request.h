// What a TransferEngine is asked: how to be, and what to write where.

#ifndef JAXFABRIC_ENGINE_TRANSFER_REQUEST_H_
#define JAXFABRIC_ENGINE_TRANSFER_REQUEST_H_

#include <cstdint>
#include <string>
#include <vector>

#include "engine/region_address.h"

namespace jaxfabric {

struct TransferEngineOptions {
  std::string job;    // engines of one job talk to each other
  std::string token;  // which they show that they all know
  std::string name;   // for error texts
  // Domains, 1 to 8; 0 stands for one on each NIC of the transport. The other
  // side may have another number.
  uint32_t nics = 0;
  double timeout_s = 30;  // of operations that give no deadline
  // How long the worker looks again before it sleeps.
  int64_t spin_ns = 5'000;
  // Where the worker runs; none: anywhere. See KeepThisThreadOn.
  std::vector<uint32_t> worker_cores;
  // A peer that says nothing is asked so often whether it is there,
  double heartbeat_s = 1;
  // and is lost when it has not answered for so long.
  double peer_timeout_s = 15;
};

// Equal pages of a region: page i begins at `offset + indices[i] * stride`.
struct PageList {
  std::vector<uint64_t> indices;
  uint64_t stride = 0;
  uint64_t offset = 0;
};

struct ScatterTarget {
  RegionAddress region;
  uint64_t source_offset = 0;
  uint64_t target_offset = 0;
  uint64_t length = 0;
};

}  // namespace jaxfabric

#endif  // JAXFABRIC_ENGINE_TRANSFER_REQUEST_H_
