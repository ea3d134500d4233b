// RegionAddress: what an engine publishes of a region, so that peers can write
// into it.

#ifndef JAXFABRIC_ENGINE_REGION_ADDRESS_H_
#define JAXFABRIC_ENGINE_REGION_ADDRESS_H_

#include <string>
#include <string_view>

#include "base/status.h"
#include "engine/domain_group.h"
#include "engine/random_id.h"

namespace jaxfabric {

struct RegionAddress {
  RandomId owner;   // the id of the engine
  uint64_t id = 0;  // of the region, there; never used again
  MrDesc memory;

  std::string Encode() const;
  // Refuses malformed bytes and other versions with a sentence. What they say
  // is checked again where it is used: by the engine, which knows the peer, and
  // by the peer's NIC, which knows its keys.
  static StatusOr<RegionAddress> Decode(std::string_view bytes);
};

}  // namespace jaxfabric

#endif  // JAXFABRIC_ENGINE_REGION_ADDRESS_H_
