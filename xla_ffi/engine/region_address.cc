#include "engine/region_address.h"

#include <limits>

#include "engine/byte_stream.h"

namespace jaxfabric {
namespace {

constexpr uint32_t kMagic = 0x4152464a;  // "JFRA"
constexpr uint32_t kVersion = 1;

}  // namespace

std::string RegionAddress::Encode() const {
  ByteWriter writer;
  writer.Number(kMagic);
  writer.Number(kVersion);
  for (const uint64_t word : owner.words) writer.Number(word);
  writer.Number(memory.base);
  writer.Number(memory.length);
  writer.Number(static_cast<uint32_t>(memory.keys.size()));
  for (const uint64_t key : memory.keys) writer.Number(key);
  return writer.Take();
}

StatusOr<RegionAddress> RegionAddress::Decode(std::string_view bytes) {
  const Status malformed(StatusCode::kInvalidArgument,
                         "not the description of a region, or not all of it (" +
                             std::to_string(bytes.size()) + " bytes)");
  ByteReader reader(bytes);
  if (reader.Number<uint32_t>() != kMagic) return malformed;
  const uint32_t version = reader.Number<uint32_t>();
  if (reader.ok() && version != kVersion) {
    return Status(StatusCode::kFailedPrecondition,
                  "the region is described in version " +
                      std::to_string(version) + ", this engine reads version " +
                      std::to_string(kVersion) +
                      "; install the same jaxfabric on both sides");
  }
  RegionAddress region;
  for (uint64_t& word : region.owner.words) word = reader.Number<uint64_t>();
  region.memory.base = reader.Number<uint64_t>();
  region.memory.length = reader.Number<uint64_t>();
  const uint32_t count = reader.Number<uint32_t>();
  if (count < 1 || count > DomainGroup::kDomainsMax) return malformed;
  for (uint32_t i = 0; i < count; ++i) {
    region.memory.keys.push_back(reader.Number<uint64_t>());
  }
  const uint64_t room =
      std::numeric_limits<uint64_t>::max() - region.memory.base;
  if (!reader.AtEnd() || region.memory.length > room) return malformed;
  return region;
}

}  // namespace jaxfabric
