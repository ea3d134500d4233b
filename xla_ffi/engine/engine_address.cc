#include "engine/engine_address.h"

#include "engine/byte_stream.h"
#include "engine/domain_group.h"
#include "engine/hmac.h"

namespace jaxfabric {
namespace {

constexpr uint32_t kMagic = 0x4145464a;  // "JFEA"
constexpr uint32_t kVersion = 1;
constexpr uint64_t kDomainBytesMax = 1024;
constexpr size_t kSealBytes = 16;

std::string Seal(std::string_view token, const std::string& body) {
  const Sha256Digest digest = HmacSha256(token, "address" + body);
  return std::string(AsBytes(digest).substr(0, kSealBytes));
}

}  // namespace

std::string EngineAddress::Body() const {
  ByteWriter writer;
  writer.Number(kMagic);
  writer.Number(kVersion);
  for (const uint64_t word : id.words) writer.Number(word);
  writer.Text(job);
  writer.Text(name);
  writer.Number(static_cast<uint32_t>(domains.size()));
  for (const NetAddr& domain : domains) writer.Text(domain.bytes);
  return writer.Take();
}

std::string EngineAddress::Encode(std::string_view token) const {
  const std::string body = Body();
  return body + Seal(token, body);
}

bool EngineAddress::IsSealedWith(std::string_view token) const {
  return ConstantTimeEqual(seal, Seal(token, Body()));
}

StatusOr<EngineAddress> EngineAddress::Decode(std::string_view bytes) {
  const Status malformed(StatusCode::kInvalidArgument,
                         "not the address of a TransferEngine, or not all of "
                         "it (" +
                             std::to_string(bytes.size()) + " bytes)");
  ByteReader reader(bytes);
  JF_RETURN_IF_ERROR(
      ReadHeader(reader, kMagic, kVersion, "the address is", malformed));
  EngineAddress address;
  for (uint64_t& word : address.id.words) word = reader.Number<uint64_t>();
  address.job = reader.Text(kNameBytesMax);
  address.name = reader.Text(kNameBytesMax);
  const uint32_t count = reader.Number<uint32_t>();
  if (count < 1 || count > DomainGroup::kDomainsMax) return malformed;
  for (uint32_t i = 0; i < count; ++i) {
    address.domains.push_back({std::string(reader.Text(kDomainBytesMax))});
  }
  address.seal = reader.Bytes(kSealBytes);
  if (!reader.AtEnd()) return malformed;
  return address;
}

}  // namespace jaxfabric
