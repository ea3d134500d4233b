// RankAddress: what a rank publishes so that others can reach it.

#ifndef JAXFABRIC_ENGINE_RANK_ADDRESS_H_
#define JAXFABRIC_ENGINE_RANK_ADDRESS_H_

#include <cstdint>
#include <string>
#include <string_view>
#include <vector>

#include "base/status.h"
#include "engine/domain_group.h"
#include "transport/transport.h"

namespace jaxfabric {

struct RankAddress {
  uint32_t generation = 0;
  std::vector<NetAddr> domains;
  MrDesc heap;

  std::string Encode() const;
  // Refuses malformed bytes and other versions with a sentence.
  static StatusOr<RankAddress> Decode(std::string_view bytes);
};

}  // namespace jaxfabric

#endif  // JAXFABRIC_ENGINE_RANK_ADDRESS_H_
