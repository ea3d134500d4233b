#include "engine/control_message.h"

#include <cstring>

namespace jaxfabric {
namespace {

// offset 0 magic u32, 4 version u16, 6 type u16, 8 generation u32,
// 12 text length u32, 16 argument u64, 24 text
struct Header {
  uint32_t magic;
  uint16_t version;
  uint16_t type;
  uint32_t generation;
  uint32_t text_bytes;
  uint64_t argument;
};
static_assert(sizeof(Header) == 24);

constexpr uint32_t kMagic = 0x4a464354;
constexpr uint16_t kVersion = 1;

}  // namespace

std::string ControlMessage::Encode() const {
  const std::string_view cut = std::string_view(text).substr(0, kTextBytesMax);
  const Header header = {kMagic,
                         kVersion,
                         static_cast<uint16_t>(type),
                         generation,
                         static_cast<uint32_t>(cut.size()),
                         argument};
  std::string bytes(sizeof header, '\0');
  std::memcpy(bytes.data(), &header, sizeof header);
  bytes += cut;
  return bytes;
}

StatusOr<ControlMessage> ControlMessage::Decode(std::string_view bytes) {
  const Status malformed(StatusCode::kInvalidArgument,
                         "a malformed control message of " +
                             std::to_string(bytes.size()) + " bytes");
  Header header;
  if (bytes.size() < sizeof header) return malformed;
  std::memcpy(&header, bytes.data(), sizeof header);
  if (header.magic != kMagic || header.version != kVersion) return malformed;
  if (header.text_bytes != bytes.size() - sizeof header) return malformed;
  if (header.text_bytes > kTextBytesMax) return malformed;
  if (header.type < static_cast<uint16_t>(Type::kCredits) ||
      header.type > static_cast<uint16_t>(Type::kGoodbye)) {
    return malformed;
  }
  ControlMessage message;
  message.type = static_cast<Type>(header.type);
  message.generation = header.generation;
  message.argument = header.argument;
  message.text = std::string(bytes.substr(sizeof header));
  return message;
}

}  // namespace jaxfabric
