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
  writer.Number(id);
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
  JF_RETURN_IF_ERROR(
      ReadHeader(reader, kMagic, kVersion, "the description is", malformed));
  RegionAddress region;
  for (uint64_t& word : region.owner.words) word = reader.Number<uint64_t>();
  region.id = reader.Number<uint64_t>();
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
