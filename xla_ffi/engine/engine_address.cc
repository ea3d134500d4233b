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

// How many bytes a character takes that begins so; 0 if none does.
size_t BytesOfCharacter(uint8_t first) {
  if (first < 0x80) return 1;
  if (first >= 0xc2 && first < 0xe0) return 2;
  if (first >= 0xe0 && first < 0xf0) return 3;
  return first >= 0xf0 && first < 0xf5 ? 4 : 0;
}

}  // namespace

bool EngineAddress::IsText(std::string_view bytes) {
  for (size_t at = 0; at < bytes.size();) {
    const auto byte = [&](size_t i) {
      return static_cast<uint8_t>(bytes[at + i]);
    };
    const size_t count = BytesOfCharacter(byte(0));
    if (count == 0 || count > bytes.size() - at) return false;
    if (count == 1 && (byte(0) < 0x20 || byte(0) == 0x7f)) return false;
    for (size_t i = 1; i < count; ++i) {
      if ((byte(i) & 0xc0) != 0x80) return false;
    }
    // Longer than need be, half of a pair, or beyond the last character.
    if ((byte(0) == 0xe0 && byte(1) < 0xa0) ||
        (byte(0) == 0xed && byte(1) >= 0xa0) ||
        (byte(0) == 0xf0 && byte(1) < 0x90) ||
        (byte(0) == 0xf4 && byte(1) >= 0x90)) {
      return false;
    }
    at += count;
  }
  return true;
}

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
  if (!IsText(address.job) || !IsText(address.name)) return malformed;
  for (uint32_t i = 0; i < count; ++i) {
    address.domains.push_back({std::string(reader.Text(kDomainBytesMax))});
  }
  address.seal = reader.Bytes(kSealBytes);
  if (!reader.AtEnd()) return malformed;
  return address;
}

}  // namespace jaxfabric
